"""`token_scores` and `chunked_exact_kl`: what hidden states and output heads give, in O(chunk_size * V) memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..exact import Direction
from ..logits import LogitTransform
from .checks import check_hidden, check_settings, check_vocabularies, default_chunk_size
from .products import compute_dtype
from .scores import Inputs, Spec, TokenScores, scored


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: Direction = "reverse",
    with_entropy: bool = False,
    chunk_size: int | None = None,
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> TokenScores:
    r"""Log-probs, entropy and exact KL of tokens, from one projection of the policy and one of the reference.

        logits  = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
        logps   = log_softmax(logits)[targets]
        entropy = -sum_v p_v log p_v
        exact   = exact_kl(logits, ref_logits, direction)

    Values and gradients (of `hidden`, `weight`, `bias`) equal those of the dense form. The reference is a constant.
    Half-precision inputs, and float32 ones under autocast, are multiplied in half precision with float32 results, and
    everything behind is float32 or wider. Differentiable once.

    Args:
        hidden: (N, H) last hidden states of the policy, one row per token that counts.
        weight: (V, H) output embedding of the policy; `bias` (V,) if it has one.
        targets: (N,) the tokens that followed; None for no log-probs.
        ref_hidden: (N, H') the reference's hidden states at the same tokens; None for no exact KL.
        ref_weight: (V, H') the reference's output embedding; `ref_bias` (V,) if it has one.
        temperature: sampling temperature, applied last, to both.
        logit_scale: factor on the raw logits (Cohere, Granite, ...).
        softcap: Gemma's final_logit_softcapping, or None.
        direction: "reverse" KL(pi || ref) or "forward" KL(ref || pi).
        with_entropy: whether the entropy is wanted. One that is only logged costs no product.
        chunk_size: tokens per chunk; None takes `default_chunk_size`.
        gathered: entered around what backward does with a trained head, for whoever shards its weights.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    check_settings(direction, transform, chunk_size)
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together: give both for the exact KL, or neither.")
    if ref_hidden is not None and ref_weight is not None:
        check_hidden(hidden, ref_hidden)
        check_vocabularies(weight.size(0), ref_weight)
        ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and hidden {tuple(hidden.shape)}: give one token per row."
        )
    inputs = Inputs(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias)
    return scored(inputs, _spec(inputs, transform, direction, chunk_size, with_entropy, gathered))


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
    token_weights: Tensor | None = None,
) -> Tensor:
    r"""`exact_kl` from hidden states and output heads, in O(chunk_size * V) memory.

        logits = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
        out_n  = exact_kl(logits_n, ref_logits_n, direction)

    The exact KL of `token_scores`, which has the precision, the gradients and the other arguments.

    Args:
        token_weights: (N,) what each token's KL weighs in the loss, up to a factor common to all: forward then makes
            the gradient of a trained head, too, and backward makes no product. A loss with other weights gets NaN as
            the head's gradient.

    Returns:
        (N,) KL in nats per token, float32 or wider.

    Raises:
        ValueError: shapes disagree, the vocabularies differ, or a scalar is out of range.
    """
    check_hidden(hidden, ref_hidden)
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    check_settings(direction, transform, chunk_size)
    check_vocabularies(weight.size(0), ref_weight)
    if token_weights is not None and token_weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_weights has shape {tuple(token_weights.shape)} and hidden {tuple(hidden.shape)}: give one weight "
            "per row."
        )
    inputs = Inputs(hidden, weight, bias, None, ref_hidden.detach(), ref_weight.detach(), ref_bias)
    exact = scored(inputs, _spec(inputs, transform, direction, chunk_size), token_weights).exact
    assert exact is not None
    return exact


def _spec(
    inputs: Inputs,
    transform: LogitTransform,
    direction: Direction,
    chunk_size: int | None,
    with_entropy: bool = False,
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> Spec:
    weight, with_grad = inputs.weight, torch.is_grad_enabled()
    if chunk_size is None:
        is_trained = with_grad and any(part is not None and part.requires_grad for part in (weight, inputs.bias))
        chunk_size = default_chunk_size(weight.size(0), weight.device.type, is_trained=is_trained)
    dtype = ref_dtype = compute_dtype(inputs.hidden, weight)
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        ref_dtype = compute_dtype(inputs.ref_hidden, inputs.ref_weight)
    if torch.float64 in (dtype, ref_dtype):  # the results of both have one width
        dtype = ref_dtype = torch.float64
    return Spec(transform, direction, chunk_size, with_entropy, with_grad, dtype, ref_dtype, gathered)
