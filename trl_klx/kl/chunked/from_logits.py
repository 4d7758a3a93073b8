"""`chunked_exact_kl_from_logits`: where a model has made the policy's logits anyway, only the reference is projected.

One matrix product, none in backward, for one gradient of the size of the logits.
"""

from typing import Any

import torch
from torch import Tensor

from ..exact import Direction
from ..logits import LogitTransform
from ..masking import places_of
from .backend import backend_for
from .checks import check_settings, check_vocabularies, default_chunk_size
from .products import compute_dtype, operand
from .rows import Rows, Statistics
from .scores import Head, Spec, slices


class _ExactKLFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Any, spec: Spec
    ) -> Tensor:
        ref_head = Head.of(ref_weight, ref_bias, spec.dtype)
        wide = torch.promote_types(spec.dtype, torch.float32)
        known = Statistics.empty(places.size(0), logits, torch.promote_types(logits.dtype, torch.float32))
        # The gradient for an upstream gradient of 1: forward has all that it takes, so the reference is projected once.
        grad = torch.zeros_like(logits) if spec.with_grad else None
        space = ref_head.weight.new_empty(min(places.size(0), spec.chunk_size), ref_weight.size(0), dtype=wide)
        policy_transform = LogitTransform(temperature=spec.transform.temperature)
        for rows in slices(places.size(0), spec.chunk_size):
            ref_logits = ref_head.project(operand(ref_hidden[rows], spec.dtype), space)
            chunk = Rows(
                logits, ref_logits, None, policy_transform, spec.transform, spec.direction, places=places[rows]
            )
            backend_for(logits).score(chunk, known.at(rows), with_entropy=False, grad=grad)
        ctx.grad, ctx.places = grad, places
        return known.exact.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None  # scaled in place: a second tensor of the size of the logits is what this saves
        if grad is None:
            raise RuntimeError("chunked_exact_kl_from_logits can go backward once, also with retain_graph=True.")
        scale = grad_value.new_zeros(grad.size(0)).index_copy_(0, ctx.places, grad_value)
        return grad.mul_(scale.to(grad.dtype).unsqueeze(-1)), *(None,) * 5


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

    Value and gradient (of `logits`) equal those of the dense form. It is as exact as `logits` are: make them by
    `float32_linear` where the model runs in half precision. Holds the gradient, one tensor of the size of `logits`,
    from forward to backward, and O(chunk_size * V) else; nothing without gradient. The reference is a constant.
    Differentiable once, and backward can be called once.

    Args:
        logits: (..., V) policy logits as the model returns them: scaled and capped, not divided by the temperature.
        ref_hidden: (N, H') the reference's hidden states at the tokens that count, in row-major order.
        ref_weight: (V, H') the reference's output embedding; `ref_bias` (V,) if it has one.
        mask: (...) the N rows of `logits` that count; None for all. On a GPU it is not checked that they are N.
        temperature, direction, chunk_size: as in `chunked_exact_kl`.
        logit_scale, softcap: of the reference.

    Returns:
        (N,) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    _check_tokens(logits, ref_hidden, mask)
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    check_settings(direction, transform, chunk_size)
    check_vocabularies(logits.size(-1), ref_weight)
    # Twice as many tokens as for two models: only the reference is projected.
    chunk_size = chunk_size or 2 * default_chunk_size(logits.size(-1), logits.device.type)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    dtype = compute_dtype(ref_hidden, ref_weight)
    spec = Spec(transform, direction, chunk_size, False, with_grad, dtype, dtype)
    if mask is None:
        places = torch.arange(ref_hidden.size(0), device=logits.device)
    else:  # how many count is known: nothing waits for the device
        places = places_of(mask.bool(), ref_hidden.size(0))
    with torch.autocast(logits.device.type, enabled=False):
        return _ExactKLFromLogits.apply(
            logits.flatten(0, -2), places, ref_hidden.detach(), ref_weight.detach(), ref_bias, spec
        )


def _check_tokens(logits: Tensor, ref_hidden: Tensor, mask: Tensor | None) -> None:
    """Whether both have one number of tokens; that of a mask is counted where no device has to be waited for."""
    shape, tokens = logits.shape[:-1], ref_hidden.size(0)
    if mask is None:
        is_right = shape.numel() == tokens
    else:
        is_right = mask.shape == shape and (mask.is_cuda or int(mask.count_nonzero()) == tokens)
    if ref_hidden.dim() != 2 or not is_right:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, ref_hidden {tuple(ref_hidden.shape)} and mask "
            f"{None if mask is None else tuple(mask.shape)}: ref_hidden must be (tokens, hidden size) with the same "
            "tokens."
        )
