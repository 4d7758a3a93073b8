"""How far the updates of a rollout take the policy from what sampled it, and where they end for it."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ...kl import kl_to_sampler, masked_sum
from ..parts import Part

logger = get_logger(__name__)


class SamplerDrift(Part):
    r"""Measures KL(policy || sampler) at each update of a rollout; above `kl_sampler_target` the updates end.

        D_j = sum_t m_t (w_t log w_t - w_t + 1) / sum_t m_t,    w_t = pi_j(a_t|s_t) / mu(a_t|s_t)

    in nats per token, over the tokens m of update j on all processes, which are scored for its loss anyway: pi_j is the
    policy before the update, mu what sampled, an engine where it reports log-probs. Update j is made; where D_j is
    above the target, or not a number, those after it are left out. So a rollout has at least one update, however far
    its sampler was at first. The same on every process: the decision is about gathered sums.

    Logs `kl/drift`, the mean D of updates, and `kl/drift_last`, that of a rollout's last one; with a target also
    `kl/updates`, the share of updates that is made.

    Source: the early stopping of PPO's implementations (Achiam 2018, "Spinning Up", `target_kl`), which stop before the
    update in question: its gradient is there by then, and DeepSpeed has taken the step.

    Args:
        trainer: with its `args`, `accelerator` and `metrics`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.begin()

    def begin(self) -> None:
        self._has_warned = False
        self._update: list[Tensor] = []  # of each micro-batch of the update that is computed: sum of D, and tokens
        self.begin_rollout()

    def begin_rollout(self) -> None:
        """Fresh answers: all updates are wanted."""
        self.stopped = False  # whether the rollout's remaining updates are left out
        self._is_first = True  # whether the next update is the rollout's first

    def add(self, policy_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> None:
        """Take a micro-batch of an update: log-probs of the answers under both, and the tokens that count, (B, T)."""
        drift = masked_sum(kl_to_sampler(policy_logps.detach(), sampler_logps), mask)
        self._update.append(torch.stack([drift, mask.sum().to(drift)]))

    def end_update(self, *, is_last: bool) -> None:
        """Judge the update whose micro-batches were taken; `is_last`: of its rollout. Call on every process."""
        if not self._update:
            return
        sums, self._update = torch.stack(self._update).sum(0), []
        target, metrics = self._trainer.args.kl_sampler_target, self._trainer.metrics
        if target is not None:
            drift, tokens = self._trainer.accelerator.gather(sums.unsqueeze(0)).cpu().sum(0).tolist()
            self.stopped = not drift <= target * tokens  # one that is not a number is no reason to go on
            metrics.add("train", "kl/updates", 1.0)
            if drift > target * tokens and self._is_first:
                self._warn(drift / tokens)
        self._is_first = False
        names = ["kl/drift", *(["kl/drift_last"] if self.stopped or is_last else [])]
        metrics.pool("train", {name: (sums[0], sums[1]) for name in names})

    def _warn(self, drift: float) -> None:
        """Tell once that it is not the updates that take the policy too far."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"KL(policy || sampler) is {drift:.3g} nats per token before a rollout's first update, above "
                f"kl_sampler_target={self._trainer.args.kl_sampler_target:g}: only this one is made. If that is so in "
                "other rollouts, raise the target or bring the sampler nearer (weights and precision of the engine)."
            )

    def leave_out(self, updates: int) -> None:
        """Count updates that are not made."""
        for _ in range(updates):
            self._trainer.metrics.add("train", "kl/updates", 0.0)

    def state(self) -> dict[str, Any]:
        return {"updates_stopped": self.stopped}

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        self.stopped = bool(state.get("updates_stopped", False))
