"""Log-probs, entropy and exact KL of tokens, from one projection of the policy and one of the reference.

The logits of a chunk of tokens are made, used by `backend` and overwritten. As few products as the maths needs:

    head                             in forward                     in backward
    no gradient wanted               policy, reference
    frozen                           policy, reference; hidden's    none: what arrives is one number per token, and
                                     gradient of each output        multiplies the gradients that forward has made
    trained                          policy, reference              policy, reference, hidden's and the head's gradient
    trained, weights of tokens known policy, reference, hidden's    none
    (the exact KL alone)             and the head's gradient

An entropy that is only logged costs no product: its gradient is made in backward, where one arrives.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exact import Direction
from ..logits import LogitTransform
from .backend import backend_for
from .products import add_mm_, mm, operand
from .rows import Rows, Statistics, Upstream


class TokenScores(NamedTuple):
    """Of N tokens; (N,) each, float32 or wider, None where it was not asked for."""

    logps: Tensor | None  # log-prob of each token, nats
    entropy: Tensor | None  # of the distribution that it was drawn from, nats
    exact: Tensor | None  # exact KL to the reference, nats


class Spec(NamedTuple):
    """What is computed, and how."""

    transform: LogitTransform
    direction: Direction
    chunk_size: int
    with_entropy: bool
    with_grad: bool
    dtype: torch.dtype  # in which the policy's head multiplies
    ref_dtype: torch.dtype  # in which the reference's does
    gathered: Callable[[], AbstractContextManager] = nullcontext


class Inputs(NamedTuple):
    """Policy and reference; `ref_hidden` and `ref_weight` are None without exact KL, `targets` without log-probs."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor | None  # (N,)
    ref_hidden: Tensor | None  # (N, H')
    ref_weight: Tensor | None  # (V, H')
    ref_bias: Tensor | None  # (V,)


