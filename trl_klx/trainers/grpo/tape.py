"""What TRL's scoring of answers is to give besides log-probs: asked for before TRL's code runs, read when it has run.

Between the two lie frames of TRL's that carry no argument of ours. A `Tape` is made for one call of TRL's code.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exact.forward import ExactKLForward


@dataclass(frozen=True)
class Ask:
    """What a scoring is to give besides log-probs."""

    hidden: bool = False  # the hidden states that its output head is given
    ref_hidden: Tensor | None = None  # (B, C, H): the exact KL to the reference with these hidden states
    mask: Tensor | None = None  # (B, C) tokens of that KL
    grad: bool = False  # whether it takes part in the loss


@dataclass(frozen=True)
class Scoring:
    """What one scoring of a batch of answers gives."""

    logps: Tensor  # (B, C)
    hidden: Tensor | None  # (B, C, H)
    exact: Tensor | None  # (B, C) exact KL, nats


class Tape:
    """The scorings that TRL's code makes while it runs.

    Args:
        exact: computes the exact KL and reads hidden states; needed where `ask` asks for one of them.
        ask: the same for each scoring.
    """

    def __init__(self, exact: ExactKLForward | None, ask: Ask) -> None:
        self._exact, self._ask = exact, ask
        self.scorings: list[Scoring] = []

    def record(self, score: Callable[[], Any], model: nn.Module, length: int) -> Any:
        """Call TRL's scoring of answers of `length` tokens by `model`, and keep what was asked for; returns its result.

        What gives no log-probs (a patch of TRL may score elsewhere) does not count.
        """
        exact, ask = self._exact, self._ask
        hidden: list[Tensor] = []
        kl: list[Tensor] = []
        with ExitStack() as watching:
            if exact is not None and ask.hidden:
                hidden = watching.enter_context(exact.hidden_states(model, length))
            if exact is not None and ask.ref_hidden is not None and ask.mask is not None:
                asked = exact.exact_kl(model, ask.ref_hidden, ask.mask, with_grad=ask.grad)
                kl = watching.enter_context(asked)
            out = score()
        if out is not None and out[0] is not None:
            self.scorings.append(Scoring(out[0], _joined(hidden), _joined(kl)))
        return out

    def one(self) -> Scoring | None:
        """The scoring, where TRL makes one; None where it made none, or several."""
        return self.scorings[0] if len(self.scorings) == 1 else None


def _joined(parts: list[Tensor]) -> Tensor | None:
    """TRL may score a batch in several forwards."""
    return torch.cat(parts) if parts else None
