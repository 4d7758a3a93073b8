"""Matrix products whose results are not rounded to half precision.

A logit between 16 and 32 has a spacing of 0.125 in bfloat16, more than policy and reference differ by near each other.
The arithmetic adds products up in float32 anyway, so that a float32 result costs memory traffic and no time in the
products. CUDA has such products of half-precision matrices; elsewhere the same numbers are multiplied in float32.
"""

from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_HAS_FLOAT32_RESULTS = torch.__version__ >= "2.8" and torch.version.cuda is not None  # torch.mm(..., out_dtype=...)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision in which an output head multiplies here: autocast's where it is on, else the wider of both."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` in `dtype`, as `mm` takes it: half precision as float32 where no product of it has a float32 result."""
    matrix = matrix.to(dtype)
    is_native = matrix.is_cuda and _HAS_FLOAT32_RESULTS
    return matrix.float() if dtype in _HALF and not is_native else matrix


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """(n, k) @ (k, m) of two operands, in float32 or wider."""
    if left.dtype in _HALF:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def add_mm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add (n, k) @ (k, m) to `total`, float32 or wider: a half-precision sum would lose small contributions."""
    if left.dtype in _HALF:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype = dtype
        out = mm(operand(hidden, dtype), operand(weight, dtype).t())
        return out if bias is None else out.add_(bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rounded = operand(grad, ctx.dtype)
        return (
            mm(rounded, operand(weight, ctx.dtype)).to(hidden.dtype) if needs_hidden else None,
            mm(rounded.t(), operand(hidden, ctx.dtype)).to(weight.dtype) if needs_weight else None,
            grad.sum(0).to(bias.dtype) if needs_bias else None,
            None,
        )


def float32_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, whose result is not rounded to half precision.

    Inputs are taken in the precision that autocast would take them in; products are added up in float32 or wider, and
    stay so. Differentiable once, in all three.

    Args:
        hidden: (..., H).
        weight: (V, H); `bias` (V,).

    Returns:
        (..., V), float32 or wider.
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        out = _Float32Linear.apply(hidden.flatten(0, -2), weight, bias, dtype)
    return out.unflatten(0, hidden.shape[:-1])
