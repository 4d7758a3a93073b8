"""Importance weights pi / mu that correct a KL measured on tokens that another policy, mu, has sampled."""

import math
from typing import Literal

import torch
from torch import Tensor

from .estimators import at_least_float32, kl_estimate, log_ratio
from .masking import fill_masked, masked_sum

WeightLevel = Literal["token", "prefix", "sequence"]
WeightMode = Literal["truncate", "mask"]

_LARGEST_LOG_WEIGHT = 60.0  # of a product, in nats: sums of many stay within float32
_LOWEST_LOG_WEIGHT = -30.0  # of a token: from there down w log w - w + 1 is 1


def importance_weights(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    mode: WeightMode = "truncate",
    cap: float | None = None,
) -> Tensor:
    r"""Detached importance weights of the policy pi over the sampler mu.

        token:     w_t = pi(a_t|s_t) / mu(a_t|s_t)      corrects the action, leaves the states mu's
        prefix:    W_{1:t} = prod_{s<=t} w_s            corrects actions and states
        sequence:  W = prod_s w_s, for every t          the same expectation as prefix, noisier

    Products run over unmasked tokens only. There is no geometric mean (GSPO's weight): on a KL it is never right.

    Args:
        logps: (B, T) log-probs of the sampled tokens under the policy being trained, nats.
        sampler_logps: (B, T) log-probs under the policy that really sampled them (the inference engine's, where it
            reports them). NaN marks a token it could not score: its w_t is 1.
        mask: (B, T) tokens that count.
        level: "token", "prefix" or "sequence".
        mode: "truncate" replaces w by min(w, cap); "mask" drops weights above the cap (0).
        cap: largest weight, or None for no bound.

    Returns:
        (B, T) weights without gradient, float32 or wider; 0 on masked positions.

    Raises:
        ValueError: unknown level or mode, a cap that is not positive, or mode "mask" without a cap.

    Source: Precup et al. (2000) for the per-decision (prefix) weight; Ionides (2008), "Truncated Importance
    Sampling", for the cap; DeepSeek-V3.2 (arXiv:2512.02556), section 3.1, for the token weight on the KL.
    """
    log_weights = _log_weights(logps.detach(), sampler_logps.detach(), mask, level)
    return bounded_weights(fill_masked(log_weights.exp(), mask), mode=mode, cap=cap)


def bounded_weights(weights: Tensor, *, mode: WeightMode = "truncate", cap: float | None = None) -> Tensor:
    """Untruncated weights of `importance_weights`, with its `mode` and `cap` applied; raises as it does."""
    if cap is not None and not cap > 0:
        raise ValueError(f"cap={cap} must be positive, or None for no bound.")
    if cap is None:
        if mode == "mask":
            raise ValueError("mode='mask' drops the weights above a cap: give cap a number, or use mode='truncate'.")
        return weights
    if mode == "truncate":
        return weights.clamp(max=cap)
    if mode == "mask":
        return weights.masked_fill(weights > cap, 0.0)
    raise ValueError(f"mode={mode!r} is neither 'truncate' nor 'mask'.")


def weight_products(token_weights: Tensor, mask: Tensor, *, level: WeightLevel, before: bool = False) -> Tensor:
    r"""Products of the weights of single tokens, bounded beforehand or not.

        token: w_t        prefix: W_{1:t} = prod_{s<=t} w_s        sequence: W = prod_s w_s, for every t

    Args:
        token_weights: (B, T) pi/mu of each token, without gradient.
        mask: (B, T) tokens that count; products run over them only.
        level: see above.
        before: prefix only: W_{<t}, without the token's own weight: that of the state in which it was chosen.

    Returns:
        (B, T), 0 on masked positions; at most e^60, so that answers of any length keep finite sums.
    """
    if level == "token":
        return fill_masked(token_weights, mask)
    logs = fill_masked(at_least_float32(token_weights.detach()), mask, 1.0).log()
    if level == "sequence":
        products = logs.sum(-1, keepdim=True).expand_as(logs)
    else:
        products = logs.cumsum(-1)
        if before:
            products = torch.nn.functional.pad(products[..., :-1], (1, 0))
    return fill_masked(products.clamp(max=_LARGEST_LOG_WEIGHT).exp(), mask)


