"""The exact KL chunk by chunk over tokens, so that no (N, V) tensor of log-probs is ever held.

`chunked_exact_kl` takes hidden states and output heads, and recomputes the logits of each chunk in backward.
`chunked_exact_kl_from_logits` takes the policy's logits, where a model has made them anyway, and projects the reference
alone: one matrix product instead of six, for one gradient of the size of the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..estimators import at_least_float32
from ..exact import Direction, block_kl, check_direction
from ..logits import LogitTransform, check_transform

# Float32 logits that are held at once. On a CPU more buys no speed (docs/performance.md); on a GPU large products and
# few launches are better, by reasoning and not by measurement.
_CHUNK_BYTES = {"cpu": 128 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20
# Rows of a chunk that log-softmax, exp and the rest run over together: what a CPU's cache holds.
_BLOCK_BYTES = {"cpu": 2 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


class _Head(NamedTuple):
    """How hidden states become logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    transform: LogitTransform

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Fill the first rows of `out`, (chunk, V) in float32 or wider, and return them."""
        out = out[: hidden.size(0)]
        kind, weight, bias = hidden.device.type, self.weight, self.bias
        if hidden.dtype == weight.dtype == out.dtype and not torch.is_autocast_enabled(kind):
            torch.mm(hidden, weight.t(), out=out)
            if bias is not None:
                out.add_(bias)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
            out.copy_(F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)))
        return self.transform.apply_(out)


class _ChunkedExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, transform, direction, chunk_size):
        head, ref_head = _Head(weight, bias, transform), _Head(ref_weight, ref_bias, transform)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        value = hidden.new_empty(hidden.size(0), dtype=dtype)
        space, ref_space = _work_space(2, hidden.size(0), chunk_size, head)
        for rows in _slices(hidden.size(0), chunk_size):
            logits, ref_logits = head.logits(hidden[rows], space), ref_head.logits(ref_hidden[rows], ref_space)
            is_finite = _is_finite(logits, ref_logits)
            for block in _blocks(logits):
                value[rows][block] = block_kl(
                    logits[block], ref_logits[block], direction, is_finite=is_finite, with_grad=False
                )[0]
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        ctx.transform, ctx.direction, ctx.chunk_size = transform, direction, chunk_size
        # Backward must project in the precision that forward used, or the gradient belongs to other logits.
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        head, ref_head = _Head(weight, bias, ctx.transform), _Head(ref_weight, ref_bias, ctx.transform)
        kind, dtype, enabled = ctx.autocast
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: a bfloat16 sum would lose the small contributions.
        grad_weight = torch.zeros_like(weight, dtype=grad_value.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_value.dtype) if needs_bias else None
        space, ref_space = _work_space(2, hidden.size(0), ctx.chunk_size, head)
        for rows in _slices(hidden.size(0), ctx.chunk_size):
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                logits = head.logits(hidden[rows], space)
                ref_logits = ref_head.logits(ref_hidden[rows], ref_space)
            grad_logits = _grad_in_place(logits, ref_logits, grad_value[rows], head, ctx.direction)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits.to(weight.dtype) @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[rows].to(grad_logits.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


def _grad_in_place(logits: Tensor, ref_logits: Tensor, grad_value: Tensor, head: _Head, direction: Direction) -> Tensor:
    """Replace a chunk of logits by the gradient with respect to h W^T + b; (chunk, V)."""
    is_finite = _is_finite(logits, ref_logits)
    for block in _blocks(logits):
        _, grad = block_kl(logits[block], ref_logits[block], direction, is_finite=is_finite, with_grad=True)
        assert grad is not None
        logits[block] = head.transform.backward_(grad.mul_(grad_value[block].unsqueeze(-1)), logits[block])
    return logits


class _ChunkedExactKLFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows, ref_hidden, ref_head, direction, chunk_size, with_grad):
        value = logits.new_empty(rows.size(0), dtype=at_least_float32(logits[:0]).dtype)
        # The gradient for an upstream gradient of 1: forward has all that it takes, so the reference is projected once.
        grad = torch.zeros_like(logits) if with_grad else None
        (space,) = _work_space(1, rows.size(0), chunk_size, ref_head)
        for chunk in _slices(rows.size(0), chunk_size):
            ref_logits = ref_head.logits(ref_hidden[chunk], space)
            ref_is_finite = _is_finite(ref_logits)
            for block in _blocks(ref_logits):
                places = rows[chunk][block]
                policy_logits = at_least_float32(logits[places])
                if ref_head.transform.temperature != 1.0:
                    policy_logits = policy_logits.div_(ref_head.transform.temperature)
                is_finite = ref_is_finite and _is_finite(policy_logits)
                value[chunk][block], grad_block = block_kl(
                    policy_logits, ref_logits[block], direction, is_finite=is_finite, with_grad=with_grad
                )
                if grad is not None and grad_block is not None:
                    grad[places] = grad_block.div_(ref_head.transform.temperature).to(grad.dtype)
        ctx.grad, ctx.rows = grad, rows
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        grad, ctx.grad = ctx.grad, None  # scaled in place: a second tensor of the size of the logits is what this saves
        if grad is None:
            raise RuntimeError("chunked_exact_kl_from_logits can go backward once, also with retain_graph=True.")
        scale = grad_value.new_zeros(grad.size(0)).index_copy_(0, ctx.rows, grad_value)
        return grad.mul_(scale.to(grad.dtype).unsqueeze(-1)), *(None,) * 6


def _work_space(count: int, tokens: int, chunk_size: int, head: _Head) -> Tensor:
    """(count, chunk, V) for logits, made once: fresh pages from the system cost more than log-softmax."""
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    return head.weight.new_empty(count, min(tokens, chunk_size), head.weight.size(0), dtype=dtype)


def _is_finite(*logits: Tensor) -> bool:
    """Whether no logit is -inf. The smallest one costs a tenth of a comparison of all."""
    return all(tensor.numel() == 0 or bool(tensor.amin() > -torch.inf) for tensor in logits)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _blocks(logits: Tensor) -> list[slice]:
    block_bytes = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    return _slices(logits.size(0), max(1, block_bytes // (4 * max(1, logits.size(1)))))


def default_chunk_size(vocab_size: int, device: str = "cpu") -> int:
    """Tokens per chunk, at least 1: both models' logits in float32 then take 128 MiB on a CPU, 512 MiB elsewhere.

    `device` is a device type, for example "cpu" or "cuda".
    """
    return max(1, _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // (2 * 4 * vocab_size))


def chunked_exact_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: Direction = "reverse",
    chunk_size: int | None = None,
) -> Tensor:
    r"""`exact_kl` from hidden states and output heads, in O(chunk_size * V) memory.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
        out_n  = exact_kl(logits_n, ref_logits_n, direction)

    Value and gradients (of `hidden`, `weight`, `bias`) equal those of the dense form. The reference is a constant: no
    gradient reaches `ref_hidden`, `ref_weight` or `ref_bias`, even when they require it. Accumulates in float32 or
    wider. Differentiable once.

    Args:
        hidden: (N, H) last hidden states of the policy, one row per token that counts.
        weight: (V, H) output embedding of the policy; `bias` (V,) if it has one.
        ref_hidden: (N, H') the reference's hidden states at the same tokens.
        ref_weight: (V, H') the reference's output embedding; `ref_bias` (V,) if it has one.
        temperature: sampling temperature, applied last.
        logit_scale: factor on the raw logits (Cohere, Granite, ...).
        softcap: Gemma's final_logit_softcapping, or None.
        direction: "reverse" KL(pi || ref) or "forward" KL(ref || pi).
        chunk_size: tokens per chunk; None takes `default_chunk_size`.

    Returns:
        (N,) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    if hidden.dim() != 2 or ref_hidden.dim() != 2 or hidden.size(0) != ref_hidden.size(0):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)}: both must be (tokens, "
            "hidden size) with the same tokens."
        )
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    _check(weight.size(0), ref_weight, direction, transform, chunk_size)
    chunk_size = chunk_size or default_chunk_size(weight.size(0), weight.device.type)
    return _ChunkedExactKL.apply(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, transform, direction, chunk_size
    )


def chunked_exact_kl_from_logits(
    logits: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    mask: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: Direction = "reverse",
    chunk_size: int | None = None,
) -> Tensor:
    r"""`exact_kl` from the policy's logits, where they exist anyway, and the reference's hidden states and head.

        ref_logits = softcap * tanh(logit_scale * (h_ref W_ref^T + b_ref) / softcap)
        out_n      = exact_kl(logits_n / temperature, ref_logits_n / temperature, direction)

    Value and gradient (of `logits`) equal those of the dense form. Holds the gradient, one tensor of the size of
    `logits`, from forward to backward, and O(chunk_size * V) else; nothing without gradient. The reference is a
    constant. Differentiable once, and backward can be called once.

    Args:
        logits: (..., V) policy logits as the model returns them: scaled and capped, not divided by the temperature.
        ref_hidden: (N, H') the reference's hidden states at the tokens that count, in row-major order.
        ref_weight: (V, H') the reference's output embedding; `ref_bias` (V,) if it has one.
        mask: (...) the N rows of `logits` that count; None for all.
        temperature, direction, chunk_size: as in `chunked_exact_kl`.
        logit_scale, softcap: of the reference.

    Returns:
        (N,) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    mask = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    if mask.shape != logits.shape[:-1] or ref_hidden.dim() != 2 or ref_hidden.size(0) != rows.size(0):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, mask {tuple(mask.shape)} and ref_hidden "
            f"{tuple(ref_hidden.shape)}: ref_hidden must be (tokens, hidden size) with the same tokens."
        )
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    _check(logits.size(-1), ref_weight, direction, transform, chunk_size)
    head = _Head(ref_weight.detach(), ref_bias, transform)
    # Twice as many tokens as for two models: only the reference is projected.
    chunk_size = chunk_size or 2 * default_chunk_size(logits.size(-1), logits.device.type)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    return _ChunkedExactKLFromLogits.apply(
        logits.flatten(0, -2), rows, ref_hidden.detach(), head, direction, chunk_size, with_grad
    )


def _check(vocab: int, ref_weight: Tensor, direction: str, transform: LogitTransform, chunk_size: int | None) -> None:
    check_direction(direction)
    if vocab != ref_weight.size(0):
        raise ValueError(
            f"the policy has a vocabulary of {vocab} and the reference of {ref_weight.size(0)}: exact KL needs one "
            "vocabulary."
        )
    check_transform(transform)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to choose it from a memory budget.")
