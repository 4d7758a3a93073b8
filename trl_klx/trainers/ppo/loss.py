"""PPO as pure functions: advantages, their whitening, and the loss with its named metrics.

Shape legend: B answers, T tokens of an answer. Masked positions (padding, tool output) neither give nor receive
anything: every function gives exactly what it would give for the unmasked tokens alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kl.masking import fill_masked, masked_sum

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


def next_token_values(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) the value at each token's *next* unmasked token, 0 at the last. Moves a reward one token earlier."""
    following = values.new_zeros(values.size(0))
    columns = []
    for t in reversed(range(values.size(1))):
        columns.append(following)
        following = torch.where(mask[:, t].bool(), values[:, t], following)
    return fill_masked(torch.stack(columns[::-1], dim=1), mask)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimates, and the returns that the value model learns.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    return_t = A_t + V_t

    t + 1 is the next unmasked token; after the last one value and advantage are 0.

    Args:
        rewards: (B, T) reward given after each token.
        values: (B, T) value of the state before each token.
        mask: (B, T) tokens that the policy produced.
        gamma: discount per token.
        lam: 1 is Monte Carlo, 0 one-step; below 1 it is unbiased only with an exact value model.

    Returns:
        advantages, returns: (B, T), 0 on masked positions.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016),
    eq. 16.
    """
    next_value = next_advantage = rewards.new_zeros(rewards.size(0))
    columns = []
    for t in reversed(range(rewards.size(1))):
        alive = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        columns.append(advantage)
        next_advantage = torch.where(alive, advantage, next_advantage)
        next_value = torch.where(alive, values[:, t], next_value)
    advantages = fill_masked(torch.stack(columns[::-1], dim=1), mask)
    return advantages, fill_masked(advantages + values, mask)


def mean_and_std(values: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of the unmasked values of all processes; (0, 1) of fewer than two."""
    count, total = reduce(torch.stack([mask.bool().sum().to(values.dtype), masked_sum(values, mask)]))
    mean = torch.where(count < 2, 0.0, total / count)
    squares = reduce(masked_sum((values - mean).square(), mask))
    return mean, torch.where(count < 2, 1.0, (squares / (count - 1) + 1e-8).sqrt())


@dataclass(frozen=True)
class Batch:
    """What the loss of some answers needs of their rollout; all (B, T)."""

    mask: Tensor
    old_logps: Tensor  # of the policy before the updates, scored by the trainer
    advantages: Tensor
    returns: Tensor
    values: Tensor  # of the value model as it was then
    engine_ratio: Tensor | None = None  # bounded ratio of that policy to the engine that sampled
    kl_baseline: Tensor | None = None  # nats, of the KL in the reward where it is charged at the update


@dataclass(frozen=True)
class Clipping:
    """How far ratio and value may move from what they were at the rollout."""

    ratio: float
    value: float


def policy_loss(policy_logps: Tensor, batch: Batch, clip: Clipping) -> tuple[Tensor, dict[str, Tensor]]:
    r"""(B, T) clipped surrogate, -min(r A, clip(r, 1 - eps, 1 + eps) A) with r = pi / pi_old; and its metrics.

    With an inference engine, times the bounded ratio of pi_old to the engine, as TRL's GRPO multiplies its own.

    Metrics are (B, T) too, 0 on masked positions, under TRL's names. Source: Schulman et al., "Proximal
    Policy Optimization Algorithms" (2017), eq. 7.
    """
    log_ratio = fill_masked(policy_logps - batch.old_logps, batch.mask)
    ratio = log_ratio.exp()
    advantages = fill_masked(batch.advantages, batch.mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip.ratio, 1 + clip.ratio)
    larger = torch.maximum(plain, clipped)
    if batch.engine_ratio is not None:
        larger = batch.engine_ratio * larger
    per_token = fill_masked(larger, batch.mask)
    metrics = {
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": (clipped > plain).float(),
        "loss/policy_avg": per_token,
        "val/ratio": ratio,
    }
    return per_token, {name: fill_masked(value.detach(), batch.mask) for name, value in metrics.items()}


def value_loss(values: Tensor, batch: Batch, clip: Clipping) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) half the squared error of the value, the larger of plain and clipped; and its metrics, (B, T) too."""
    values = fill_masked(values, batch.mask)  # before the arithmetic: 0 * nan is nan, in the gradient too
    near = torch.clamp(values, batch.values - clip.value, batch.values + clip.value)
    plain, clipped = (values - batch.returns).square(), (near - batch.returns).square()
    per_token = fill_masked(0.5 * torch.maximum(plain, clipped), batch.mask)
    metrics = {"loss/value_avg": per_token.detach(), "val/clipfrac_avg": (clipped > plain).float()}
    return per_token, {name: fill_masked(value, batch.mask) for name, value in metrics.items()}
