"""What a model's forward is to give besides what TRL asks of it, and how much of it has been given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import AnswerTokens


@dataclass(frozen=True)
class Part:
    """What one forward is to give: of some of a request's answers."""

    tokens: AnswerTokens
    ref_hidden: Tensor | None  # (N, H') the reference's hidden states at the tokens: the exact KL to it is wanted
    with_grad: bool  # whether that takes part in the loss
    keeps_hidden: bool  # whether the hidden states at the tokens are wanted


class Request:
    """A scoring that asks for true log-probs, and for more. The trainer may split its batch; rows go out in order.

    Args:
        tokens: of B answers, those that count.
        ref_hidden: B tensors (n, H'), the reference's hidden states at these tokens; for the exact KL.
        with_grad: False where that is only measured.
        keeps_hidden: whether to keep hidden states.
    """

    def __init__(
        self,
        tokens: AnswerTokens,
        *,
        ref_hidden: list[Tensor] | None = None,
        with_grad: bool = False,
        keeps_hidden: bool = False,
    ) -> None:
        self._tokens, self._ref_hidden, self._with_grad = tokens, ref_hidden, with_grad
        self._keeps_hidden, self._next_row = keeps_hidden, 0
        self.kept: list[Tensor] = []  # B tensors (n, H), where they are wanted

    @property
    def is_served(self) -> bool:
        return self._next_row == len(self._tokens.mask)

    @property
    def wants_exact(self) -> bool:
        return self._ref_hidden is not None

    def take(self, rows: int, device: torch.device) -> Part:
        """What the forward of the next `rows` answers, on `device`, is to give."""
        start, self._next_row = self._next_row, self._next_row + rows
        ref_hidden = None
        if self._ref_hidden is not None:
            ref_hidden = torch.cat(self._ref_hidden[start : self._next_row]).to(device)
        tokens = self._tokens.rows(start, self._next_row).to(device)
        return Part(tokens, ref_hidden, self._with_grad, self._keeps_hidden)
