"""Which tokens of answers count, with their number known on the host: no selection of them waits for the device.

Shape legend: B answers, C tokens of an answer, L tokens that a model is given, N tokens that count, H hidden.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kl.masking import places_of


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The tokens of B answers, the last C of each row, whose exact KL or hidden states are wanted."""

    mask: Tensor  # (B, C) bool
    counts: list[int]  # (B,) tokens of the mask
    scored: list[int]  # (B,) tokens that get a log-prob: those of the mask, and others (a tool's output)

    @classmethod
    def of(cls, mask: Tensor, scored: Tensor | None = None) -> "AnswerTokens":
        """Of (B, C) masks, `mask` within `scored`. Waits for the device, once."""
        masks = [mask.bool()] if scored is None else [mask.bool(), scored.bool()]
        counts = torch.stack([each.sum(1) for each in masks]).tolist()
        return cls(masks[0], counts[0], counts[-1])

    def rows(self, start: int, stop: int) -> "AnswerTokens":
        return AnswerTokens(self.mask[start:stop], self.counts[start:stop], self.scored[start:stop])

    def to(self, device: torch.device) -> "AnswerTokens":
        return AnswerTokens(self.mask.to(device), self.counts, self.scored)

    @property
    def count(self) -> int:
        """N"""
        return sum(self.counts)

    @functools.cached_property
    def places(self) -> Tensor:
        """(N,) where they are in (B, C), flattened."""
        return places_of(self.mask, self.count)

    def placed(self, length: int) -> Tensor:
        """(B, length) bool: the tokens in rows of what `length` tokens are given, which end with the answer."""
        return torch.nn.functional.pad(self.mask, (length - self.mask.size(1), 0))

    def answers(self, length: int) -> Tensor:
        """(length,) bool: the columns that `placed` puts answers into."""
        return torch.arange(length, device=self.mask.device) >= length - self.mask.size(1)

    def select(self, hidden: Tensor) -> Tensor:
        """(B, L, H) hidden states of whole rows -> (N, H) those that predict the tokens: one place before each."""
        length, answer = hidden.size(1), self.mask.size(1)
        first = length - 1 - answer
        index = torch.div(self.places, answer, rounding_mode="floor") * length + first + self.places % max(answer, 1)
        return hidden.flatten(0, 1).index_select(0, index)

    def split(self, values: Tensor) -> list[Tensor]:
        """(N, ...) -> views of it, one an answer."""
        return list(values.split(self.counts))

    def spread(self, values: Tensor) -> Tensor:
        """(N,) values -> (B, C), 0 elsewhere; connected to the graph also where N is 0, which DDP needs."""
        return values.new_zeros(self.mask.numel()).index_copy(0, self.places, values).view(self.mask.shape)


def ranks_of(mask: Tensor) -> Tensor:
    """(elements of the mask,) of a true one the number of those before it."""
    return mask.flatten().cumsum(0) - 1
