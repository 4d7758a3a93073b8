"""The switch: Triton kernels compute what `rows` defines on a GPU, the same sums in torch do elsewhere."""

import torch
from torch import Tensor

from . import torch_rows
from .rows import Backend

triton_rows: Backend | None
try:
    from . import triton_rows
except ImportError:  # no Triton: a build of torch for CPUs, or Windows
    triton_rows = None


def backend_for(logits: Tensor) -> Backend:
    """Triton for what CUDA holds in float32 or less, torch for the rest."""
    return triton_rows if triton_rows is not None and logits.is_cuda and logits.dtype != torch.float64 else torch_rows
