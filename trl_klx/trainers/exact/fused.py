"""Log-probs, entropy and the exact KL from one projection, inside the fused head of TRL >= 1.16.

TRL's fused head runs the backbone and hands hidden states and the output head to a function that makes log-probs of
them. While a request is served, `FusedScores` stands in for that function.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ...kl import chunked_exact_kl, token_scores
from ...kl.chunked.products import compute_dtype
from ...kl.exact import Direction
from ...kl.logits import LogitTransform
from ...kl.masking import places_of
from .head import HALF, WITHOUT_EXACT
from .requests import Part
from .tokens import ranks_of

# (weight, bias) of the policy's head, whole -> those of the reference's.
RefHead = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class _Head(NamedTuple):
    """The policy's output head, gathered, as TRL's fused head hands it over."""

    weight: Any
    bias: Any
    transform: LogitTransform


class FusedScores:
    """Scores the tokens of one forward of TRL's fused head, in place of TRL's function `stock`.

    Args:
        part: what the forward is to give.
        labels: (rows, L) as the fused head is given them, -100 where no token is scored.
        stock: TRL's own function.
        transform: of the policy's logits, by its config.
        direction: of the exact KL.
        ref_head: finds the reference's head.
    """

    def __init__(
        self,
        part: Part,
        labels: Tensor,
        stock: Any,
        *,
        transform: LogitTransform,
        direction: Direction,
        ref_head: RefHead,
    ) -> None:
        self._part, self._labels, self._stock = part, labels, stock
        self._transform, self._direction, self._ref_head = transform, direction, ref_head
        self.exact: Tensor | None = None  # (rows, C), where it is wanted
        self.hidden: Tensor | None = None  # (N, H), likewise

    def apply(
        self,
        hidden: Tensor,
        weight: Any,
        bias: Any,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Any, ...]:
        """TRL's five outputs, log-probs and entropy first, for each row of `hidden`; and what the part wants beside.

        TRL hands over the rows that have a label or, on devices without Triton, all. Rows without one get 0.
        """
        head = _Head(weight, bias, LogitTransform(logit_scale, softcap, temperature))
        stock = functools.partial(
            self._stock.apply, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )
        dtype = compute_dtype(hidden, hidden)  # TRL takes the weight in hidden's precision
        if self._part.keeps_hidden:
            self.hidden = _picked(hidden.detach(), self._counted(hidden.size(0))).to(dtype)
        if dtype not in HALF and not (self._part.with_grad and torch.is_grad_enabled()):
            if self._part.ref_hidden is not None:  # only measured: what is trained stays TRL's to the last bit
                self._measure(hidden, head, self._part.ref_hidden)
            return stock()
        only_scores = set(outputs) <= {"log_probs", "entropy"}
        logps, entropy = self._scores(hidden, head, targets, with_entropy=only_scores and "entropy" in outputs)
        if only_scores:
            return logps, entropy, None, None, None
        with torch.no_grad():  # what DPO's metrics need of the logits
            return logps, *stock()[1:]

    def _scores(
        self, hidden: Tensor, head: "_Head", targets: Tensor, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropy of each row; the exact KL beside them."""
        part, given = self._part, hidden.size(0)
        scored = []
        for rows, ref_hidden in self._rows(given):
            scores = token_scores(
                _picked(hidden, rows),
                head.weight,
                _picked(targets, rows),
                bias=head.bias,
                with_entropy=with_entropy,
                gathered=functools.partial(maybe_gather_lm_head_ctx, head.weight, head.bias),
                **head.transform.arguments,
                **({} if ref_hidden is None else self._reference(ref_hidden, head)),
            )
            if scores.exact is not None:
                exact = part.tokens.spread(scores.exact)
                self.exact = exact if part.with_grad else exact.detach()
            scored.append((rows, scores))
        logps = _placed([(rows, scores.logps) for rows, scores in scored], given)
        return logps, _placed([(rows, scores.entropy) for rows, scores in scored], given) if with_entropy else None

    @torch.no_grad()
    def _measure(self, hidden: Tensor, head: "_Head", ref_hidden: Tensor) -> None:
        reference = self._reference(ref_hidden, head)
        counted = _picked(hidden, self._counted(hidden.size(0)))
        exact = chunked_exact_kl(counted, head.weight, bias=head.bias, **head.transform.arguments, **reference)
        self.exact = self._part.tokens.spread(exact)

    def _reference(self, ref_hidden: Tensor, head: "_Head") -> dict[str, Any]:
        """What the functions of `kl` take for the exact KL."""
        if head.transform != self._transform:
            raise ValueError(
                f"TRL's fused head makes logits by {head.transform}, and the exact KL by {self._transform}: "
                f"{WITHOUT_EXACT}."
            )
        weight, bias = self._ref_head(head.weight, head.bias)
        device = head.weight.device
        return {
            "ref_hidden": ref_hidden,
            "ref_weight": weight.to(device),
            "ref_bias": None if bias is None else bias.to(device),
            "direction": self._direction,
        }

    def _rows(self, given: int) -> list[tuple[Tensor | None, Tensor | None]]:
        """The rows to score, None for all of those given; with the reference's hidden states where a KL is wanted.

        The KL counts fewer tokens than have a log-prob: a tool's have none of it, nor has an answer that is cut off.
        """
        part, scored = self._part, sum(self._part.tokens.scored)
        if part.ref_hidden is None:
            return [(self._among(self._is_scored, scored, given), None)]
        rows: list[tuple[Tensor | None, Tensor | None]] = [(self._counted(given), part.ref_hidden)]
        others = scored - part.tokens.count
        if others:
            is_other = self._is_scored & ~part.tokens.placed(self._labels.size(1) - 1)
            rows.append((self._among(is_other, others, given), None))
        return rows

    def _counted(self, given: int) -> Tensor | None:
        """The rows of the part's tokens."""
        tokens = self._part.tokens
        return self._among(tokens.placed(self._labels.size(1) - 1), tokens.count, given)

    @functools.cached_property
    def _is_labelled(self) -> Tensor:
        """(rows, L-1) bool"""
        return self._labels[:, 1:].to(self._part.tokens.mask.device) != -100

    @property
    def _is_scored(self) -> Tensor:
        """(rows, L-1) bool: labels of answers. (After virtual tokens the first token of a text can have one too.)"""
        return self._is_labelled & self._part.tokens.answers(self._labels.size(1) - 1)

    def _among(self, mask: Tensor, count: int, given: int) -> Tensor | None:
        """(count,) which of the given rows are those of a mask (rows, L-1)."""
        if count == given:
            return None
        places = places_of(mask, count)
        return places if given == mask.numel() else ranks_of(self._is_labelled)[places]


def _picked(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _placed(parts: list[tuple[Tensor | None, Any]], given: int) -> Any:
    """(given,) the values of rows at their places, 0 elsewhere; connected to the graph also where there is no row."""
    placed = None
    for rows, values in parts:
        if rows is None:
            return values
        placed = (values.new_zeros(given) if placed is None else placed).index_copy(0, rows, values)
    return placed
