"""What is computed of each row of logits.

With z and r the logits of policy and reference as answers are sampled by them, p and q their probabilities, `left` the
distribution that the KL averages over (p: reverse, q: forward), `right` the other, d = log left - log right, and S the
tokens that both can give:

    logz    = log sum_v exp z_v                     mean  = sum_{v in S} left_v d_v
    logp    = z_target - logz                       mass  = sum_{v in S} left_v
    entropy = -sum_v p_v log p_v                    exact = sum_v left_v d_v, +inf where right lacks a token of left

    d logp / d z_u    = [u = target] - p_u
    d entropy / d z_u = -p_u (log p_u + entropy)
    d exact / d z_u   = p_u ([u in S] (d_u + 1) - mean - mass)     reverse; p_u (d_u - mean) on full support
                      = p_u mass - [u in S] q_u                    forward; p_u - q_u on full support

`exact` is added up as left d - left + right, whose terms are never negative: rounding of logz, which left d alone has
in full, is of second order there, and a KL of 1e-4 nats is not lost beside logits of 20.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..exact import Direction
from ..logits import LogitTransform


class Rows(NamedTuple):
    """The logits of n tokens, as products give them."""

    logits: Tensor  # (n, V) of the policy; (M, V) where `places` names the rows that are meant
    ref_logits: Tensor | None  # (n, V)
    targets: Tensor | None  # (n,) token ids
    transform: LogitTransform  # of `logits`
    ref_transform: LogitTransform
    direction: Direction = "reverse"
    places: Tensor | None = None  # (n,)

    @property
    def is_reverse(self) -> bool:
        return self.direction == "reverse"

    @property
    def tokens(self) -> int:
        return (self.logits if self.places is None else self.places).size(0)


class Statistics(NamedTuple):
    """Of N tokens, (N,) each, float32 or wider. What was not asked for may hold anything."""

    table: Tensor  # (7, N), in the order of the properties

    @classmethod
    def empty(cls, tokens: int, like: Tensor, dtype: torch.dtype) -> "Statistics":
        return cls(like.new_empty(7, tokens, dtype=dtype))

    def at(self, rows: slice) -> "Statistics":
        return Statistics(self.table[:, rows])

    @property
    def logz(self) -> Tensor:
        return self.table[0]

    @property
    def logps(self) -> Tensor:
        return self.table[1]

    @property
    def entropy(self) -> Tensor:
        return self.table[2]

    @property
    def ref_logz(self) -> Tensor:
        return self.table[3]

    @property
    def mean(self) -> Tensor:
        return self.table[4]

    @property
    def mass(self) -> Tensor:
        return self.table[5]

    @property
    def exact(self) -> Tensor:
        return self.table[6]


class Upstream(NamedTuple):
    """Gradients at log-probs, entropy and exact KL, (n,) each; None where none arrives."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    exact: Tensor | None = None

    def at(self, rows: slice) -> "Upstream":
        return Upstream(*(None if grad is None else grad[rows] for grad in self))


class Backend(Protocol):
    """Who computes it: `torch_rows` or `triton_rows`."""

    def score(self, rows: Rows, out: Statistics, *, with_entropy: bool, grad: Tensor | None) -> None:
        """Fill `out`; and `grad` with the gradient of the exact KL at the raw logits, for an upstream gradient of 1.

        `grad` is of the shape of `rows.logits`, and may be `rows.logits` itself.
        """

    def gradient(self, rows: Rows, known: Statistics, upstream: Upstream, out: Tensor) -> None:
        """Fill `out` with the gradient at the raw logits; of their shape, and it may be `rows.logits` itself."""