def _log_weights(logps: Tensor, sampler_logps: Tensor, mask: Tensor, level: str) -> Tensor:
    log_ratios = at_least_float32(logps) - at_least_float32(sampler_logps)
    log_ratios = fill_masked(log_ratios, mask.bool() & ~sampler_logps.isnan())
    if level == "token":
        return log_ratios
    if level == "prefix":
        return log_ratios.cumsum(-1)
    if level == "sequence":
        return log_ratios.sum(-1, keepdim=True).expand_as(log_ratios)
    raise ValueError(f"level={level!r} is not one of token, prefix, sequence.")


def kl_to_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    r"""Per-token estimate of KL(pi || mu), policy to sampler, from tokens that the sampler mu chose.

        w_t log w_t - w_t + 1,   w_t = pi(a_t|s_t) / mu(a_t|s_t)

    It is k3 of pi against mu, times w_t. Unbiased for KL(pi(.|s_t) || mu(.|s_t)) in the states that mu visited, and
    never negative. (The KL of whole answers would weigh each state by the weights before it.) No gradient is meant to
    go through it.

    Args:
        logps: log-probs of the sampled tokens under the policy, any shape, nats.
        sampler_logps: the same tokens under the policy that sampled them, same shape.

    Returns:
        Values in nats per token, shape of `logps`, float32 or wider; 1 for a token that the policy rules out.

    Raises:
        ValueError: the shapes differ.

    Source: Schulman (2020), for the k3 that is weighted.
    """
    ratio = log_ratio(logps, sampler_logps).clamp(min=_LOWEST_LOG_WEIGHT)
    return ratio.exp() * kl_estimate(ratio, torch.zeros_like(ratio), "k3")


def answers_kept(
    token_weights: Tensor, mask: Tensor, *, geometric_cap: float | None = None, veto: float | None = None
) -> Tensor:
    r"""Which answers count, by how far the policy is from what sampled them.

        geometric_cap c:  1/c <= (prod_t w_t)^{1/T} <= c       the answer as a whole
        veto v:           w_t >= v for every token              no token that the policy would hardly choose

    Leaving answers out biases the expectation; unlike a truncated weight, it also leaves out their pull.

    Args:
        token_weights: (B, T) pi/mu of each token, without a bound.
        mask: (B, T) tokens that count.
        geometric_cap: largest geometric mean, more than 1; None for no bound.
        veto: smallest weight of a token, below 1; None for none.

    Returns:
        (B, 1) bool.
    """
    logs = fill_masked(at_least_float32(token_weights.detach()), mask, 1.0).log()
    kept = torch.ones_like(logs[..., :1], dtype=torch.bool)
    if geometric_cap is not None:
        mean = logs.sum(-1, keepdim=True) / mask.bool().sum(-1, keepdim=True).clamp(min=1)
        kept = kept & (mean.abs() <= math.log(geometric_cap))
    if veto is not None:
        kept = kept & (logs.amin(-1, keepdim=True) >= math.log(veto))
    return kept


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    r"""Effective sample size as a fraction of the samples, (sum w)^2 / (n sum w^2), over everything unmasked.

    1 when all weights are equal, 1/n when one weight carries everything. Give it *untruncated* weights: a cap hides
    the very imbalance it measures. Scale-free, and computed so that large weights do not overflow. Returns a scalar;
    1 when nothing is unmasked. Source: Kong (1992).
    """
    weights = fill_masked(at_least_float32(weights), mask)
    largest = weights.amax() if weights.numel() else weights.new_zeros(())
    has_any = largest > 0
    scaled = weights / torch.where(has_any, largest, 1.0)
    scaled = torch.where(largest.isinf(), weights.isinf().to(weights.dtype), scaled)
    squares = mask.bool().sum() * masked_sum(scaled.square(), mask)
    return torch.where(has_any, masked_sum(scaled, mask).square() / squares, 1.0)
