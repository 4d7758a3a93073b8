"""What TRL's scoring of answers is to give besides log-probs: asked for before TRL's code runs, read when it has run.

Between the two lie frames of TRL's that carry no argument of ours. A `Tape` is made for one call of TRL's code.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exact.forward import ExactKLForward
from ..exact.tokens import AnswerTokens


@dataclass(frozen=True)
class Ask:
    """What a scoring is to give besides log-probs."""

    hidden: bool = False  # the hidden states that its output head is given
    tokens: AnswerTokens | None = None  # where; None: at all that are scored
    ref_hidden: list[Tensor] | None = None  # B tensors (n, H): the exact KL to the reference with these hidden states
    grad: bool = False  # whether it takes part in the loss


@dataclass(frozen=True)
class Scoring:
    """What one scoring of a batch of answers gives."""

    logps: Tensor  # (B, C)
    tokens: AnswerTokens | None  # of the two below
    hidden: list[Tensor] | None  # B tensors (n, H)
    exact: Tensor | None  # (B, C) exact KL, nats


class Tape:
    """The scorings that TRL's code makes while it runs.

    Args:
        exact: computes the exact KL and reads hidden states; with it, all is scored as for an exact KL, because
            log-probs that are scored in two ways differ by rounding.
        ask: the same for each scoring.
    """

    def __init__(self, exact: ExactKLForward | None, ask: Ask) -> None:
        self._exact, self._ask = exact, ask
        self.scorings: list[Scoring] = []

    def record(self, score: Callable[[], Any], model: nn.Module, scored: Tensor) -> Any:
        """Call TRL's scoring of answers by `model`, and keep what was asked for; returns its result.

        What gives no log-probs (a patch of TRL may score elsewhere) does not count.

        Args:
            score: TRL's scoring.
            model: as it is called.
            scored: (B, C) tokens of the answers that get a log-prob.
        """
        ask, exact = self._ask, self._exact
        tokens: AnswerTokens | None = None
        hidden: list[Tensor] | None = None
        kl: list[Tensor] = []
        watching: Any = nullcontext()
        if exact is not None:
            tokens = AnswerTokens.of(scored) if ask.tokens is None else ask.tokens
            if ask.ref_hidden is not None:
                watching = exact.exact_kl(model, tokens, ask.ref_hidden, with_grad=ask.grad)
            else:
                watching = exact.hidden_states(tokens) if ask.hidden else exact.log_probs(tokens)
        with watching as given:
            out = score()
        if ask.ref_hidden is not None:
            kl = given
        elif ask.hidden:
            hidden = given
        if out is not None and out[0] is not None:
            self.scorings.append(Scoring(out[0], tokens, hidden, torch.cat(kl) if kl else None))
        return out

    def one(self) -> Scoring | None:
        """The scoring, where TRL makes one; None where it made none, or several."""
        return self.scorings[0] if len(self.scorings) == 1 else None
