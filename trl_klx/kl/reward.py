"""The KL as a reward: which future (or past) KL each token is charged for."""

from typing import Literal

import torch
from torch import Tensor

from .estimators import at_least_float32
from .importance import weight_products
from .masking import fill_masked

Credit = Literal["return_to_go", "future", "immediate", "sequence"]


def kl_credit(
    values: Tensor, mask: Tensor, *, credit: Credit = "return_to_go", weights: Tensor | None = None
) -> Tensor:
    r"""KL that each token is charged for when the KL is a penalty in the reward (gamma = 1).

        return_to_go  c_t = sum_{s >= t} k_s    with k1: the whole sequence-KL gradient
        future        c_t = sum_{s >  t} k_s    with exact: the prefix term alone, the partner of an exact loss
        immediate     c_t = k_t                 with k1: the partial gradient, as k2 in the loss gives
        sequence      c_t = sum_s k_s           the same expectation as return_to_go, noisier

    The penalty enters a policy gradient as the advantage -beta * (c_t - baseline_t).

    On the answers of another policy mu, with w_t = pi/mu of a token and W_{a:b} the product of those from a to b, the
    credit carries per-decision weights:

        return_to_go  c_t = W_{<t} sum_{s >= t} W_{t+1:s} k_s
        future        c_t = W_{<t} sum_{s >  t} W_{t+1:s-1} k_s   no weight beyond the state that k_s belongs to
        immediate     c_t = W_{<t} k_t
        sequence      c_t = W_{<t} W_{t+1:T} sum_s k_s

    In a surrogate with the gradient w_t c_t g_t, whose values k are the *present* policy's, each has the expectation
    that it has on-policy, however far mu is. "future" takes the exact KL of a state; for a sampled estimate, which
    depends on the token, give `weights * values` as its values. A baseline b_t that does not depend on the answer
    enters as W_{<t} b_t.

    Args:
        values: (B, T) KL values in nats per token; detached here, a penalty is not differentiated.
        mask: (B, T) tokens that count; sums run over them only.
        credit: see above.
        weights: (B, T) ratios pi/mu of the tokens, not negative, truncated or not; None on-policy, where all are 1.

    Returns:
        (B, T) nats, float32 or wider, 0 on masked positions; with weights also where the token's own is 0.

    Raises:
        ValueError: unknown credit, or weights of another shape than values.

    Source: policy-gradient theorem (Sutton et al., 2000); "future" is its Rao-Blackwellised remainder when the token's
    own KL is already in the loss; per-decision weights: Precup et al. (2000).
    """
    values = fill_masked(at_least_float32(values.detach()), mask)
    if weights is not None:
        if weights.shape != values.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, values {tuple(values.shape)}: one per token.")
        weights = fill_masked(at_least_float32(weights.detach()), mask)
        return torch.where(weights > 0, _weighted_credit(values, mask, credit, weights) / weights, 0.0)
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


def _weighted_credit(values: Tensor, mask: Tensor, credit: Credit, weights: Tensor) -> Tensor:
    """(B, T) w_t c_t: with its own weight every product begins with the answer: all are one cumulative sum."""
    if credit == "sequence":
        products, values = weight_products(weights, mask, level="sequence"), values.sum(-1, keepdim=True)
    else:
        products = weight_products(weights, mask, level="prefix", before=credit == "future")
    # 0 also where the value is infinite: what the policy never does does not count.
    weighted = torch.where(products == 0, 0.0, products * values)
    return weighted if credit == "sequence" else kl_credit(weighted, mask, credit=credit)


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
