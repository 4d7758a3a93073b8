r"""A reference that follows the policy (`sync_ref_model`), and the start of the run, to which its KL is measured too.

    ref <- (1 - ref_model_mixup_alpha) ref + ref_model_mixup_alpha policy      every ref_model_sync_steps steps

weight by weight: TRL's `SyncRefModelCallback`, after TR-DPO (Gorbatovski et al., 2024, arXiv 2404.09656). With
`ref_model_sync_steps` 1 it is an exponential moving average of the policy. Of a policy with an adapter, the reference
is a second adapter, and only adapters are mixed; TRL refuses these.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapters import REF_ADAPTER, active_adapter, copied_parameters, keep_reference
from .shards import held, is_flattened, is_out_of_reach, let_go, put, shape_of

logger = get_logger(__name__)


class MovingReference(TrainerCallback):
    """Moves a trainer's reference, and keeps the weights that it started with.

    They cost no model of their own: to score answers as the start would, they and the reference's change places. Where
    all weights are trained they are a second copy of them, made when the reference first moves, and sharded as it is;
    `kl_origin=false` saves it.

    Args:
        trainer: whose policy is followed.
        in_use: whether answers are still learnt from that the reference as it is has scored. It then waits for their
            last step, and makes up for the moves that it has left out: k of them with a policy that stands still are
            one with 1 - (1 - alpha)^k.

    Raises:
        ValueError: the reference cannot follow this policy.
    """

    def __init__(self, trainer: Any, in_use: Callable[[], bool] = lambda: False) -> None:
        self._trainer, self._in_use = trainer, in_use
        self.keeps_origin = bool(trainer.args.kl_has_origin)
        self.has_moved = False
        self.moved_through = 0  # the step of this run up to which all moves that were due have been made
        self._origin: list[Tensor] | None = None  # what this process keeps of the start, once the reference has moved
        self._start: list[Tensor] | None = None  # of an adapter: whole, before the policy is sharded
        self._check()
        self._adapter = self._prepared_adapter()
        self._check_weights()
        if self._adapter is not None and self.keeps_origin:
            self._start = [reference.detach().clone() for reference in self._references]

    def _check(self) -> None:
        if is_flattened(self._trainer.accelerator):
            raise ValueError(
                "sync_ref_model=true moves the reference weight by weight, and fsdp_version=1 flattens weights: use "
                "fsdp_version 2, DDP or DeepSpeed."
            )
        reference, policy = self._model, self._trainer._saved_model
        if reference is None:
            return
        ours, theirs = ([shape_of(parameter) for parameter in model.parameters()] for model in (reference, policy))
        if ours != theirs:
            raise ValueError(
                "sync_ref_model=true moves the reference towards the policy, weight by weight, and ref_model has other "
                "weights than the policy: leave ref_model out, or set sync_ref_model=false."
            )

    def _prepared_adapter(self) -> str | None:
        """The adapter that is trained, where a second one is the reference; a fresh one gets its second here."""
        if self._model is not None:
            return None
        policy = self._trainer._saved_model
        if REF_ADAPTER not in policy.peft_config:
            keep_reference(policy)
        return active_adapter(policy)

    def _check_weights(self) -> None:
        """Refuse weights that cannot be mixed where they are, and tell where a mean would be rounded away.

        Of two neighbours in half precision, a mean with less than half of the second is the first.
        """
        if any(is_out_of_reach(parameter) for pair in self._pairs() for parameter in pair):
            raise ValueError(
                "sync_ref_model=true moves the reference's weights, and some are elsewhere until they are used: load "
                "the models without device_map, and let DeepSpeed offload no parameters to nvme."
            )
        alpha = self._trainer.args.ref_model_mixup_alpha
        if alpha < 0.5 and {held(reference).dtype for reference in self._references} & {torch.bfloat16, torch.float16}:
            logger.warning(
                f"The reference is in half precision, where ref_model_mixup_alpha={alpha:g} of a small change is "
                "rounded to none: load the model in float32 (dtype), or move by half or more, less often."
            )

    @property
    def _model(self) -> Any:
        """The reference, where it is a model of its own."""
        ref_model = self._trainer.ref_model
        return None if ref_model is None else self._trainer.accelerator.unwrap_model(ref_model)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The weights of the reference that move, each with the policy's."""
        policy, reference = self._trainer._saved_model, self._model
        if reference is None:
            return list(copied_parameters(policy, self._adapter).values())
        return list(zip(reference.parameters(), policy.parameters(), strict=True))

    @property
    def _references(self) -> list[nn.Parameter]:
        return [reference for reference, _ in self._pairs()]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        own, step = self._trainer.args, state.global_step
        due = step // own.ref_model_sync_steps - self.moved_through // own.ref_model_sync_steps
        if due > 0 and not self._in_use():
            self._move((1.0 - own.ref_model_mixup_alpha) ** due)
            self.moved_through = step

    @torch.no_grad()
    def _move(self, kept_share: float) -> None:
        self.leave_start()
        self._let_go()
        for reference, policy in self._pairs():
            target = held(reference)
            target.mul_(kept_share).add_(held(policy).to(target.device), alpha=1.0 - kept_share)

    def _let_go(self) -> None:
        for model in (self._trainer._saved_model, self._model):
            if model is not None:
                let_go(model)

    @torch.no_grad()
    def leave_start(self) -> None:
        """Keep the weights of the start, where they are wanted, before the reference leaves them for the first time."""
        self.has_moved = True
        if not self.keeps_origin or self._origin is not None:
            return
        self._let_go()
        references = self._references
        self._origin = [held(reference).clone() for reference in references]
        if self._start is not None:  # a checkpoint's adapter may be in its place by now
            for reference, weight in zip(references, self._start, strict=True):
                put(reference, weight)
            self._exchange()
            self._start = None

    def origin_logps(self, ref_logps: Tensor, score: Callable[[], Tensor]) -> Tensor | None:
        """Log-probs of answers under the start; None where they are not wanted. Call on every process.

        Args:
            ref_logps: those under the reference, which is the start until it moves.
            score: computes them under the reference as it is then.
        """
        if not self.keeps_origin or self._origin is None:
            return ref_logps if self.keeps_origin else None
        with self._at_origin():
            return score()

    @contextmanager
    def _at_origin(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Start and reference change places, one weight at a time: no third copy is ever in memory."""
        assert self._origin is not None
        self._let_go()
        for reference, kept in zip(self._references, self._origin, strict=True):
            here = held(reference)
            moved = here.clone()
            here.copy_(kept)
            kept.copy_(moved)
