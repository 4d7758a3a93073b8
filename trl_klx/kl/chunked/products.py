"""Matrix products of half-precision tensors with float32 results."""

import torch
from torch import Tensor


def float32_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(hidden, weight, bias)`, whose result is not rounded to half precision: (..., H), (V, H) -> (..., V).

    Inputs are taken in the precision that autocast would take them in, and products added up in float32 or wider.
    Differentiable in all three.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        out = hidden.to(dtype).float() @ weight.to(dtype).float().t()
        return out if bias is None else out + bias.to(dtype).float()
