"""The KL as a loss: a chosen value with the gradient that belongs to the reverse KL."""

import torch
from torch import Tensor

from .estimators import Estimator, kl_estimate, log_ratio


class _ValueWithSlope(torch.autograd.Function):
    """Returns `value`; backward sends `slope` times the incoming gradient to `logps`.

    A straight-through sum, `value + slope * (logps - logps.detach())`, would be `inf * 0 = nan` where a slope is
    infinite; this is not.
    """

    @staticmethod
    def forward(ctx, logps, value, slope):
        ctx.save_for_backward(slope)
        ctx.dtype = logps.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        (slope,) = ctx.saved_tensors
        # A masked token has gradient 0 and may have an infinite slope.
        return torch.where(grad_value == 0, 0.0, grad_value * slope).to(ctx.dtype), None, None


def value_with_slope(source: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` (constant) whose gradient with respect to `source` is `slope` (constant), all of one shape."""
    return _ValueWithSlope.apply(source, value.detach(), slope.detach())


def kl_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    estimator: Estimator = "k3",
    weights: Tensor | None = None,
    value_cap: float | None = None,
) -> Tensor:
    r"""Per-token KL loss from sampled tokens. Reverse KL, KL(pi || ref), with the gradient that the table gives.

    With l = log pi(a|s) - log ref(a|s) and g = grad log pi(a|s):

        weights=None    literal autograd through the estimator. Expected gradient on-policy: k1 zero; k2 the partial
                        reverse-KL gradient P; k3 the gradient F of the forward KL(ref || pi).
        weights=w       value w * estimator, gradient sg(w) * l * g for every estimator: P on the sampler's states
                        (token weights) or on the policy's (prefix and sequence weights). Pass ones on-policy.

    The weighted form is exactly the gradient of `ratio * k3` and of DeepSeek-V3.2's unbiased KL, since
    grad(w k3) = sg(w) grad(k2) = w l g, and it stays right under a cap on w, where `clip(ratio) * k3` turns into the
    forward KL on the clipped tokens.

    A token that one side rules out (|l| = inf) reports its infinite value and sends no gradient.

    Args:
        logps: log-probs of the sampled tokens under the policy, any shape, nats; carries the gradient.
        ref_logps: the same tokens under the reference; constant.
        estimator: "k1", "k2" or "k3"; with weights it sets the value only.
        weights: detached importance weights of the same shape (`importance_weights`), or None.
        value_cap: bound on the value, nats per token; the gradient is that of the unbounded value. (A clamp inside
            autograd would remove the pull exactly where the policy has drifted furthest.)

    Returns:
        Loss in nats per token, shape of `logps`, float32 or wider.

    Raises:
        ValueError: shapes differ, unknown estimator, or a value_cap that is not positive.

    Source: Schulman (2020); DeepSeek-V3.2 (arXiv:2512.02556), section 3.1; Tang and Munos, "On a few pitfalls in KL
    divergence gradient estimation for RL" (arXiv:2506.09477).
    """
    if value_cap is not None and not value_cap > 0:
        raise ValueError(f"value_cap={value_cap} must be positive, or None for no bound.")
    if weights is not None and weights.shape != logps.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, logps {tuple(logps.shape)}: give one per token.")
    # A constant reference: autograd through it would train the reference, or cancel the loss when they share weights.
    ratio = log_ratio(logps.detach(), ref_logps.detach())
    value = kl_estimate(logps.detach(), ref_logps.detach(), estimator)
    if weights is None:
        slope = _literal_slope(ratio, estimator)
    else:
        slope = weights.detach() * ratio
        value = weights.detach() * value
    slope = torch.where(ratio.isinf(), 0.0, slope)
    if value_cap is not None:
        value = value.clamp(max=value_cap)
    return value_with_slope(logps, value, slope)


def _literal_slope(ratio: Tensor, estimator: Estimator) -> Tensor:
    """d estimator / d l, which autograd through `kl_estimate` gives."""
    if estimator == "k1":
        return torch.ones_like(ratio)
    return ratio if estimator == "k2" else -torch.expm1(-ratio)
