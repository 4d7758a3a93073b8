"""How far one step takes the policy, and a limit on it, which the learning rate keeps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...kl import kl_to_sampler, masked_sum
from ..parts import Part

_WEIGHT = 0.3  # of the last step, in s
_FAR = 2.0  # |log(limit / D)| counts as at most this


class _Before(NamedTuple):
    """Answers of a step, scored by the policy before it."""

    logps: Tensor  # (B, T)
    mask: Tensor  # (B, T) tokens that count
    score: Callable[[], Tensor]  # their log-probs under the policy as it is then


class StepLimit(Part, TrainerCallback):
    r"""Measures D = KL(policy after a step || policy before it), and holds it down to `kl_step_limit`.

        D = sum_t m_t (w_t log w_t - w_t + 1) / n,    w_t = after(a_t|s_t) / before(a_t|s_t)
        log s <- min(0, log s + 0.3 clip(log(limit / D), -2, 2) / 2)

    The next step's learning rate is the schedule's times s. D grows with the square of the learning rate: hence the
    half. 0.3 lets s follow the last three steps or so, because D of a single one is noisy. A D of 0 (nothing moved) or
    that is not a number leaves s as it is. In PPO the value model learns at this rate, too.

    A step is one of the training loop: in GRPO an optimizer step, in PPO a rollout with all its updates. The answers
    are those of one micro-batch of each process, which are scored once more when the step is taken, without a gradient;
    m are the tokens that count, n is their number, or with kl_target_unit "sequence" the number of answers. They were
    sampled before the step, in GRPO's reused rollouts by an earlier policy. The same on every process.

    What a learning rate adds to the KL as noise no beta takes away: it is a random walk of steps of D, and the KL that
    they end at is paid for without a reward. Near the reference n steps in random directions add about n D, n in one
    direction n^2 D.

    Logs `kl/step`, the mean D, and `kl/lr_scale`, s.

    Sources: TRPO (Schulman et al., 2015, arXiv 1502.05477), whose steps have a bound on KL(before || after); the
    learning rate that follows the KL of an update is in use in PPO for robots (Rudin et al., 2021, arXiv 2109.11978).

    Args:
        trainer: with its `args`, `accelerator` and `metrics`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.begin()
        if self.limit is not None:
            trainer.add_callback(self)

    @property
    def limit(self) -> float | None:
        return self._trainer.args.kl_step_limit

    def begin(self) -> None:
        self._log_scale = 0.0
        self._before: _Before | None = None
        self._rates: list[tuple[float, float]] = []  # of each group: the schedule's, and the one of this step

    def before(self, logps: Tensor, mask: Tensor, score: Callable[[], Tensor]) -> None:
        """Take a micro-batch of the step that begins; the last one given is looked at when it is taken.

        Args:
            logps: (B, T) log-probs of answers under the policy before the step.
            mask: (B, T) tokens that count.
            score: computes the former under the policy as it is when called; called on every process or on none.
        """
        if self.limit is not None:
            self._before = _Before(logps.detach(), mask, score)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        groups = kwargs["optimizer"].param_groups
        self._rates = [(group["lr"], group["lr"] * math.exp(self._log_scale)) for group in groups]
        for group, (_, rate) in zip(groups, self._rates, strict=True):
            group["lr"] = rate

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the schedule moves, which may go on from what it finds. One of DeepSpeed's has moved by now."""
        for group, (scheduled, rate) in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
            if group["lr"] == rate:
                group["lr"] = scheduled

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._before is None or self.limit is None:
            return
        (logps, mask, score), self._before = self._before, None
        moved = masked_sum(kl_to_sampler(score(), logps), mask)
        by_answer = self._trainer.args.kl_target_unit == "sequence"
        count = mask.any(1).sum() if by_answer else mask.sum()
        sums = torch.stack([moved, count.to(moved)]).unsqueeze(0)
        kl, counted = self._trainer.accelerator.gather(sums).cpu().sum(0).tolist()
        step_kl = kl / max(counted, 1.0)
        metrics = self._trainer.metrics
        metrics.add("train", "kl/step", step_kl)
        metrics.add("train", "kl/lr_scale", math.exp(self._log_scale))
        if step_kl > 0:  # and a number
            wanted = max(-_FAR, min(_FAR, math.log(self.limit) - math.log(step_kl)))
            self._log_scale = min(0.0, self._log_scale + _WEIGHT * wanted / 2)

    def state(self) -> dict[str, Any]:
        return {} if self.limit is None else {"lr_log_scale": self._log_scale}

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        self._log_scale = float(state.get("lr_log_scale", 0.0))
