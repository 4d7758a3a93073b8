"""Mean KL with a standard error that counts sequences, not tokens, as independent.

Tokens of one response share their prefix, so treating them as independent samples makes error bars too small. All that
is needed is a handful of sums over sequences; sums add up over micro-batches, processes and steps, so the pooled mean
and error are exact however the batch was split.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kl.masking import fill_masked

_COUNTS = 3  # sequences, sum of lengths, sum of squared lengths
_PER_ESTIMATOR = 3  # sum of S, of S^2, of S * n, with S the KL of a sequence and n its length


@dataclass(frozen=True)
class KLSummary:
    """Mean and standard error of one estimator, in nats per token and in nats per sequence."""

    per_token: float
    per_token_se: float
    per_sequence: float
    per_sequence_se: float


def sequence_moments(values: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Sums over the sequences of a batch, one float64 vector that may be added to others.

    Args:
        values: per-token KL in nats, (B, T), by estimator name; the order of the names fixes the layout.
        mask: (B, T) tokens that count; rows without any are no sequences and are left out.
    """
    dtype = torch.float64 if mask.device.type != "mps" else torch.float32
    length_B = mask.bool().sum(-1).to(dtype)
    rows = [(length_B > 0).to(dtype).sum(), length_B.sum(), length_B.square().sum()]
    for per_token in values.values():
        total_B = fill_masked(per_token.detach().to(dtype), mask).sum(-1)
        rows += [total_B.sum(), total_B.square().sum(), (total_B * length_B).sum()]
    return torch.stack(rows)


def summarise(moments: Tensor, names: tuple[str, ...]) -> dict[str, KLSummary]:
    r"""Turn summed moments into means and standard errors.

    With S_i the KL of sequence i and n_i its length, the token mean is the ratio r = sum S / sum n, and

        se(r)^2    = N / (N - 1) * sum (S_i - r n_i)^2 / (sum n)^2       (ratio estimator, linearised)
        se(mean)^2 = sum (S_i - mean)^2 / (N (N - 1))

    Source: Cochran, "Sampling Techniques" (1977), chapter 6. NaN where there are no sequences; a standard error needs
    two.
    """
    numbers = moments.tolist()
    sequences, tokens, tokens_squared = numbers[:_COUNTS]
    out = {}
    for index, name in enumerate(names):
        start = _COUNTS + _PER_ESTIMATOR * index
        total, total_squared, cross = numbers[start : start + _PER_ESTIMATOR]
        if sequences == 0:
            out[name] = KLSummary(math.nan, math.nan, math.nan, math.nan)
            continue
        ratio, mean = total / tokens, total / sequences
        ratio_residual = total_squared - 2 * ratio * cross + ratio * ratio * tokens_squared
        mean_residual = total_squared - sequences * mean * mean
        out[name] = KLSummary(
            ratio,
            _root(sequences / (sequences - 1) * ratio_residual) / tokens if sequences > 1 else math.nan,
            mean,
            _root(mean_residual / (sequences * (sequences - 1))) if sequences > 1 else math.nan,
        )
    return out


def _root(square: float) -> float:
    """Square root; rounding can leave a variance of zero slightly negative."""
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan
