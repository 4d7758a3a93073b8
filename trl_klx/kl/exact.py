"""The exact KL of two next-token distributions, summed over the whole vocabulary.

`exact_kl` takes logits and is the readable definition. `chunked_exact_kl` takes hidden states and output heads, and
never holds more than a few (chunk, V) tensors: it recomputes the logits of each chunk in backward.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .estimators import at_least_float32

Direction = Literal["reverse", "forward"]
# Forward and backward hold about six float32 tensors of (chunk, V) at their peak.
_CHUNK_BYTES = 256 * 2**20
_TENSORS_PER_CHUNK = 6


class _Terms(NamedTuple):
    """What value and gradient of one KL share. `left` is the distribution that the KL averages over."""

    left_probs: Tensor  # (..., V)
    gap: Tensor  # (..., V) log left - log right where both are possible, else 0
    supported: Tensor  # (..., V) bool
    value: Tensor  # (...) the KL over the common support
    impossible: Tensor  # (...) bool: left puts mass where right has none, so that the KL is +inf


def _terms(left_logps: Tensor, right_logps: Tensor) -> _Terms:
    left_possible, right_possible = left_logps != -torch.inf, right_logps != -torch.inf
    supported = left_possible & right_possible
    left_probs = left_logps.exp()
    # Masked before the subtraction, not after: (-inf) - (-inf) is NaN and so would be its gradient.
    gap = left_logps.masked_fill(~supported, 0.0) - right_logps.masked_fill(~supported, 0.0)
    return _Terms(left_probs, gap, supported, (left_probs * gap).sum(-1), (left_possible & ~right_possible).any(-1))


def _check_direction(direction: str) -> None:
    if direction not in ("reverse", "forward"):
        raise ValueError(
            f"direction={direction!r} is neither 'reverse' (KL(policy || reference)) nor 'forward' "
            "(KL(reference || policy))."
        )


def exact_kl(logits: Tensor, ref_logits: Tensor, direction: Direction = "reverse") -> Tensor:
    r"""Exact KL between the next-token distributions of policy and reference.

        reverse: KL(pi || ref) = sum_v pi(v|s) (log pi(v|s) - log ref(v|s))
        forward: KL(ref || pi) = sum_v ref(v|s) (log ref(v|s) - log pi(v|s))

    The gradient is that of the states as given (the partial gradient): how the policy's tokens change later states is
    not in it.

    Vocabulary rows that both rule out (-inf in both, as padded vocabularies have) contribute 0. Where the left
    distribution has mass and the right one has none, the value is +inf, because it is; the gradient is then that of
    the common support, so that it stays finite.

    Args:
        logits: (..., V) policy logits, already divided by the sampling temperature.
        ref_logits: (..., V) reference logits, same shape and temperature.
        direction: "reverse" or "forward".

    Returns:
        (...) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes differ or the direction is unknown.
    """
    _check_direction(direction)
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)}: policy and reference "
            "must share positions and vocabulary."
        )
    policy_logps = F.log_softmax(at_least_float32(logits), dim=-1)
    ref_logps = F.log_softmax(at_least_float32(ref_logits), dim=-1)
    terms = _terms(policy_logps, ref_logps) if direction == "reverse" else _terms(ref_logps, policy_logps)
    return terms.value + torch.where(terms.impossible, torch.inf, 0.0)


def _grad_logits(policy_logps: Tensor, ref_logps: Tensor, direction: str) -> Tensor:
    """Gradient of the KL with respect to the policy's logits, (N, V). In place where that is safe."""
    if direction == "reverse":
        # d/dz_u sum_{v in S} p_v gap_v = p_u ([u in S] (gap_u + 1) - sum_{v in S} p_v (gap_v + 1))
        probs, gap, supported, value, _ = _terms(policy_logps, ref_logps)
        mass = (probs * supported).sum(-1)
        return probs.mul_(gap.add_(1.0).mul_(supported).sub_((value + mass).unsqueeze(-1)))
    # d/dz_u sum_{v in S} q_v (log q_v - log p_v) = p_u sum_{v in S} q_v - [u in S] q_u
    ref_probs = ref_logps.exp().mul_(policy_logps != -torch.inf)
    return policy_logps.exp().mul_(ref_probs.sum(-1, keepdim=True)).sub_(ref_probs)


class _Head(NamedTuple):
    """How hidden states become logits: softcap(logit_scale * (h W^T + b)) / temperature."""

    logit_scale: float
    softcap: float | None
    temperature: float

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        logits = at_least_float32(F.linear(hidden.to(dtype), weight.to(dtype), bias))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature

    def grad_before(self, grad_logits: Tensor, logits: Tensor) -> Tensor:
        """Chain rule from the final logits back to h W^T + b."""
        factor = self.logit_scale / self.temperature
        if self.softcap is not None:
            grad_logits = grad_logits * (1 - (logits * (self.temperature / self.softcap)).square())
        return grad_logits if factor == 1.0 else grad_logits * factor


class _ChunkedExactKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, head, direction, chunk_size):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        value = hidden.new_empty(hidden.size(0), dtype=dtype)
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = head.logits(hidden[rows], weight, bias)
            ref_logits = head.logits(ref_hidden[rows], ref_weight, ref_bias)
            value[rows] = exact_kl(logits, ref_logits, direction)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        ctx.head, ctx.direction, ctx.chunk_size = head, direction, chunk_size
        # Backward must project in the precision that forward used, or the gradient belongs to other logits.
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        head, (kind, dtype, enabled) = ctx.head, ctx.autocast
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: a bfloat16 sum would lose the small contributions.
        grad_weight = torch.zeros_like(weight, dtype=grad_value.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_value.dtype) if needs_bias else None
        for rows in _chunks(hidden.size(0), ctx.chunk_size):
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                logits = head.logits(hidden[rows], weight, bias)
                ref_logits = head.logits(ref_hidden[rows], ref_weight, ref_bias)
            grad_logits = _grad_logits(logits.log_softmax(-1), ref_logits.log_softmax(-1), ctx.direction)
            grad_logits = head.grad_before(grad_logits.mul_(grad_value[rows].unsqueeze(-1)), logits)
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


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def default_chunk_size(vocab_size: int) -> int:
    """Tokens per chunk so that one chunk's float32 work space stays near 256 MiB (at least 1 token)."""
    return max(1, _CHUNK_BYTES // (4 * _TENSORS_PER_CHUNK * vocab_size))


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
        chunk_size: tokens per chunk; None chooses it so that a chunk's work space is about 256 MiB.

    Returns:
        (N,) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    _check_direction(direction)
    if hidden.dim() != 2 or ref_hidden.dim() != 2 or hidden.size(0) != ref_hidden.size(0):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)}: both must be (tokens, "
            "hidden size) with the same tokens."
        )
    if weight.size(0) != ref_weight.size(0):
        raise ValueError(
            f"the policy has a vocabulary of {weight.size(0)} and the reference of {ref_weight.size(0)}: exact KL "
            "needs one vocabulary."
        )
    if not temperature > 0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"temperature={temperature} and softcap={softcap} must be positive (softcap may be None).")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to choose it from a memory budget.")
    head = _Head(float(logit_scale), softcap, float(temperature))
    chunk_size = chunk_size or default_chunk_size(weight.size(0))
    return _ChunkedExactKL.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, head, direction, chunk_size)
