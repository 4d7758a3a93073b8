"""A resumed run has the reference that it had: the fingerprint of a still one is compared, a moved one is put back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn

from ...hub.settings import without_path
from ..checkpoints.whole import read_state, resolve_checkpoint
from ..errors import CheckpointError
from ..parts import Part
from .adapters import REF_ADAPTER, active_adapter, copied_parameters
from .fingerprint import differ, fingerprint, lasting_parameters
from .moving import MovingReference
from .shards import is_flattened, let_go, put, whole

MOVED_REFERENCE = "reference.pt"  # in a checkpoint: the weights of a reference that has moved
logger = get_logger(__name__)


class ReferenceKeeper(Part):
    """Keeps the reference of a run: compares it, or puts it back, when the run is resumed.

    Of a policy that is loaded from the checkpoint TRL makes the reference, too: its KL would be 0 from there on.

    Args:
        trainer: the trainer, with its `kl`.
        is_an_argument: whether the trainer takes a ref_model.
        in_policy: whether a PEFT policy, with all but one adapter off, is the reference where there is no other model.
        adapter: the adapter of such a policy that is the reference, if not the one named "ref".
        given: the fingerprint of the policy as it was given, where that was the reference and is not kept.
        moving: what moves the reference (`sync_ref_model`); None: nothing of ours does.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        is_an_argument: bool = False,
        in_policy: bool = True,
        adapter: str | None = None,
        given: str | None = None,
        moving: MovingReference | None = None,
    ) -> None:
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self._is_an_argument, self._in_policy, self._adapter, self._given = is_an_argument, in_policy, adapter, given
        self.moving = moving
        self._first_print: str | None = None  # of the reference when training began, and at the last checkpoint
        self._seen_print: str | None = None
        self._has_moved = False
        self._origin_print = self._print() if moving is not None and moving.keeps_origin else None

    @property
    def _model(self) -> Any:
        """The reference, where it is a model of its own."""
        ref_model = self._trainer.ref_model
        return None if ref_model is None else self._accelerator.unwrap_model(ref_model)

    def begin(self) -> None:
        self._first_print = self._print()
        if self.moving is not None:
            self.moving.moved_through = 0

    def origin_logps(self, ref_logps: Tensor, score: Callable[[], Tensor]) -> Tensor | None:
        """Log-probs under the start of the run: see `MovingReference.origin_logps`; None without one."""
        return None if self.moving is None else self.moving.origin_logps(ref_logps, score)

    def saving(self, folder: Path) -> None:
        self._seen_print = self._print()
        # By sync_ref_model, or by a callback of the user's.
        self._has_moved |= self._moves or self._seen_print != self._first_print
        if not self._has_moved:
            return
        if is_flattened(self._accelerator):
            logger.warning(
                f"{folder} cannot be resumed from: the reference has moved, and fsdp_version=1 flattens it, so that it "
                "is not saved. Use fsdp_version 2, DDP or DeepSpeed."
            )
            return
        weights = ((name, whole(parameter)) for name, parameter in self._parameters().items())
        saved = {name: weight.cpu() for name, weight in weights if self._trainer.args.should_save}
        if saved:
            torch.save(saved, folder / MOVED_REFERENCE)

    @property
    def _moves(self) -> bool:
        """Whether `sync_ref_model` has moved the reference by now."""
        return self.moving is not None and self.moving.has_moved

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What may move of the reference: a model, or the adapter "ref" of the policy."""
        reference, policy = self._model, self._trainer._saved_model
        if reference is not None:
            return dict(reference.named_parameters())
        if not isinstance(policy, PeftModel) or REF_ADAPTER not in policy.peft_config:
            return {}
        return {name: copy for name, (copy, _) in copied_parameters(policy, active_adapter(policy)).items()}

    def _print(self) -> str | None:
        """The fingerprint of the reference as it is; None where there is none. Call on every process."""
        reference, policy = self._model, self._trainer._saved_model
        if reference is not None:
            return print_of(reference, self._accelerator)
        if not (isinstance(policy, PeftModel) and self._in_policy):
            return self._given
        names = policy.peft_config
        adapter = self._adapter or (REF_ADAPTER if REF_ADAPTER in names else None)
        return fingerprint(lasting_parameters(policy, names, adapter), self._accelerator)

    def state(self) -> dict[str, Any]:
        if self._seen_print is None:
            return {}
        owner = self._trainer._saved_model if self._model is None else self._model
        budget = self._trainer.kl.budget
        kl = budget.kl if math.isfinite(budget.kl) else None
        kept = {"weights": self._seen_print, "kl": kl, "name": without_path(owner.name_or_path)}
        if self.moving is not None:
            moves = {"moved": self.moving.has_moved, "moved_through": self.moving.moved_through}
            kept |= {"origin": self._origin_print, **moves}
        return {"reference": kept}

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        """Put a moved reference back, and refuse another one than the checkpoint's. Call on every process.

        Raises:
            CheckpointError: with what to pass.
        """
        known = state.get("reference")
        if known is not None:
            weights, name, origin = str(known["weights"]), str(known["name"]), known.get("origin")
            kl = math.nan if known["kl"] is None else float(known["kl"])
            if origin is not None and self._origin_print is not None and differ(self._origin_print, str(origin)):
                raise CheckpointError(self._another_reference(checkpoint, self._origin_print, kl, name))
        self._put_back(checkpoint, known or {})
        now = self._print()
        if known is not None and now is not None and differ(now, weights):
            raise CheckpointError(self._another_reference(checkpoint, now, kl, name))

    def _put_back(self, checkpoint: Path, known: dict[str, Any]) -> None:
        args, step = self._trainer.args, self._trainer.state.global_step
        had_moved = False
        if self.moving is not None:
            self.moving.moved_through = int(known.get("moved_through", step))  # unknown: of a run that moved nothing
            had_moved = bool(known.get("moved")) if known else step >= args.ref_model_sync_steps  # too old to say so
        moved, parameters = checkpoint / MOVED_REFERENCE, self._parameters()
        if parameters and moved.is_file() and not is_flattened(self._accelerator):
            if self.moving is not None:
                self.moving.leave_start()
            self._read(moved, parameters)
            self._has_moved = True
        elif had_moved:
            raise CheckpointError(
                f"sync_ref_model had moved the reference by step {step}, and {checkpoint} does not hold it: resume "
                f"from a checkpoint before step {args.ref_model_sync_steps}, or start the run again."
            )

    def _read(self, path: Path, parameters: dict[str, nn.Parameter]) -> None:
        """Write the weights of a file into the reference."""
        for model in (self._model, self._trainer._saved_model):
            if model is not None:
                let_go(model)
        try:
            weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            for name, parameter in parameters.items():
                put(parameter, weights[name])
        except Exception as error:  # torch raises a different class for each way in which a file can be wrong
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is not the reference of this run ({type(error).__name__}: {reason}): resume from another "
                "checkpoint."
            ) from error

    def _another_reference(self, checkpoint: Path, now: str, kl: float, name: str) -> str:
        is_own = self._model is not None and print_of(self._trainer._saved_model, self._accelerator) == now
        what = "the checkpoint's own policy" if is_own else "another model"
        far = f", to which the KL was {kl:.3g} nats per sequence" if math.isfinite(kl) else ""
        start = f" ({name})" if name else ""
        way = ", or as ref_model" if self._is_an_argument else ""
        return (
            f"the reference is {what}, and not the one that {checkpoint} was trained against{far}: pass the model that "
            f"the run started from{start} as model (model_name_or_path in a recipe){way}; "
            "resume_from_checkpoint loads the checkpoint's weights into the policy. To make the checkpoint the "
            "reference of a new run, leave resume_from_checkpoint out."
        )


def print_of(model: Any, accelerator: Accelerator) -> str | None:
    """The fingerprint of a reference that is a model of its own. Call on every process."""
    return fingerprint(lasting_parameters(model, (), None), accelerator)


def check_resume(args: Any, model: str | None) -> None:
    """Find out before a model is loaded whether there is a checkpoint to resume from, and a reference beside it.

    Args:
        args: the config of the run.
        model: the path of the model that it starts from.

    Raises:
        CheckpointError: there is no complete checkpoint, or the model is that checkpoint.
    """
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is None or model is None or Path(model).resolve() != Path(checkpoint).resolve():
        return
    known = read_state(checkpoint).get("reference")
    if known is None and not args.kl_is_measured:
        return
    start = f" ({known['name']})" if known is not None and known.get("name") else ""
    raise CheckpointError(
        f"model_name_or_path={model!r} is the checkpoint that is resumed from, which would become its own reference: "
        f"give the model that the run started from{start}; or leave resume_from_checkpoint out, to start a new run "
        "from the checkpoint."
    )
