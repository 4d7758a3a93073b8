"""Mean KL with a standard error that counts prompts, not answers or tokens, as independent (`uncertainty`).

The answers to one prompt share the prompt, whichever steps they are read in. So one row per prompt is kept, the sums
over its answers, until the means are taken of all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kl.masking import fill_masked
from .uncertainty import ratio


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


def sequence_count(sums: Tensor) -> int:
    """Sequences that rows of `prompt_sums` hold."""
    return int(sums[:, 1].sum())


def summarise(sums: Tensor, names: tuple[str, ...]) -> dict[str, KLSummary]:
    """Means and standard errors by estimator, in the order of the layout, from rows of `prompt_sums`."""
    _, sequences, tokens, *totals = sums.cpu().double().numpy().T
    out = {}
    for name, total in zip(names, totals, strict=True):
        per_token, per_sequence = ratio(total, tokens), ratio(total, sequences)
        out[name] = KLSummary(per_token.mean, per_token.se, per_sequence.mean, per_sequence.se)
    return out
