"""How two models' next-token distributions differ, token by token: pure functions of tensors.

`token_statistics` is the definition, on materialised logits; `chunked_token_statistics` is the same from hidden states,
a chunk of tokens at a time, so that no (N, V) tensor is ever held.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kl.chunked.checks import default_chunk_size
from ...kl.estimators import at_least_float32

TOP = 5
# Logits of one model that run through softmax and the rest together: with their temporaries, a CPU's cache.
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20

Projection = Callable[[Tensor], Tensor]


class TokenStatistics(NamedTuple):
    """Per token, N of them; p is the policy's next-token distribution, r the reference's, a the token; nats."""

    kl_policy_ref: Tensor  # (N,) KL(p || r) over the whole vocabulary
    kl_ref_policy: Tensor  # (N,) KL(r || p)
    js: Tensor  # (N,) Jensen-Shannon divergence, at most log 2
    tv: Tensor  # (N,) total variation, 0 to 1
    log_ratio: Tensor  # (N,) log p(a) - log r(a)
    entropy_policy: Tensor  # (N,)
    entropy_ref: Tensor  # (N,)
    logp_policy: Tensor  # (N,) log p(a)
    logp_ref: Tensor  # (N,) log r(a)
    prob_policy: Tensor  # (N,) p(a)
    prob_ref: Tensor  # (N,) r(a)
    rank_policy: Tensor  # (N,) int32, 1 for the most probable token; 1 + how many are more probable than a
    rank_ref: Tensor  # (N,) int32
    top_ids_policy: Tensor  # (N, 5) int32, the most probable tokens, the first first
    top_probs_policy: Tensor  # (N, 5)
    top_ids_ref: Tensor  # (N, 5) int32
    top_probs_ref: Tensor  # (N, 5)


def token_statistics(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> TokenStatistics:
    r"""Compare the next-token distributions p = softmax(logits) and r = softmax(ref_logits), row by row.

        KL(p || r) = sum_v [p_v log(p_v / r_v) - (p_v - r_v)]
        KL(r || p) = sum_v [r_v log(r_v / p_v) - (r_v - p_v)]
        JS         = 1/2 KL(p || m) + 1/2 KL(r || m),  m = (p + r) / 2
        TV         = 1/2 sum_v |p_v - r_v|
        H(p)       = - sum_v p_v log p_v

    The differences p_v - r_v sum to 0. With them no term of a KL is negative, so that rounding in either softmax, which
    shifts a whole row of log-probs, enters in second order: KLs of near-equal models stay true in float32. Equal logits
    give exactly 0.

    Vocabulary rows that both rule out (-inf in both) contribute 0. Where one has mass and the other none, the KL from
    the one to the other is +inf, because it is.

    Args:
        logits: (N, V) of the policy, divided by the temperature.
        ref_logits: (N, V) of the reference, likewise.
        tokens: (N,) the token that followed at each position, an index into the vocabulary.

    Raises:
        ValueError: the shapes disagree.

    Source: Lin, "Divergence measures based on the Shannon entropy" (1991), for JS; the form of the KL is Csiszar's
    (the generalised, or Bregman, KL).
    """
    if logits.dim() != 2 or logits.shape != ref_logits.shape or tokens.shape != logits.shape[:1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, ref_logits {tuple(ref_logits.shape)} and tokens "
            f"{tuple(tokens.shape)}: give (N, V) twice and (N,)."
        )
    logps, ref_logps = (at_least_float32(values).log_softmax(-1) for values in (logits, ref_logits))
    probs, ref_probs = logps.exp(), ref_logps.exp()
    finite = bool(torch.minimum(logps.amin(), ref_logps.amin()) > -torch.inf) if len(tokens) else True
    own, other = (logps, ref_logps) if finite else _on_support(logps, ref_logps)
    gap, difference = own - other, probs - ref_probs
    forward, backward = (probs * gap).sub_(difference).sum(-1), difference.addcmul(ref_probs, gap, value=-1).sum(-1)
    if not finite:
        forward = forward.masked_fill(((logps != -torch.inf) & (ref_logps == -torch.inf)).any(-1), torch.inf)
        backward = backward.masked_fill(((ref_logps != -torch.inf) & (logps == -torch.inf)).any(-1), torch.inf)
    chosen, ref_chosen = (values.gather(-1, tokens.unsqueeze(-1)) for values in (logps, ref_logps))
    top, ref_top = (values.topk(min(TOP, values.size(-1)), dim=-1) for values in (logps, ref_logps))
    both_impossible = (chosen == -torch.inf) & (ref_chosen == -torch.inf)
    return TokenStatistics(
        kl_policy_ref=forward.clamp_min_(0.0),  # rounding can make it negative
        kl_ref_policy=backward.clamp_min_(0.0),
        js=_jensen_shannon(probs, ref_probs, difference),
        tv=difference.abs().sum(-1) / 2,
        log_ratio=(chosen - ref_chosen).masked_fill(both_impossible, 0.0).squeeze(-1),
        entropy_policy=-(probs * own).sum(-1),
        entropy_ref=-(ref_probs * other).sum(-1),
        logp_policy=chosen.squeeze(-1),
        logp_ref=ref_chosen.squeeze(-1),
        prob_policy=chosen.squeeze(-1).exp(),
        prob_ref=ref_chosen.squeeze(-1).exp(),
        rank_policy=_rank(logps, chosen),
        rank_ref=_rank(ref_logps, ref_chosen),
        top_ids_policy=top.indices.int(),
        top_probs_policy=top.values.exp(),
        top_ids_ref=ref_top.indices.int(),
        top_probs_ref=ref_top.values.exp(),
    )


def _on_support(logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs with 0 for -inf, which would make 0 * inf; its factor is 0, or the sum is set to inf afterwards."""
    return logps.masked_fill(logps == -torch.inf, 0.0), ref_logps.masked_fill(ref_logps == -torch.inf, 0.0)


