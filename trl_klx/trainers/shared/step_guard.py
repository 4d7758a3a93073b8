"""Steps that are not finite: seen on any process, skipped on all, counted, and the run's end when they do not cease."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoints.whole import whole_checkpoints
from ..errors import NonFiniteError
from ..parts import Part

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


class StepGuard(Part):
    """Watches the numbers of a step, and skips the step where they are not finite. The same on every process.

    A skipped step has no gradients: every optimizer leaves parameters without one as they are, with their moments.
    Learning rate, schedules of beta and the step's number go on.

    DeepSpeed takes its step within the backward pass and skips for itself what is not finite: whatever else is to be
    skipped gets such a loss, and the step is counted here.

    Args:
        reward_names: of the reward functions, for the message when no answer has a reward.
    """

    def __init__(self, trainer: Any, reward_names: Collection[str] = ()) -> None:
        self._trainer, self._accelerator, self._reward_names = trainer, trainer.accelerator, reward_names
        self._bad: dict[str, Tensor] = {}
        self._is_skipped = False  # whether the step that the loop is about to take was judged already, and skipped
        self.skipped = 0  # steps, so far
        self.in_a_row = 0

    def begin(self) -> None:
        self._bad.clear()
        self.skipped = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped}

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        self.skipped = int(state.get("skipped_steps", 0))

    def watch(self, what: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Note whether `values` are all finite, where `mask` marks that they count; `what` is a key of `ADVICE`."""
        device = self._accelerator.device
        if isinstance(values, Tensor):
            each = values.detach().to(device).isfinite().logical_not()
            bad = (each if mask is None else each & mask.bool()).any()
        else:  # written on the device: the host would wait for a copy
            bad = torch.full((), not math.isfinite(values), device=device)
        self._bad[what] = self._bad[what] | bad if what in self._bad else bad

    def for_deepspeed(self, loss: Tensor) -> Tensor:
        """DeepSpeed skips a gradient that is not finite: make it one, everywhere, where the step is to be skipped."""
        if self._accelerator.distributed_type != DistributedType.DEEPSPEED:
            return loss
        bad = ~loss.detach().isfinite()
        for what in set(DECISIVE) & set(self._bad):
            bad = bad | self._bad[what]
        return loss * torch.where(bad, torch.nan, 1.0)

    def takes_step(self, model: nn.Module, norm: Any) -> bool:
        """Judge the step that is about to be taken, whose gradients have this norm. Call on every process."""
        if self._is_skipped:
            self._is_skipped = False
            return False
        # In fp16 the scaler tries out a scale, skips what overflows, and counts for itself.
        if norm is not None and self._accelerator.mixed_precision != "fp16":
            self.watch(GRADIENT, norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if self._drops(model, DECISIVE):
            return False
        self.in_a_row = 0
        return True

    def skips(self, model: nn.Module) -> bool:
        """Judge a step by all that was watched, before it has gradients; the loop is then to take it in vain."""
        self._is_skipped = self._drops(model, ADVICE)
        return self._is_skipped

    def _drops(self, model: nn.Module, decisive: Collection[str]) -> bool:
        """Whether something decisive was not finite on any process since the last call; then no gradient is left."""
        bad = self._verdict(decisive)
        if bad:
            self.skipped += 1
            self.in_a_row += 1
            self.check_weights()  # no later step could be finite
            most = self._trainer.args.max_skipped_steps
            if self.in_a_row > most:
                self._end_run(bad, f"{self.in_a_row} in a row, beyond max_skipped_steps={most}")
            model.zero_grad()
            step = self._trainer.state.global_step + 1
            logger.warning(f"Step {step} is skipped ({self.in_a_row} in a row); not finite: {', '.join(bad)}.")
        if self.skipped:
            self._trainer.metrics.set("train", "skipped_steps", float(self.skipped))
        return bool(bad)

    def _verdict(self, decisive: Collection[str]) -> list[str]:
        """All that was not finite, if some of it is decisive."""
        none = torch.zeros((), device=self._accelerator.device)
        flags = torch.stack([self._bad.get(what, none).float() for what in ADVICE])
        self._bad.clear()
        flags = self._accelerator.reduce(flags, reduction="sum")
        bad = [what for what, flag in zip(ADVICE, flags.tolist(), strict=True) if flag > 0]
        return bad if set(bad) & set(decisive) else []

    def check_weights(self, when: str | None = None) -> None:
        """End the run where the weights themselves are spoilt; they would spoil checkpoints, too.

        Raises:
            NonFiniteError: they are. Call on every process.
        """
        trainer = self._trainer
        name = self.bad_weight(self._accelerator.unwrap_model(trainer.model))
        if name is not None:
            when = f"at step {trainer.state.global_step + 1}" if when is None else when
            raise NonFiniteError(
                f"{when} the weights of the model are not finite (first {name}): "
                f"{self._where_to_resume()}, with a lower learning_rate or in bf16 or float32."
            )

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

    def _end_run(self, bad: list[str], why: str) -> None:
        detail = f" (of {', '.join(map(repr, self._reward_names))})" if bad[0] == REWARDS else ""
        raise NonFiniteError(
            f"not finite at step {self._trainer.state.global_step + 1}: {', '.join(bad)}{detail} ({why}); "
            f"{ADVICE[bad[0]]}, and {self._where_to_resume()}."
        )

    def _where_to_resume(self) -> str:
        last = whole_checkpoints(self._trainer.args.output_dir)[-1:]
        return f"resume from {last[0]}" if last else "start again, because there is no checkpoint"

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Name the policy's logits where `generate` cannot sample from them."""
        try:
            yield
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise NonFiniteError(
                f"at step {self._trainer.state.global_step + 1} the policy's logits are not finite, so that no answer "
                f"can be sampled: {self._where_to_resume()}, with a lower learning_rate or in bf16 or float32."
            ) from error


def _local(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.detach()
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()
