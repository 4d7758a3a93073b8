"""The exact KL of two next-token distributions, summed over the whole vocabulary, from materialised logits.

`exact_kl` is the readable definition. `exact_chunked` holds the two routes that save memory; value and gradient
of one block of their rows are computed here, next to the definition.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .estimators import at_least_float32

Direction = Literal["reverse", "forward"]


class _Terms(NamedTuple):
    """What value and gradient of one KL share. `left` is the distribution that the KL averages over."""

    left_probs: Tensor  # (..., V)
    gap: Tensor  # (..., V) log left - log right where both are possible, else 0
    supported: Tensor  # (..., V) bool
    value: Tensor  # (...) the KL over the common support
    impossible: Tensor  # (...) bool: left puts mass where right has none, so that the KL is +inf


def _terms(left_logps: Tensor, right_logps: Tensor) -> _Terms:
    left_possible, right_possible = left_logps != -torch.inf, right_logps != -torch.inf
    supported = left_possible & right_possible
    left_probs = left_logps.exp()
    # Masked before the subtraction, not after: (-inf) - (-inf) is NaN and so would be its gradient.
    gap = left_logps.masked_fill(~supported, 0.0) - right_logps.masked_fill(~supported, 0.0)
    return _Terms(left_probs, gap, supported, (left_probs * gap).sum(-1), (left_possible & ~right_possible).any(-1))


def check_direction(direction: str) -> None:
    if direction not in ("reverse", "forward"):
        raise ValueError(
            f"direction={direction!r} is neither 'reverse' (KL(policy || reference)) nor 'forward' "
            "(KL(reference || policy))."
        )


def exact_kl(logits: Tensor, ref_logits: Tensor, direction: Direction = "reverse") -> Tensor:
    r"""Exact KL between the next-token distributions of policy and reference.

        reverse: KL(pi || ref) = sum_v pi(v|s) (log pi(v|s) - log ref(v|s))
        forward: KL(ref || pi) = sum_v ref(v|s) (log ref(v|s) - log pi(v|s))

    The gradient is that of the states as given (the partial gradient): how the policy's tokens change later states is
    not in it.

    Vocabulary rows that both rule out (-inf in both, as padded vocabularies have) contribute 0. Where the left
    distribution has mass and the right one has none, the value is +inf, because it is; the gradient is then that of
    the common support, so that it stays finite.

    Args:
        logits: (..., V) policy logits, already divided by the sampling temperature.
        ref_logits: (..., V) reference logits, same shape and temperature.
        direction: "reverse" or "forward".

    Returns:
        (...) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes differ or the direction is unknown.
    """
    check_direction(direction)
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)}: policy and reference "
            "must share positions and vocabulary."
        )
    policy_logps = F.log_softmax(at_least_float32(logits), dim=-1)
    ref_logps = F.log_softmax(at_least_float32(ref_logits), dim=-1)
    terms = _terms(policy_logps, ref_logps) if direction == "reverse" else _terms(ref_logps, policy_logps)
    return terms.value + torch.where(terms.impossible, torch.inf, 0.0)


def block_kl(
    logits: Tensor, ref_logits: Tensor, direction: Direction, *, is_finite: bool, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Value (N,) and gradient with respect to `logits` (N, V) of `exact_kl`, without autograd and its saved tensors.

    Args:
        logits: (N, V) policy logits, float32 or wider, left as they are.
        ref_logits: (N, V) reference logits, left as they are.
        direction: "reverse" or "forward".
        is_finite: neither holds -inf, so that the masks of the support (most of the time) can be left out.
        with_grad: False returns None for the gradient.
    """
    policy_logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if not is_finite:
        return _block_kl_on_support(policy_logps, ref_logps, direction, with_grad)
    if direction == "reverse":
        # d/dz_u sum_v p_v gap_v = p_u (gap_u - sum_v p_v gap_v)
        probs, gap = policy_logps.exp(), policy_logps.sub_(ref_logps)
        value = (probs * gap).sum(-1)
        return value, gap.sub_(value.unsqueeze(-1)).mul_(probs) if with_grad else None
    # d/dz_u sum_v q_v (log q_v - log p_v) = p_u - q_u
    ref_probs, gap = ref_logps.exp(), ref_logps.sub_(policy_logps)
    return gap.mul_(ref_probs).sum(-1), policy_logps.exp_().sub_(ref_probs) if with_grad else None


def _block_kl_on_support(
    policy_logps: Tensor, ref_logps: Tensor, direction: Direction, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`block_kl` where some log-probs are -inf. S is the common support."""
    reverse = direction == "reverse"
    probs, gap, supported, value, impossible = (
        _terms(policy_logps, ref_logps) if reverse else _terms(ref_logps, policy_logps)
    )
    reported = value + torch.where(impossible, torch.inf, 0.0)
    if not with_grad:
        return reported, None
    probs_on_support = probs * supported
    mass = probs_on_support.sum(-1, keepdim=True)
    if reverse:
        # d/dz_u sum_{v in S} p_v gap_v = p_u ([u in S] (gap_u + 1) - sum_{v in S} p_v (gap_v + 1))
        return reported, probs.mul_(gap.add_(1.0).mul_(supported).sub_(value.unsqueeze(-1) + mass))
    # d/dz_u sum_{v in S} q_v (log q_v - log p_v) = p_u sum_{v in S} q_v - [u in S] q_u
    return reported, policy_logps.exp().mul_(mass).sub_(probs_on_support)
