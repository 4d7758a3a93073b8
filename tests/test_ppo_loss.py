"""PPO's pure functions: advantages against their definition, masked equals subset, losses against hand arithmetic."""

import math

import pytest
import torch
from support.device import DEVICE
from torch import Tensor

from trl_klx.kl import KLTerm, kl_credit
from trl_klx.trainers.ppo.loss import (
    Batch,
    Clipping,
    generalized_advantages,
    mean_and_std,
    next_token_values,
    policy_loss,
    value_loss,
)

pytestmark = pytest.mark.usefixtures("device")


def world(rows: int = 5, length: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with gaps (tool output), a full row and an empty one."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0], mask[1] = True, False
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.5, 0.3)])
def test_advantages_are_the_discounted_sums_of_td_errors(gamma: float, lam: float) -> None:
    rewards, values, mask = world()
    mask[:] = True
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    length = rewards.size(1)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    for t in range(length):
        expected = sum((gamma * lam) ** (s - t) * deltas[:, s] for s in range(t, length))
        torch.testing.assert_close(advantages[:, t], expected)
    torch.testing.assert_close(returns, advantages + values)


def test_with_lambda_one_the_return_is_the_discounted_reward_to_go() -> None:
    rewards, values, mask = world()
    mask[:] = True
    _, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=1.0)
    expected = sum(0.9 ** (s - 2) * rewards[:, s] for s in range(2, rewards.size(1)))
    torch.testing.assert_close(returns[:, 2], expected)


def test_masked_tokens_are_skipped_as_if_they_were_not_there() -> None:
    rewards, values, mask = world()
    garbage = torch.where(mask, 0.0, torch.nan)
    advantages, returns = generalized_advantages(rewards + garbage, values + garbage, mask, gamma=0.9, lam=0.8)
    following = next_token_values(rewards + garbage, mask)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for row in range(len(mask)):
        kept = mask[row]
        if not kept.any():
            continue
        one = torch.ones(1, int(kept.sum()), dtype=torch.bool)
        alone = generalized_advantages(rewards[row, kept][None], values[row, kept][None], one, gamma=0.9, lam=0.8)
        torch.testing.assert_close(advantages[row, kept], alone[0][0])
        torch.testing.assert_close(returns[row, kept], alone[1][0])
        torch.testing.assert_close(following[row, kept][:-1], rewards[row, kept][1:])
        assert following[row, kept][-1] == 0


@pytest.mark.parametrize("placement", ["reward", "both"])
def test_kl_as_a_reward_is_the_kl_credit(placement: str) -> None:
    """With gamma = lambda = 1 and no value model, the advantage is the credit that the oracle proves."""
    values, _, mask = world()
    term = KLTerm("exact" if placement == "both" else "k1", placement, weight_level="none")  # type: ignore[arg-type]
    penalty = term.penalty(values, torch.zeros_like(values), mask, exact=values)
    stream = penalty if term.credit_kind == "return_to_go" else next_token_values(penalty, mask)
    advantages, _ = generalized_advantages(-stream, torch.zeros_like(values), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(-advantages, kl_credit(values, mask, credit=term.credit_kind))  # type: ignore[arg-type]


def test_mean_and_std_are_those_of_the_unmasked_values_of_all_processes() -> None:
    values, garbage, mask = world()
    values = torch.where(mask, values, garbage * torch.nan)
    mean, std = mean_and_std(values, mask, lambda tensor: tensor)
    torch.testing.assert_close(mean, values[mask].mean())
    torch.testing.assert_close(std, values[mask].std(), rtol=1e-6, atol=0)
    other = torch.randn(11, dtype=torch.float64)
    everything = torch.cat([values[mask], other])
    added = iter(
        [torch.stack([torch.tensor(11.0), other.sum()]), (other - everything.mean()).square().sum()],
    )
    mean, std = mean_and_std(values, mask, lambda tensor: tensor + next(added))
    torch.testing.assert_close(mean, everything.mean())
    torch.testing.assert_close(std, everything.std(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_are_left_as_they_are(count: int) -> None:
    mask = torch.arange(4) < count
    mean, std = mean_and_std(torch.randn(1, 4), mask[None], lambda tensor: tensor)
    assert (float(mean), float(std)) == (0.0, 1.0)


def batch(ratio: list[float], advantages: list[float], mask: list[int] | None = None) -> tuple[Tensor, Batch]:
    logps = torch.zeros(1, len(ratio))
    made = torch.tensor([mask or [1] * len(ratio)]).bool()
    zero = torch.zeros_like(logps)
    return torch.tensor([ratio]).log(), Batch(made, logps, torch.tensor([advantages]), zero + 1.0, zero + 0.5)


def test_policy_loss_is_clipped_on_the_side_that_gains() -> None:
    policy_logps, data = batch([1.5, 1.5, 0.5, 0.5, 1.1], [2.0, -2.0, 2.0, -2.0, 2.0])
    per_token, metrics = policy_loss(policy_logps, data, Clipping(0.2, 0.2))
    torch.testing.assert_close(per_token, torch.tensor([[-2.4, 3.0, -1.0, 1.6, -2.2]]))
    assert metrics["policy/clipfrac_avg"].tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]
    torch.testing.assert_close(metrics["policy/approxkl_avg"][0, 0], torch.tensor(0.5 * math.log(1.5) ** 2))
    torch.testing.assert_close(metrics["val/ratio"], torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]))


def test_value_loss_takes_the_larger_of_plain_and_clipped() -> None:
    """Return 1, value at the rollout 0.5, clip 0.2: a value of 0.9 is held at 0.7 and 0.6 is free."""
    _, data = batch([1.0, 1.0], [0.0, 0.0])
    per_token, metrics = value_loss(torch.tensor([[0.9, 0.6]]), data, Clipping(0.2, 0.2))
    torch.testing.assert_close(per_token, torch.tensor([[0.5 * 0.3**2, 0.5 * 0.4**2]]))
    assert metrics["val/clipfrac_avg"].tolist() == [[1.0, 0.0]]


def test_ratio_and_value_have_clips_of_their_own() -> None:
    policy_logps, data = batch([1.5, 1.2], [2.0, 2.0])
    clip = Clipping(ratio=0.1, value=0.3)
    torch.testing.assert_close(policy_loss(policy_logps, data, clip)[0], torch.tensor([[-2.2, -2.2]]))
    per_token, _ = value_loss(torch.tensor([[0.9, 0.7]]), data, clip)
    torch.testing.assert_close(per_token, torch.tensor([[0.5 * 0.2**2, 0.5 * 0.3**2]]))


def test_masked_tokens_have_no_loss_no_metric_and_no_gradient() -> None:
    policy_logps, data = batch([1.5, math.inf, 0.5], [2.0, math.nan, 2.0], [1, 0, 1])
    policy_logps.requires_grad_()
    values = torch.tensor([[0.9, math.nan, 0.6]], requires_grad=True)
    losses = [policy_loss(policy_logps, data, Clipping(0.2, 0.2)), value_loss(values, data, Clipping(0.2, 0.2))]
    for per_token, metrics in losses:
        assert per_token[0, 1] == 0
        assert all(value[0, 1] == 0 for value in metrics.values())
        per_token.sum().backward()
    for tensor in (policy_logps, values):
        assert tensor.grad is not None
        assert tensor.grad[0, 1] == 0
        assert tensor.grad.isfinite().all()
