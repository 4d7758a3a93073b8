"""The log-probs of sampled tokens under the distribution that `generate` really samples from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..reference.build import causal_lm
from ..seams import swapped


class SampledLogps(LogitsProcessor):
    """The last of `generate`'s processors: sees the scores as they are sampled from, and changes nothing.

    It is called before a token is sampled, so that each token is seen one call later, and the last one in the answers.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []  # (B, 1) each
        self._pending: Tensor | None = None  # (B, V) log-probs of the token that is sampled next

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self._pending = scores.float().log_softmax(-1)
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self._pending is not None:
            self._columns.append(self._pending.gather(1, tokens.unsqueeze(1)))

    def of(self, answers: list[list[int]]) -> list[list[float]]:
        """Log-probs of the tokens of the answers that were sampled, in their order; nats."""
        if self._pending is not None:
            place = len(self._columns)
            last = [ids[place] if len(ids) > place else 0 for ids in answers]  # 0 stands behind an answer's end
            self._take(torch.tensor(last, device=self._pending.device))
            self._pending = None
        rows = torch.cat(self._columns, dim=1).tolist() if self._columns else [[]] * len(answers)
        return [row[: len(ids)] for row, ids in zip(rows, answers, strict=True)]


@contextmanager
def recording_samples(model: nn.Module) -> Iterator[SampledLogps]:
    """While active, the next call of the model's `generate` records its log-probs.

    `generate` takes processors of the caller's as an argument, which TRL does not pass on, and puts its own (top_k,
    top_p, min_p) behind them: so what it builds its list with is wrapped.
    """
    holder: Any = causal_lm(model)
    build, recorder = holder._get_logits_processor, SampledLogps()

    def with_recorder(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        return LogitsProcessorList([*build(*args, **kwargs), recorder])

    with swapped(holder, _get_logits_processor=with_recorder):
        yield recorder
