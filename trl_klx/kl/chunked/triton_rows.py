"""The sums over rows of logits as Triton kernels, one program per row: see `rows` for the equations.

A row is passed over twice, for normalisers and means, then for the KL and its gradient. Nothing waits for the host.
`torch_rows` is the twin. In capitals: pointers, and what is known when a kernel is compiled.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, Statistics, Upstream

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _final(raw, SCALE: tl.constexpr, CAP: tl.constexpr, INVERSE_T: tl.constexpr):
    # LogitTransform
    x = raw * SCALE
    if CAP != 0.0:
        x = CAP * (2 * tl.sigmoid(2 * x / CAP) - 1)  # CAP * tanh(x / CAP)
    return x * INVERSE_T


@triton.jit
def _logits(row, v, vocab, SCALE: tl.constexpr, CAP: tl.constexpr, INVERSE_T: tl.constexpr):
    raw = tl.load(row + v, mask=v < vocab, other=0.0).to(tl.float32)
    return raw, tl.where(v < vocab, _final(raw, SCALE, CAP, INVERSE_T), -float("inf"))


@triton.jit
def _shifted(top, x):
    # The largest logit so far, what sums up to it are worth under it, and exp(x) under it.
    new = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(new == -float("inf"), 0.0, new)
    return new, tl.exp(top - shift), tl.exp(x - shift)


@triton.jit
def _excess(d):
    # exp(-d) - 1 + d of |d| < 1/4 by its series, which does not cancel; to the last bits of float32
    return d * d * (0.5 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d * (1 / 720 - d / 5040)))))


@triton.jit
def _count(condition):
    return tl.sum(tl.where(condition, 1.0, 0.0), 0)


@triton.jit
def _statistics(
    Z,
    R,
    TARGETS,
    PLACES,
    KNOWN,
    field,  # elements from one field of KNOWN to the next
    vocab,
    z_stride,
    r_stride,
    Z_SCALE: tl.constexpr,
    Z_CAP: tl.constexpr,
    R_SCALE: tl.constexpr,
    R_CAP: tl.constexpr,
    INVERSE_T: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + z_stride * (tl.load(PLACES + row).to(tl.int64) if HAS_PLACES else row)
    known = KNOWN + row
    z_top = -float("inf")
    r_top = -float("inf")
    z_sum, z_mean, r_sum = 0.0, 0.0, 0.0
    gaps, mass, lost, unequal = 0.0, 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        _, z = _logits(z_row, v, vocab, Z_SCALE, Z_CAP, INVERSE_T)
        z_top, z_keep, p = _shifted(z_top, z)
        z_sum = z_sum * z_keep + tl.sum(p, 0)
        if HAS_ENTROPY:
            z_mean = z_mean * z_keep + tl.sum(tl.where(p == 0, 0.0, p * z), 0)
        if HAS_REF:
            _, r = _logits(R + row * r_stride, v, vocab, R_SCALE, R_CAP, INVERSE_T)
            r_top, r_keep, q = _shifted(r_top, r)
            r_sum = r_sum * r_keep + tl.sum(q, 0)
            left, left_keep = (p, z_keep) if REVERSE else (q, r_keep)
            common = (z != -float("inf")) & (r != -float("inf"))
            gap = tl.where(common, z - r if REVERSE else r - z, 0.0)
            gaps = gaps * left_keep + tl.sum(left * gap, 0)
            mass = mass * left_keep + tl.sum(tl.where(common, left, 0.0), 0)
            lost += _count(((z if REVERSE else r) != -float("inf")) & (common == 0))
            unequal += _count((z == -float("inf")) != (r == -float("inf")))
    logz = z_top + tl.log(z_sum)
    tl.store(known, logz)
    if HAS_TARGETS:
        raw = tl.load(z_row + tl.load(TARGETS + row).to(tl.int64)).to(tl.float32)
        tl.store(known + field, _final(raw, Z_SCALE, Z_CAP, INVERSE_T) - logz)
    if HAS_ENTROPY:
        tl.store(known + 2 * field, logz - z_mean / z_sum)
    if HAS_REF:
        ref_logz = r_top + tl.log(r_sum)
        left_sum = z_sum if REVERSE else r_sum
        mass = tl.where(lost == 0, 1.0, mass / left_sum)
        mean = gaps / left_sum - mass * (logz - ref_logz if REVERSE else ref_logz - logz)
        tl.store(known + 3 * field, ref_logz)
        tl.store(known + 4 * field, mean)
        tl.store(known + 5 * field, mass)
        # 0 for `_gradient` to fill in: with unequal supports its sum is not the KL.
        tl.store(known + 6 * field, tl.where(lost > 0, float("inf"), tl.where(unequal > 0, mean, 0.0)))


@triton.jit
def _exact_terms(z, r, logz, ref_logz, mean, mass, REVERSE: tl.constexpr):
    # Of a block: terms of the exact KL, and its gradient at the final logits.
    p, q = tl.exp(z - logz), tl.exp(r - ref_logz)
    common = (z != -float("inf")) & (r != -float("inf"))
    shift = logz - ref_logz
    d = tl.where(common, (z - r) - shift if REVERSE else (r - z) + shift, 0.0)
    left, right = (p, q) if REVERSE else (q, p)
    is_near = common & (tl.abs(d) < 0.25)
    terms = tl.where(is_near, left * _excess(d), tl.where(common, left * d - left + right, 0.0))
    lost = mass - 1.0
    if REVERSE:
        grad = p * (tl.where(common, d, -1.0) - (mean + lost))
    else:
        far = p * mass - tl.where(common, q, 0.0)
        grad = tl.where(is_near, q * ((_excess(d) - d) * mass + lost), far)
    return terms, grad


@triton.jit
def _gradient(
    Z,
    R,
    OUT,
    TARGETS,
    PLACES,
    KNOWN,
    OF_LOGPS,
    OF_ENTROPY,
    OF_EXACT,
    field,
    vocab,
    z_stride,
    r_stride,
    out_stride,
    Z_SCALE: tl.constexpr,
    Z_CAP: tl.constexpr,
    R_SCALE: tl.constexpr,
    R_CAP: tl.constexpr,
    INVERSE_T: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LOGPS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    IS_FIRST: tl.constexpr,  # the exact KL itself is wanted, and its gradient for an upstream of 1
    HAS_OUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(PLACES + row).to(tl.int64) if HAS_PLACES else row
    known = KNOWN + row
    logz = tl.load(known)
    if HAS_EXACT:
        ref_logz, mean, mass = tl.load(known + 3 * field), tl.load(known + 4 * field), tl.load(known + 5 * field)
        of_exact = 1.0 if IS_FIRST else tl.load(OF_EXACT + row).to(tl.float32)
    exact = 0.0
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        raw, z = _logits(Z + place * z_stride, v, vocab, Z_SCALE, Z_CAP, INVERSE_T)
        p = tl.exp(z - logz)
        grad = tl.zeros((BLOCK,), tl.float32)
        if HAS_EXACT:
            _, r = _logits(R + row * r_stride, v, vocab, R_SCALE, R_CAP, INVERSE_T)
            terms, of_z = _exact_terms(z, r, logz, ref_logz, mean, mass, REVERSE)
            exact += tl.sum(terms, 0)
            grad += of_exact * of_z
        if HAS_LOGPS:
            grad += tl.load(OF_LOGPS + row).to(tl.float32) * (tl.where(v == tl.load(TARGETS + row), 1.0, 0.0) - p)
        if HAS_ENTROPY:
            surprise = tl.where(p == 0, 0.0, p * (z - logz + tl.load(known + 2 * field)))
            grad -= tl.load(OF_ENTROPY + row).to(tl.float32) * surprise
        if HAS_OUT:
            grad = grad * (Z_SCALE * INVERSE_T)
            if Z_CAP != 0.0:
                tanh = 2 * tl.sigmoid(2 * raw * Z_SCALE / Z_CAP) - 1
                grad = grad * (1 - tanh * tanh)
            tl.store(OUT + place * out_stride + v, grad.to(OUT.dtype.element_ty), mask=v < vocab)
    if IS_FIRST:
        found = tl.load(known + 6 * field)
        tl.store(known + 6 * field, tl.where(found == 0, exact, found))


def score(rows: Rows, out: Statistics, *, with_entropy: bool, grad: Tensor | None) -> None:
    z, r, targets, places = _tensors(rows, out)
    has_ref = rows.ref_logits is not None
    wanted = {"HAS_TARGETS": rows.targets is not None, "HAS_ENTROPY": with_entropy, "HAS_REF": has_ref}
    pointers = z, r, targets, places, out.table
    sizes = out.table.stride(0), z.size(1), z.stride(0), r.stride(0)
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _statistics[(rows.tokens,)](*pointers, *sizes, **_settings(rows), **wanted)
    if has_ref:
        _launch_gradient(rows, out, Upstream(), grad, is_first=True)


def gradient(rows: Rows, known: Statistics, upstream: Upstream, out: Tensor) -> None:
    _launch_gradient(rows, known, upstream, out, is_first=False)


def _launch_gradient(rows: Rows, known: Statistics, upstream: Upstream, out: Tensor | None, *, is_first: bool) -> None:
    z, r, targets, places = _tensors(rows, known)
    target = z if out is None else out
    arriving = [_or(grad, known.table) for grad in upstream]
    wanted = {
        "HAS_LOGPS": upstream.logps is not None,
        "HAS_ENTROPY": upstream.entropy is not None,
        "HAS_EXACT": is_first or upstream.exact is not None,
        "IS_FIRST": is_first,
        "HAS_OUT": out is not None,
    }
    pointers = z, r, target, targets, places, known.table, *arriving
    sizes = known.table.stride(0), z.size(1), z.stride(0), r.stride(0), target.stride(0)
    with torch.cuda.device_of(z):
        _gradient[(rows.tokens,)](*pointers, *sizes, **_settings(rows), **wanted)


def _tensors(rows: Rows, known: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy's and reference's logits, targets and places."""
    z = rows.logits
    r = z if rows.ref_logits is None else rows.ref_logits
    assert z.stride(1) == r.stride(1) == known.table.stride(1) == 1
    return z, r, _or(rows.targets, known.table), _or(rows.places, known.table)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What is not given is not read; something must stand in its place."""
    return other if tensor is None else tensor.contiguous()


def _settings(rows: Rows) -> dict[str, Any]:
    policy, reference = rows.transform, rows.ref_transform
    return {
        "Z_SCALE": float(policy.scale),
        "Z_CAP": float(policy.softcap or 0.0),
        "R_SCALE": float(reference.scale),
        "R_CAP": float(reference.softcap or 0.0),
        "INVERSE_T": 1.0 / policy.temperature,
        "HAS_PLACES": rows.places is not None,
        "REVERSE": rows.is_reverse,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(rows.logits.size(1))),
        "num_warps": _WARPS,
    }
