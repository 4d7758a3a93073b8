"""A resumed run has the reference that it had: the fingerprint of a still one is compared, a moved one is put back."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel

from ...hub.settings import without_path
from ..checkpoints.whole import WholeCheckpoints, read_state, resolve_checkpoint
from ..errors import CheckpointError
from .adapters import REF_ADAPTER
from .fingerprint import differ, fingerprint, is_sharded, lasting_parameters

if TYPE_CHECKING:
    from ..session.session import KLControl

MOVED_REFERENCE = "reference.pt"  # in a checkpoint: the weights that sync_ref_model has moved
logger = get_logger(__name__)


class ResumedReference(WholeCheckpoints):
    """The hooks of `transformers.Trainer` that keep the reference of a run. Mix in before the trainer class.

    Of a policy that is loaded from the checkpoint TRL makes the reference, too: its KL would be 0 from there on.
    """

    kl: "KLControl"
    ref_model: Any
    _saved_model: Any
    _takes_ref_model = False  # whether the trainer has such an argument
    _start_print: str | None = None  # of the policy as it was given, where it was the reference and is none any more
    _first_print: str | None = None  # of the reference when training began, and at the last checkpoint
    _seen_print: str | None = None
    _has_moved = False
    _known_reference: tuple[str, float, str] | None = None  # the checkpoint's: fingerprint, KL to it, name

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._first_print = self._reference_print()
        return super().train(*args, **kwargs)

    def _complete(self, folder: Path) -> None:
        self._seen_print = self._reference_print()
        # By sync_ref_model, or by a callback of the user's.
        self._has_moved |= self._moves or self._seen_print != self._first_print
        if self._has_moved and self.ref_model is not None:
            self._save_moved(folder)
        super()._complete(folder)

    @property
    def _moves(self) -> bool:
        """Whether `sync_ref_model` has moved the reference by now."""
        moves = self.ref_model is not None and getattr(self.args, "sync_ref_model", False)  # PPO has no such field
        return moves and self.state.global_step >= self.args.ref_model_sync_steps

    @property
    def _reference_adapter(self) -> str | None:
        """The adapter of a PEFT policy that is its reference; None: the policy without any."""
        return REF_ADAPTER if REF_ADAPTER in self._saved_model.peft_config else None

    def _reference_print(self) -> str | None:
        """The fingerprint of the reference as it is; None where there is none. Call on every process."""
        if self.ref_model is not None:
            return self._print_of(self.accelerator.unwrap_model(self.ref_model))
        if not (isinstance(self._saved_model, PeftModel) and self._has_reference):
            return self._start_print
        names = self._saved_model.peft_config
        parameters = lasting_parameters(self._saved_model, names, self._reference_adapter)
        return fingerprint(parameters, self.accelerator)

    @property
    def _has_reference(self) -> bool:
        """Whether a PEFT policy is its own reference."""
        return self.args.kl_is_measured

    def _print_of(self, model: Any) -> str | None:
        return fingerprint(lasting_parameters(model, (), None), self.accelerator)

    def _checkpoint_state(self) -> dict[str, Any]:
        if self._seen_print is None:
            return super()._checkpoint_state()
        owner = self._saved_model if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        kl = self.kl.budget.kl if math.isfinite(self.kl.budget.kl) else None
        known = {"weights": self._seen_print, "kl": kl, "name": without_path(owner.name_or_path)}
        return {**super()._checkpoint_state(), "reference": known}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        super()._load_checkpoint_state(state)
        known = state.get("reference")
        self._known_reference = None
        if known is not None:
            kl = math.nan if known["kl"] is None else float(known["kl"])
            self._known_reference = str(known["weights"]), kl, str(known["name"])

    def _save_moved(self, folder: Path) -> None:
        reference = self.accelerator.unwrap_model(self.ref_model)
        if self._is_sharded(reference):
            logger.warning(
                f"{folder} cannot be resumed from: the reference has moved (sync_ref_model), and it is sharded and not "
                "saved. Use DDP or ZeRO-2, or sync_ref_model=false."
            )
        elif self.args.should_save:
            torch.save(reference.state_dict(), folder / MOVED_REFERENCE)

    def _is_sharded(self, model: Any) -> bool:
        return self.is_fsdp_enabled or is_sharded(model)

    def _take_reference(self, checkpoint: str) -> None:
        """Put a moved reference back, and refuse another one than the checkpoint's. Call on every process.

        Raises:
            CheckpointError: with what to pass.
        """
        moved = Path(checkpoint) / MOVED_REFERENCE
        reference = self.accelerator.unwrap_model(self.ref_model) if self.ref_model is not None else None
        if reference is not None and moved.is_file() and not self._is_sharded(reference):
            try:
                reference.load_state_dict(torch.load(moved, map_location="cpu", mmap=True, weights_only=True))
            except Exception as error:  # torch raises a different class for each way in which a file can be wrong
                reason = " ".join(str(error).split())[:200]
                raise CheckpointError(
                    f"{moved} is not the reference of this run ({type(error).__name__}: {reason}): resume from another "
                    "checkpoint."
                ) from error
            self._has_moved = True
        elif self._moves:
            raise CheckpointError(
                f"sync_ref_model had moved the reference by step {self.state.global_step}, and {checkpoint} does not "
                f"hold it, or not for a sharded model: resume from a checkpoint before step "
                f"{self.args.ref_model_sync_steps}, or start the run again."
            )
        self._compare_reference(checkpoint)

    def _compare_reference(self, checkpoint: str) -> None:
        if self._known_reference is None:
            return
        weights, kl, name = self._known_reference
        now = self._reference_print()
        if now is not None and differ(now, weights):
            raise CheckpointError(self._another_reference(checkpoint, now, kl, name))

    def _another_reference(self, checkpoint: str, now: str, kl: float, name: str) -> str:
        is_own = self.ref_model is not None and self._print_of(self._saved_model) == now
        what = "the checkpoint's own policy" if is_own else "another model"
        far = f", to which the KL was {kl:.3g} nats per sequence" if math.isfinite(kl) else ""
        start = f" ({name})" if name else ""
        way = ", or as ref_model" if self._takes_ref_model else ""
        return (
            f"the reference is {what}, and not the one that {checkpoint} was trained against{far}: pass the model that "
            f"the run started from{start} as model (model_name_or_path in a recipe){way}; "
            "resume_from_checkpoint loads the checkpoint's weights into the policy. To make the checkpoint the "
            "reference of a new run, leave resume_from_checkpoint out."
        )


def check_resume(args: Any, model: str | None) -> None:
    """Find out before a model is loaded whether there is a checkpoint to resume from, and a reference beside it.

    Args:
        args: the config of the run.
        model: the path of the model that it starts from.

    Raises:
        CheckpointError: there is no whole checkpoint, or the model is that checkpoint.
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
