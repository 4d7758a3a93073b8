"""Masking as an argument: every function gives exactly what the unmasked subset would give.

Shape legend, used in the whole package: B sequences, T positions, N tokens in a flat list, H hidden size, V vocabulary.
A mask is bool or 0/1 of shape (B, T); True marks tokens the policy produced and that count. Masked positions may hold
anything, NaN and infinities included: they are removed with `torch.where` before any arithmetic, because `0 * inf` and
`0 * nan` are NaN, in the value and in the gradient.
"""

import torch
from torch import Tensor


def fill_masked(values: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """Return `values` with `fill` wherever `mask` is false; no gradient reaches the masked positions. Any shape."""
    # `new_full` writes on the device; a tensor made of `fill` would be copied there, and the host would wait for it.
    return torch.where(mask.bool(), values, values.new_full((), fill))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the unmasked values over `dim` (over everything when None)."""
    kept = fill_masked(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the unmasked values over `dim`; 0 where nothing is unmasked (an empty response), never NaN."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def places_of(mask: Tensor, count: int) -> Tensor:
    """(count,) flat indices of the true elements of a bool mask, which are `count`. Any shape.

    `nonzero` would wait for the device to learn how many there are, and on CUDA `nonzero_static` is recent.
    """
    return (~mask).flatten().to(torch.uint8).argsort(stable=True)[:count]


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last unmasked position of each row, -1 for an empty row. (B, T) -> (B,), int64.

    The usual `mask.cumsum(1).argmax(1)` is wrong beyond 256 tokens when the mask is bfloat16 (beyond 2048 in float16),
    where the cumulative sum stops growing, and returns 0 for an empty row.
    """
    positions = torch.arange(mask.size(-1), device=mask.device)
    return torch.where(mask.bool(), positions, -1).amax(-1)
