"""Mean KL with a standard error that counts prompts, not answers or tokens, as independent.

Tokens of one answer share their prefix, and the answers to one prompt share the prompt, whichever steps they are read
in: counting either as independent makes error bars too small. So one row per prompt is kept, the sums over its answers,
until the means are taken of all of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kl.masking import fill_masked

_COUNTS = 5  # prompts, sequences, tokens, and the sums over prompts of sequences^2 and tokens^2
_PER_ESTIMATOR = 4  # sums over prompts of S, S^2, S * tokens, S * sequences, with S the KL of all answers to a prompt


@dataclass(frozen=True)
class KLSummary:
    """Mean and standard error of one estimator, in nats per token and in nats per sequence."""

    per_token: float
    per_token_se: float
    per_sequence: float
    per_sequence_se: float


def sequence_rows(values: dict[str, Tensor], mask: Tensor, prompts: Tensor) -> Tensor:
    """One float64 row per sequence, (B, 3 + estimators): prompt, 1 if it counts, tokens, KL by estimator.

    Args:
        values: per-token KL in nats, (B, T), by estimator name; the order of the names fixes the layout.
        mask: (B, T) tokens that count; a sequence without any does not count.
        prompts: (B,) integers, equal for the answers to one prompt.
    """
    dtype = torch.float64 if mask.device.type != "mps" else torch.float32
    tokens_B = mask.bool().sum(-1).to(dtype)
    totals = [fill_masked(per_token.detach().to(dtype), mask).sum(-1) for per_token in values.values()]
    return torch.stack([prompts.to(dtype), (tokens_B > 0).to(dtype), tokens_B, *totals], dim=-1)


def prompt_sums(rows: Tensor) -> Tensor:
    """One row per prompt, (C, 3 + estimators): prompt, sequences, tokens, KL by estimator, summed over its rows.

    Rows may be of sequences (`sequence_rows`, gathered from all processes), or sums themselves, of several steps.
    """
    rows = rows[rows[:, 1] > 0]
    prompts, prompt_of_row = rows[:, 0].unique(return_inverse=True)
    sums = rows.new_zeros(len(prompts), rows.size(1) - 1).index_add_(0, prompt_of_row, rows[:, 1:])
    return torch.cat([prompts.unsqueeze(1), sums], dim=1)


def prompt_moments(rows: Tensor) -> Tensor:
    """Sums over prompts, of rows of sequences or of `prompt_sums`: all that means and errors are made of."""
    sums = prompt_sums(rows)
    sizes, totals = sums[:, 1:3], sums[:, 3:]
    products = torch.stack([totals, totals.square(), totals * sizes[:, 1:], totals * sizes[:, :1]], dim=-1)
    counts = [rows.new_tensor([len(sums)]), sizes.sum(0), sizes.square().sum(0)]
    return torch.cat([*counts, products.sum(0).flatten()])


def sequence_count(moments: Tensor) -> int:
    """Sequences that the moments hold."""
    return int(moments[1])


def summarise(moments: Tensor, names: tuple[str, ...]) -> dict[str, KLSummary]:
    r"""Turn summed moments into means and standard errors.

    Both means are ratios, r = sum_c S_c / sum_c x_c, over the prompts c, with S_c the KL of all answers to c and x_c
    their tokens or their number; linearised, with C prompts,

        se(r)^2 = C / (C - 1) * sum_c (S_c - r x_c)^2 / (sum_c x_c)^2

    Source: Cochran, "Sampling Techniques" (1977), chapters 6 and 9. NaN where nothing counts; an error needs 2 prompts.
    """
    prompts, sequences, tokens, sequences_squared, tokens_squared = moments[:_COUNTS].tolist()
    out = {}
    for index, name in enumerate(names):
        start = _COUNTS + _PER_ESTIMATOR * index
        total, squared, by_tokens, by_sequences = moments[start : start + _PER_ESTIMATOR].tolist()
        out[name] = KLSummary(
            *_ratio(prompts, total, squared, tokens, tokens_squared, by_tokens),
            *_ratio(prompts, total, squared, sequences, sequences_squared, by_sequences),
        )
    return out


def _ratio(
    prompts: float, total: float, squared: float, size: float, size_squared: float, cross: float
) -> tuple[float, float]:
    if size == 0:
        return math.nan, math.nan
    ratio = total / size
    residual = squared - 2 * ratio * cross + ratio * ratio * size_squared
    if prompts < 2 or not math.isfinite(residual):
        return ratio, math.nan
    # Rounding can leave a variance of zero slightly negative.
    return ratio, math.sqrt(max(residual, 0.0) * prompts / (prompts - 1)) / size