class Head(NamedTuple):
    """What makes logits of hidden states, as operands of `mm`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "Head":
        return cls(operand(weight, dtype), None if bias is None else operand(bias, dtype))

    def project(self, hidden: Tensor, space: Tensor) -> Tensor:
        """The logits of (n, H) operands, in the first n rows of `space`."""
        logits = mm(hidden, self.weight.t(), out=space[: hidden.size(0)])
        return logits if self.bias is None else logits.add_(self.bias)


class _Chunk(NamedTuple):
    """Some tokens, with their logits."""

    rows: slice
    head: Head
    hidden: Tensor  # operand
    logits: Rows
    spare: Tensor  # for a gradient that must not take the place of the logits, or is of another dtype

    def space(self, *, is_last: bool) -> Tensor:
        """Where a gradient at the logits goes: to their own place, where they are not needed any more."""
        logits = self.logits.logits
        return logits if is_last and logits.dtype == self.head.weight.dtype else self.spare


def _chunks(of: Inputs, spec: Spec, *, gradients: int) -> Iterator[_Chunk]:
    """The tokens chunk by chunk; `gradients` at their logits will be made, one after the other."""
    head = Head.of(of.weight, of.bias, spec.dtype)
    wide = torch.promote_types(spec.dtype, torch.float32)
    # Made once: fresh pages from the system cost more than log-softmax.
    size, vocab = min(of.hidden.size(0), spec.chunk_size), of.weight.size(0)
    space = head.weight.new_empty(size, vocab, dtype=wide)
    in_place = 1 if head.weight.dtype == wide else 0
    spare = head.weight.new_empty(size if gradients > in_place else 0, vocab)
    ref_head, ref_space = None, space
    if of.ref_hidden is not None and of.ref_weight is not None:
        ref_head, ref_space = Head.of(of.ref_weight, of.ref_bias, spec.ref_dtype), torch.empty_like(space)
    for rows in slices(of.hidden.size(0), spec.chunk_size):
        hidden = operand(of.hidden[rows], spec.dtype)
        logits, ref_logits = head.project(hidden, space), None
        if ref_head is not None and of.ref_hidden is not None:
            ref_logits = ref_head.project(operand(of.ref_hidden[rows], spec.ref_dtype), ref_space)
        targets = None if of.targets is None else of.targets[rows]
        found = Rows(logits, ref_logits, targets, spec.transform, spec.transform, spec.direction)
        yield _Chunk(rows, head, hidden, found, spare[: hidden.size(0)])


class _Sums(NamedTuple):
    """Gradients of hidden states, (N, H), and head, (V, H) and (V,), float32 or wider; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, of: Inputs, needs: tuple[bool, ...], dtype: torch.dtype) -> "_Sums":
        return cls(
            torch.empty_like(of.hidden) if needs[0] else None,
            torch.zeros_like(of.weight, dtype=dtype) if needs[1] else None,
            None if of.bias is None or not needs[2] else torch.zeros_like(of.bias, dtype=dtype),
        )

    def add(self, chunk: _Chunk, grad: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> None:
        """Take the gradient at the logits of a chunk, (n, V); the head's share of each token times its weight, (N,)."""
        grad = operand(grad, dtype)
        if self.hidden is not None:
            self.hidden[chunk.rows] = mm(grad, chunk.head.weight)
        column = grad.new_ones(grad.size(0), 1) if weights is None else weights[chunk.rows].unsqueeze(-1)
        if self.weight is not None:
            hidden = chunk.hidden if weights is None else operand(chunk.hidden * column, dtype)
            add_mm_(self.weight, grad.t(), hidden)
        if self.bias is not None:
            add_mm_(self.bias.unsqueeze(-1), grad.t(), operand(column, dtype))


class _Scores(torch.autograd.Function):
    """(logps, entropy, exact) of `Inputs`; with `token_weights`, (N,), the exact KL alone."""

    @staticmethod
    def forward(ctx: Any, token_weights: Tensor | None, spec: Spec, *inputs: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        of = Inputs(*inputs)  # type: ignore[arg-type]
        wide = torch.promote_types(spec.dtype, torch.float32)
        needs = ctx.needs_input_grad[2:5] if spec.with_grad else (False,) * 3
        makes_gradients = any(needs) and (token_weights is not None or not any(needs[1:]))
        of_logps, of_exact = (
            _Sums.empty(of, needs, wide) if makes_gradients and tensor is not None else None
            for tensor in (of.targets, of.ref_hidden)
        )
        known = Statistics.empty(of.hidden.size(0), of.hidden, wide)
        for chunk in _chunks(of, spec, gradients=(of_logps is not None) + (of_exact is not None)):
            backend, found = backend_for(chunk.logits.logits), known.at(chunk.rows)
            grad = None if of_exact is None else chunk.space(is_last=of_logps is None)
            backend.score(chunk.logits, found, with_entropy=spec.with_entropy, grad=grad)
            if of_exact is not None and grad is not None:
                of_exact.add(chunk, grad, spec.dtype, token_weights)
            if of_logps is not None:
                grad = chunk.space(is_last=True)
                backend.gradient(chunk.logits, found, Upstream(logps=torch.ones_like(found.logz)), grad)
                of_logps.add(chunk, grad, spec.dtype)
        ctx.spec, ctx.needs = spec, needs
        ctx.makes_gradients, ctx.dtypes = makes_gradients, [None if t is None else t.dtype for t in of[:3]]
        is_read_again = any(needs) and (spec.with_entropy or not makes_gradients)
        nothing = (None, None, None)
        ctx.save_for_backward(
            *(of if is_read_again else (None,) * len(of)),
            known.table if is_read_again else None,
            *(of_logps or nothing)[:1],
            *(of_exact or nothing),
            token_weights,
        )
        return (
            None if of.targets is None else known.logps.clone(),
            known.entropy.clone() if spec.with_entropy else None,
            None if of.ref_hidden is None else known.exact.clone(),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        upstream, saved = Upstream(*grads), ctx.saved_tensors
        of, known = Inputs(*saved[:7]), Statistics(saved[7])
        of_logps, *of_exact, token_weights = saved[8:]
        found: list[Tensor | None] = [None, None, None]
        if ctx.makes_gradients:
            found[0] = _total([(upstream.logps, of_logps), (upstream.exact, of_exact[0])])
            if token_weights is not None and upstream.exact is not None:
                factor = _common_factor(upstream.exact, token_weights)
                found[1:] = [None if sum_ is None else sum_ * factor for sum_ in of_exact[1:]]
            upstream = Upstream(entropy=upstream.entropy)
        if any(grad is not None for grad in upstream):
            sums = _again(ctx.spec, ctx.needs, of, known, upstream)
            found = [_sum(old, new) for old, new in zip(found, sums, strict=True)]
        return (
            None,
            None,
            *(None if f is None else f.to(d) for f, d in zip(found, ctx.dtypes, strict=True)),
            *(None,) * 4,
        )


def _again(spec: Spec, needs: tuple[bool, ...], of: Inputs, known: Statistics, upstream: Upstream) -> _Sums:
    """The gradients for what arrives, from logits that are made again."""
    if upstream.exact is None:
        of = of._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
    with spec.gathered(), torch.autocast(of.hidden.device.type, enabled=False):
        sums = _Sums.empty(of, needs, known.logz.dtype)
        for chunk in _chunks(of, spec, gradients=1):
            grad, rows = chunk.space(is_last=True), chunk.rows
            backend = backend_for(chunk.logits.logits)
            backend.gradient(chunk.logits, known.at(rows), upstream.at(rows), grad)
            sums.add(chunk, grad, spec.dtype)
    return sums


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _total(parts: list[tuple[Tensor | None, Tensor | None]]) -> Tensor | None:
    """The sum of (N,) upstream gradients times (N, H) gradients; 0 for a token without upstream, whatever it holds."""
    total: Tensor | None = None
    for upstream, of_hidden in parts:
        if upstream is not None and of_hidden is not None:
            upstream = upstream.unsqueeze(-1)
            part = torch.where(upstream == 0, 0.0, upstream * of_hidden)
            total = part if total is None else total.add_(part)
    return total


def _common_factor(upstream: Tensor, token_weights: Tensor) -> Tensor:
    """The factor by which what arrives, (N,), is the token weights; NaN where there is none. Waits for no device."""
    weights = token_weights.to(upstream.dtype)
    squares = weights.square().sum()
    factor = torch.where(squares == 0, 0.0, (upstream * weights).sum() / squares)
    is_common = ((upstream - factor * weights).abs() <= 1e-3 * (factor * weights).abs() + 1e-30).all()
    return torch.where(is_common, factor, torch.nan)


def slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def scored(inputs: Inputs, spec: Spec, token_weights: Tensor | None = None) -> TokenScores:
    """Scores of tokens whose arguments have been checked."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return TokenScores(*_Scores.apply(token_weights, spec, *inputs))
