"""The sums over rows of logits in torch: for CPUs and float64, and the twin that the Triton kernels are held against.

See `rows` for the equations. Rows are taken in blocks that a CPU's cache holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..estimators import at_least_float32
from .rows import Rows, Statistics, Upstream

# Rows that log-softmax, exp and the rest run over together.
_BLOCK_BYTES = {"cpu": 2 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


class _Support(NamedTuple):
    """Which tokens distributions can give."""

    common: Tensor  # (n, V) bool: both
    is_lost: Tensor  # (n,) bool: right lacks a token of left
    is_equal: Tensor  # (n,) bool


class _Pair(NamedTuple):
    """Both distributions of a block, (n, V). `gap` is log left - log right on the common support, and 0 elsewhere."""

    probs: Tensor
    ref_probs: Tensor
    gap: Tensor
    support: "_Support | None"  # None: all tokens, of both


def score(rows: Rows, out: Statistics, *, with_entropy: bool, grad: Tensor | None) -> None:
    for block in _blocks(rows):
        logits = _policy_logits(rows, block)
        logps = logits.log_softmax(-1)
        if rows.targets is not None:
            out.logps[block] = logps.gather(-1, rows.targets[block].unsqueeze(-1)).squeeze(-1)
        if with_entropy:
            out.entropy[block] = _entropy(logps, logps.exp())
        if rows.ref_logits is None:
            continue
        pair = _pair(rows, logps, block)
        mean, mass, out.exact[block] = _averages(rows, pair)
        out.mean[block], out.mass[block] = mean, mass
        if grad is not None:
            made = _exact_gradient(rows, pair, mean.unsqueeze(-1), mass.unsqueeze(-1))
            _store(grad, rows, block, rows.transform.backward_(made, logits))


def gradient(rows: Rows, known: Statistics, upstream: Upstream, out: Tensor) -> None:
    for block in _blocks(rows):
        logits = _policy_logits(rows, block)
        logps = logits.log_softmax(-1)
        found, probs = torch.zeros_like(logits), logps.exp()
        if upstream.logps is not None and rows.targets is not None:
            grad, targets = upstream.logps[block].unsqueeze(-1), rows.targets[block].unsqueeze(-1)
            found.addcmul_(probs, grad, value=-1).scatter_add_(-1, targets, grad)
        if upstream.entropy is not None:
            surprise = torch.where(probs == 0, 0.0, logps + known.entropy[block].unsqueeze(-1))
            found.addcmul_(surprise.mul_(probs), upstream.entropy[block].unsqueeze(-1), value=-1)
        if upstream.exact is not None:
            pair, (mean, mass) = _pair(rows, logps, block), (known.mean[block], known.mass[block])
            of_exact = _exact_gradient(rows, pair, mean.unsqueeze(-1), mass.unsqueeze(-1))
            found.addcmul_(of_exact, upstream.exact[block].unsqueeze(-1))
        _store(out, rows, block, rows.transform.backward_(found, logits))


def _blocks(rows: Rows) -> list[slice]:
    block_bytes = _BLOCK_BYTES.get(rows.logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    size, total = max(1, block_bytes // (4 * max(1, rows.logits.size(1)))), rows.tokens
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _policy_logits(rows: Rows, block: slice) -> Tensor:
    raw = rows.logits[block] if rows.places is None else rows.logits[rows.places[block]]
    return rows.transform.apply(at_least_float32(raw))


def _store(out: Tensor, rows: Rows, block: slice, values: Tensor) -> None:
    out[block if rows.places is None else rows.places[block]] = values.to(out.dtype)


def _entropy(logps: Tensor, probs: Tensor) -> Tensor:
    return -torch.where(probs == 0, 0.0, probs * logps).sum(-1)


def _pair(rows: Rows, logps: Tensor, block: slice) -> _Pair:
    """Uses `logps` up, (n, V) of the policy."""
    assert rows.ref_logits is not None
    ref_logps = rows.ref_transform.apply(at_least_float32(rows.ref_logits[block])).log_softmax(-1)
    left, right = (logps, ref_logps) if rows.is_reverse else (ref_logps, logps)
    if _is_finite(logps, ref_logps):
        probs = logps.exp()
        gap = logps.sub_(ref_logps) if rows.is_reverse else logps.neg_().add_(ref_logps)
        return _Pair(probs, ref_logps.exp_(), gap, None)
    left_possible, right_possible = left != -torch.inf, right != -torch.inf
    common = left_possible & right_possible
    support = _Support(common, (left_possible & ~right_possible).any(-1), (left_possible == right_possible).all(-1))
    # Masked before the subtraction: (-inf) - (-inf) is NaN.
    gap = left.masked_fill(~common, 0.0) - right.masked_fill(~common, 0.0)
    return _Pair(logps.exp(), ref_logps.exp(), gap, support)


def _is_finite(*logps: Tensor) -> bool:
    """Whether none is -inf, so that the masks of the support (most of the time) can be left out.

    The smallest one costs a tenth of a comparison of all. It waits for the device: this is not the code of GPUs.
    """
    return all(tensor.numel() == 0 or bool(tensor.amin() > -torch.inf) for tensor in logps)


def _averages(rows: Rows, pair: _Pair) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) mean, mass and exact KL."""
    left, right = (pair.probs, pair.ref_probs) if rows.is_reverse else (pair.ref_probs, pair.probs)
    terms = left * pair.gap
    mean = terms.sum(-1)
    if pair.support is None:
        return mean, torch.ones_like(mean), mean + (right.sum(-1) - left.sum(-1))
    common, is_lost, is_equal = pair.support
    mass = (left * common).sum(-1)
    # Both sum to 1 over the common support where that is all of it.
    exact = torch.where(is_equal, terms.sub_(left).add_(right).mul_(common).sum(-1), mean)
    return mean, mass, torch.where(is_lost, torch.inf, exact)


def _exact_gradient(rows: Rows, pair: _Pair, mean: Tensor, mass: Tensor) -> Tensor:
    """(n, V) gradient of the exact KL at the final logits; uses `pair` up. `mean` and `mass` are (n, 1)."""
    probs, ref_probs, gap, support = pair
    if support is None:
        return gap.sub_(mean).mul_(probs) if rows.is_reverse else probs.sub_(ref_probs)
    if rows.is_reverse:
        return probs.mul_(gap.add_(1.0).mul_(support.common).sub_(mean + mass))
    return probs.mul_(mass).sub_(ref_probs.mul_(support.common))
