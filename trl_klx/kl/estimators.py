"""One number per sampled token: the k1, k2 and k3 estimators of the reverse KL, KL(policy || reference).

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
SAMPLED_ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def log_ratio(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio l = log pi(a|s) - log ref(a|s) of each sampled token, in nats and in at least float32.

    A token that both distributions rule out (both log-probs -inf) has ratio 1, hence l = 0. Raises ValueError when the
    shapes differ.
    """
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"logps has shape {tuple(logps.shape)} and ref_logps {tuple(ref_logps.shape)}: score the same tokens "
            "under the policy and under the reference."
        )
    logps, ref_logps = at_least_float32(logps), at_least_float32(ref_logps)
    both_impossible = (logps == -torch.inf) & (ref_logps == -torch.inf)
    return logps.masked_fill(both_impossible, 0.0) - ref_logps.masked_fill(both_impossible, 0.0)


def at_least_float32(values: Tensor) -> Tensor:
    """Upcast half precision: k3 of l = 1e-2 is exactly 0 in bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Estimator = "k3") -> Tensor:
    r"""Per-token estimate of the reverse KL, KL(pi || ref), from tokens sampled from pi.

    With l = log pi(a|s) - log ref(a|s):

        k1 = l            unbiased, any sign, noisy near the reference
        k2 = l^2 / 2      biased (about a quarter of mu^2 on a Gaussian shifted by mu), never negative
        k3 = e^-l - 1 + l unbiased, never negative, noisier than k1 beyond about 0.63 nats

    Plain autograd goes through the result. Mind what that gradient is in expectation: 0 for k1, the partial reverse-KL
    gradient for k2, the gradient of the *forward* KL(ref || pi) for k3 (see `kl_loss` for the corrected form).

    Args:
        logps: log-probs of the sampled tokens under the policy, any shape, nats.
        ref_logps: the same tokens under the reference, same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        Values in nats per token, shape of `logps`, float32 or wider. A token that the reference rules out
        (`ref_logps` = -inf) has the value +inf, as the KL itself has.

    Raises:
        ValueError: the shapes differ or the estimator is unknown.

    Source: Schulman (2020).
    """
    ratio = log_ratio(logps, ref_logps)
    if estimator == "k1":
        return ratio
    if estimator == "k2":
        return ratio.square() / 2
    if estimator == "k3":
        # expm1 keeps small values exact: exp(-l) - 1 + l is 0 in float32 from |l| = 1e-4 down. At l = -inf (a token
        # the policy rules out) the sum would be inf - inf; its limit is +inf.
        impossible = ratio == -torch.inf
        finite = ratio.masked_fill(impossible, 0.0)
        return (torch.expm1(-finite) + finite).masked_fill(impossible, torch.inf)
    raise ValueError(
        f"estimator={estimator!r} is not one of {', '.join(SAMPLED_ESTIMATORS)}; for the full-vocabulary KL use "
        "exact_kl or chunked_exact_kl."
    )