def _jensen_shannon(probs: Tensor, ref_probs: Tensor, difference: Tensor) -> Tensor:
    """With x = (p - r) / (p + r): p / m = 1 + x and r / m = 1 - x, which neither overflows nor cancels."""
    share = difference / (probs + ref_probs).clamp_min_(torch.finfo(probs.dtype).tiny)
    # Short of 1, where a log is -inf and its factor 0 or as good as 0. (xlog1py would do, at four times the cost.)
    share.clamp_(-1 + torch.finfo(probs.dtype).eps, 1 - torch.finfo(probs.dtype).eps)
    terms = share.log1p().mul_(probs).addcmul_(share.neg_().log1p_(), ref_probs)
    return terms.sum(-1).div_(2).clamp_min_(0.0)


def _rank(logps: Tensor, chosen: Tensor) -> Tensor:
    # Into a float tensor, because adding up booleans is three times slower on a CPU.
    return torch.gt(logps, chosen, out=torch.empty_like(logps)).sum(-1).int().add_(1)


def chunked_token_statistics(
    project: Projection,
    hidden: Tensor,
    ref_project: Projection,
    ref_hidden: Tensor,
    tokens: Tensor,
    *,
    vocab_size: int,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """`token_statistics` from hidden states, in O(chunk_size * V) memory.

    Args:
        project: makes the policy's logits, (n, V), from its last hidden states, (n, H).
        hidden: (N, H) the policy's hidden states at the positions that predict `tokens`.
        ref_project: makes the reference's logits from its hidden states.
        ref_hidden: (N, H') the reference's hidden states at the same positions.
        tokens: (N,) the tokens that followed.
        vocab_size: V, from which the default chunk follows.
        chunk_size: tokens per chunk; None takes `trl_klx.kl.chunked.checks.default_chunk_size`.
    """
    kind = tokens.device.type
    chunk_size = chunk_size or default_chunk_size(vocab_size, kind)
    block = max(1, _BLOCK_BYTES.get(kind, _BLOCK_BYTES_ELSEWHERE) // (4 * vocab_size))
    columns: list[Tensor] = []
    for start in range(0, len(tokens), chunk_size):
        logits, ref_logits = (
            head(states[start : start + chunk_size]) for head, states in ((project, hidden), (ref_project, ref_hidden))
        )
        for first in range(0, len(logits), block):
            rows = slice(first, first + block)
            place = slice(start + first, start + min(first + block, len(logits)))
            found = token_statistics(logits[rows], ref_logits[rows], tokens[place])
            # Small results kept between large blocks that come and go would splinter the heap, and it would grow.
            columns = columns or [column.new_empty(len(tokens), *column.shape[1:]) for column in found]
            for column, values in zip(columns, found, strict=True):
                column[place] = values
        del logits, ref_logits  # or the next chunk would be made beside this one
    return TokenStatistics(*columns)
