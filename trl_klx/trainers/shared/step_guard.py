"""Steps that are not finite: seen on any process, skipped on all, counted, and the run's end when they do not cease."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..checkpoints.whole import whole_checkpoints
from ..errors import NonFiniteError

if TYPE_CHECKING:
    from transformers import Trainer as _HooksBase
else:
    _HooksBase = object

logger = get_logger(__name__)

# What may be not finite, the cause before its effects, and what to try.
ADVICE = {
    "the rewards of all answers": "look at what the reward functions return",
    "the reference's log-probs": "the reference gives a sampled token no probability, or its weights are not finite: "
    "check its path, tokenizer and precision",
    "the policy's log-probs": "lower learning_rate, or train in bf16 or float32",
    "the value model's values": "lower learning_rate, or train in bf16 or float32",
    "the KL": "the policy gives probability where the reference gives none: check that both have one tokenizer",
    "the loss": "lower learning_rate, or train in bf16 or float32",
    "the gradient norm": "lower learning_rate, or train in bf16 or float32",
}
REWARDS, REFERENCE, POLICY, VALUES, KL, LOSS, GRADIENT = ADVICE
# What spoils the weights. The others explain it: a KL that is only measured may be infinite.
DECISIVE = (REWARDS, LOSS, GRADIENT)


class StepGuard:
    """Watches the numbers of a step. The verdict is the same on every process.

    Args:
        accelerator: for the one reduction per step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._bad: dict[str, Tensor] = {}
        self.skipped = 0  # steps, so far
        self.in_a_row = 0

    def restart(self, skipped: int = 0) -> None:
        """Begin a run, or continue one that had skipped so many steps."""
        self._bad.clear()
        self.skipped, self.in_a_row = skipped, 0

    def watch(self, what: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Note whether `values` are all finite, where `mask` says that they count; `what` is a key of `ADVICE`."""
        device = self._accelerator.device
        values = torch.as_tensor(values, device=device).detach()
        bad = ~values.isfinite() if mask is None else ~values.isfinite() & mask.bool()
        self._bad[what] = self._bad.get(what, torch.zeros((), dtype=torch.bool, device=device)) | bad.any()

    def noticed(self, decisive: Collection[str] = DECISIVE) -> Tensor:
        """Whether this process has noted since the last verdict what that will be about; a bool scalar."""
        flags = [flag for what, flag in self._bad.items() if what in decisive]
        return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=self._accelerator.device)

    def verdict(self, decisive: Collection[str] = DECISIVE) -> list[str]:
        """What was not finite on any process since the last verdict, if the step cannot be taken; counts it then.

        Call on every process. `decisive` is what must be finite.
        """
        none = torch.zeros((), device=self._accelerator.device)
        flags = torch.stack([self._bad.get(what, none).float() for what in ADVICE])
        self._bad.clear()
        flags = self._accelerator.reduce(flags, reduction="sum")
        bad = [what for what, flag in zip(ADVICE, flags.tolist(), strict=True) if flag > 0]
        bad = bad if set(bad) & set(decisive) else []
        self.skipped += bool(bad)
        self.in_a_row += bool(bad)
        return bad

    def stepped(self) -> None:
        """Note that a step is taken."""
        self.in_a_row = 0

    def bad_weight(self, model: nn.Module) -> str | None:
        """A parameter that is trained and not finite, on any process; None where all are. Call on every process.

        Only these can be spoilt; and frozen ones may hold packed integers that no float means (a quantised base).
        """
        weights = [
            (name, _local(p)) for name, p in model.named_parameters() if p.requires_grad and p.element_size() > 1
        ]
        # A sum needs no memory, and is finite exactly when all addends are (float32 does not overflow here).
        sums = [weight.sum(dtype=torch.float32).to(self._accelerator.device) for _, weight in weights]
        here = torch.stack(sums or [torch.zeros((), device=self._accelerator.device)]).isfinite().logical_not()
        if not self._accelerator.reduce(here.any().float(), reduction="sum"):
            return None
        return next((weights[i][0] for i in here.nonzero().flatten().tolist()), "one that another process holds")


def _local(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.detach()
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()


def drop_non_finite(metrics: dict[str, list[float]]) -> None:
    """Take NaN and infinity out of collected metrics, and with them the names that have nothing else."""
    for name in list(metrics):
        kept = [value for value in metrics[name] if math.isfinite(value)]
        if kept:
            metrics[name] = kept
        else:
            del metrics[name]


class GuardedSteps(_HooksBase):
    """The hooks of `transformers.Trainer` that skip an optimizer step which is not finite.

    A skipped step has no gradients: every optimizer leaves parameters without one as they are, with their moments.
    Learning rate, schedules of beta and the step's number go on. The trainer sets `self.guard`.

    DeepSpeed takes its step within the backward pass and skips for itself what is not finite: whatever else is to be
    skipped gets such a loss, and the step is counted here.
    """

    guard: StepGuard
    args: Any
    reward_func_names: list[str]  # as TRL's GRPO has them
    _judged = False  # whether the step that the loop is about to take was skipped already

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        if not self.model.training:  # type: ignore[union-attr]
            return result
        if isinstance(result, tuple):
            return self._loss_for_deepspeed(result[0]), *result[1:]
        return self._loss_for_deepspeed(result)

    def _loss_for_deepspeed(self, loss: Tensor) -> Tensor:
        """DeepSpeed skips a gradient that is not finite: make it one, everywhere, where the step is to be skipped."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return loss
        return loss * torch.where(self.guard.noticed() | ~loss.detach().isfinite(), torch.nan, 1.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Of the step that is about to be taken; None where it is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._judged:
            self._judged = False
            return None
        # In fp16 the scaler tries out a scale, skips what overflows, and counts for itself.
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            self.guard.watch(GRADIENT, norm.item() if isinstance(norm, Tensor) else norm)
        if not self._step_is_finite(model):
            return None
        self.guard.stepped()
        return norm

    def _step_is_finite(self, model: Any, decisive: Collection[str] = DECISIVE) -> bool:
        """Judge the step; if it is not finite, drop its gradients. Call on every process."""
        bad = self.guard.verdict(decisive)
        if bad:
            self._check_weights()  # no later step could be finite
            if self.guard.in_a_row > self.args.max_skipped_steps:
                self._end_run(
                    bad, f"{self.guard.in_a_row} in a row, beyond max_skipped_steps={self.args.max_skipped_steps}"
                )
            model.zero_grad()
            step, row = self.state.global_step + 1, self.guard.in_a_row
            logger.warning(f"Step {step} is skipped ({row} in a row); not finite: {', '.join(bad)}.")
        if self.guard.skipped:
            self._metrics["train"]["skipped_steps"] = [float(self.guard.skipped)]  # type: ignore[attr-defined]
        return not bad

    def _check_weights(self, when: str | None = None) -> None:
        """End the run where the weights themselves are spoilt; they would spoil checkpoints, too."""
        name = self.guard.bad_weight(self.accelerator.unwrap_model(self.model))
        if name is not None:
            when = f"at step {self.state.global_step + 1}" if when is None else when
            raise NonFiniteError(
                f"{when} the weights of the model are not finite (first {name}): "
                f"{self._where_to_resume()}, with a lower learning_rate or in bf16 or float32."
            )

    def _end_run(self, bad: list[str], why: str) -> None:
        detail = f" (of {', '.join(map(repr, self.reward_func_names))})" if bad[0] == REWARDS else ""
        raise NonFiniteError(
            f"not finite at step {self.state.global_step + 1}: {', '.join(bad)}{detail} ({why}); {ADVICE[bad[0]]}, and "
            f"{self._where_to_resume()}."
        )

    def _where_to_resume(self) -> str:
        last = whole_checkpoints(self.args.output_dir)[-1:]
        return f"resume from {last[0]}" if last else "start again, for there is no checkpoint"

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Name the policy's logits where `generate` cannot sample from them."""
        try:
            yield
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise NonFiniteError(
                f"at step {self.state.global_step + 1} the policy's logits are not finite, so that no answer can be "
                f"sampled: {self._where_to_resume()}, with a lower learning_rate or in bf16 or float32."
            ) from error
