"""The KL as a reward: which future (or past) KL each token is charged for."""

from typing import Literal

import torch
from torch import Tensor

from .estimators import at_least_float32
from .masking import fill_masked

Credit = Literal["return_to_go", "future", "immediate", "sequence"]


def kl_credit(values: Tensor, mask: Tensor, *, credit: Credit = "return_to_go") -> Tensor:
    r"""KL that each token is charged for when the KL is a penalty in the reward (gamma = 1).

        return_to_go  c_t = sum_{s >= t} k_s    with k1: the whole sequence-KL gradient
        future        c_t = sum_{s >  t} k_s    with exact: the prefix term alone, the partner of an exact loss
        immediate     c_t = k_t                 with k1: the partial gradient, as k2 in the loss gives
        sequence      c_t = sum_s k_s           the same expectation as return_to_go, noisier

    The penalty enters a policy gradient as the advantage -beta * (c_t - baseline_t).

    Args:
        values: (B, T) KL values in nats per token; detached here, a penalty is not differentiated.
        mask: (B, T) tokens that count; sums run over them only.
        credit: see above.

    Returns:
        (B, T) nats, float32 or wider, 0 on masked positions.

    Raises:
        ValueError: unknown credit.

    Source: policy-gradient theorem (Sutton et al., 2000); "future" is its Rao-Blackwellised remainder when the token's
    own KL is already in the loss.
    """
    values = fill_masked(at_least_float32(values.detach()), mask)
    if credit == "immediate":
        return values
    if credit == "sequence":
        return fill_masked(values.sum(-1, keepdim=True).expand_as(values), mask)
    return_to_go = values.flip(-1).cumsum(-1).flip(-1)
    if credit == "return_to_go":
        return fill_masked(return_to_go, mask)
    if credit == "future":
        # Shifted rather than `return_to_go - values`, which is NaN when a value is infinite.
        return fill_masked(torch.nn.functional.pad(return_to_go[..., 1:], (0, 1)), mask)
    raise ValueError(f"credit={credit!r} is not one of return_to_go, future, immediate, sequence.")


def leave_one_out_baseline(credit: Tensor, mask: Tensor, group_size: int) -> Tensor:
    r"""Baseline of a token's KL credit: the mean credit at the same position in the *other* answers to its prompt.

        b_{i,t} = mean over j != i in i's group, with position t unmasked, of c_{j,t}; 0 where there is none

    It does not depend on answer i, so it leaves the expected gradient unchanged; a mean over the whole group would
    shrink it by (G-1)/G.

    Args:
        credit: (B, T) from `kl_credit`, B a multiple of `group_size`, the answers to one prompt adjacent.
        mask: (B, T) tokens that count.
        group_size: answers per prompt, G.

    Returns:
        (B, T) nats, 0 on masked positions.

    Raises:
        ValueError: B is not a multiple of `group_size`.

    Source: Kool, van Hoof and Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """
    rows, length = credit.shape
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size={group_size} must divide the number of answers, {rows}.")
    credit_BGT = fill_masked(credit, mask).view(-1, group_size, length)
    alive_BGT = mask.bool().view(-1, group_size, length)
    others_sum = credit_BGT.sum(1, keepdim=True) - credit_BGT
    others_count = alive_BGT.sum(1, keepdim=True) - alive_BGT.long()
    return fill_masked((others_sum / others_count.clamp(min=1)).view(rows, length), mask)
