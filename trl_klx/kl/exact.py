"""The exact KL of two next-token distributions, summed over the whole vocabulary, from materialised logits.

The readable definition, differentiated by autograd. `chunked/` computes the same without holding the logits.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .estimators import at_least_float32

Direction = Literal["reverse", "forward"]


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
    left_logps, right_logps = (policy_logps, ref_logps) if direction == "reverse" else (ref_logps, policy_logps)
    left_possible, right_possible = left_logps != -torch.inf, right_logps != -torch.inf
    supported = left_possible & right_possible
    # Masked before the subtraction, not after: (-inf) - (-inf) is NaN and so would be its gradient.
    gap = left_logps.masked_fill(~supported, 0.0) - right_logps.masked_fill(~supported, 0.0)
    impossible = (left_possible & ~right_possible).any(-1)
    return (left_logps.exp() * gap).sum(-1) + torch.where(impossible, torch.inf, 0.0)
