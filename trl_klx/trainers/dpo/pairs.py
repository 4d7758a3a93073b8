"""What DPO's pairs show about length: does the log-ratio margin follow the difference of the answers' lengths?"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...kl import fill_masked
from ...monitor.metrics import finite
from ..parts import Part
from ..seams import swapped
from ..session.metrics import PooledSums

_FEWEST_PAIRS = 16  # a correlation of fewer is meaningless
_BASE = 6364136223846793005  # odd, its bits without a pattern (Knuth's, of linear congruential generators)


def pair_prompts(inputs: Mapping[str, Tensor]) -> Tensor:
    """(2B,) a number for each row of a batch of pairs, equal for rows of one prompt on whatever process.

        sum_i (token_i + 1) _BASE^i modulo 2^64

    over the tokens of the prompt, or of all of the chosen row where text is not the whole prompt; the upper 53 bits,
    which a float64 holds. Computed where the rows are: the host would wait for tokens that it reads, and for numbers
    that it gives.
    """
    pairs = len(inputs["input_ids"]) // 2
    ids, real = inputs["input_ids"][:pairs], inputs["attention_mask"][:pairs].bool()
    of_prompt = real & (inputs["completion_mask"][:pairs] == 0)
    whole = ~of_prompt.any(1, keepdim=True) if "pixel_values" not in inputs else torch.ones_like(real[:, :1])
    known = of_prompt | (real & whole)
    powers = ids.new_full(ids.shape[1:], _BASE, dtype=torch.int64).cumprod(0)
    factors = powers[(known.cumsum(1) - 1).clamp(min=0)]
    return (fill_masked((ids + 1) * factors, known).sum(1) >> 11).repeat(2)


class CountingCollator:
    """A collator that also counts, on the host, the tokens of each answer that a model predicts: (2B,) integers."""

    FIELD = "completion_tokens"

    def __init__(self, collator: Callable[[list], dict]) -> None:
        self._collator = collator

    def __call__(self, rows: list) -> dict:
        batch = self._collator(rows)
        return {**batch, self.FIELD: batch["completion_mask"][:, 1:].sum(1).tolist()}


class PairStatistics(Part):
    """Log-ratios and lengths of the pairs of training, pooled over micro-batches, steps and processes.

    TRL logs means only. The log-ratios of the single pairs are seen where TRL gathers them to take these means, so that
    they cost nothing and are TRL's own.

    Args:
        accelerator: TRL gathers by it.
        is_watched: whether anything is to be recorded.
    """

    def __init__(self, accelerator: Accelerator, *, is_watched: bool) -> None:
        self._accelerator, self._is_watched = accelerator, is_watched
        self._is_first = True  # whether no step was taken yet
        names = ("pairs", "chosen", "rejected", "margin", "margin_squared", "difference_squared", "product")
        self._sums = PooledSums(accelerator, (*names, "distance"))
        self._kept: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """While TRL computes a loss, collects the numbers per pair that it gathers from all processes.

        TRL 1.12 to 1.16: the rewards of the chosen answers, those of the rejected ones, and others.
        """
        gather, per_pair = self._accelerator.gather, []

        def keep(tensor: Any) -> Any:
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                per_pair.append(tensor)
            return gather(tensor)

        with swapped(self._accelerator, gather=keep):
            yield per_pair

    def add(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> None:
        """Add a micro-batch.

        Args:
            chosen, rejected: (B,) log-ratios of whole answers, nats.
            lengths: (2B,) tokens of the chosen answers, then of the rejected ones.
        """
        chosen_length, rejected_length = lengths.double().chunk(2)
        margin, difference = chosen - rejected, chosen_length - rejected_length
        distance = chosen.abs() / chosen_length.clamp(min=1) + rejected.abs() / rejected_length.clamp(min=1)
        self._sums.add(
            pairs=torch.ones_like(margin).sum(),
            chosen=chosen_length.sum(),
            rejected=rejected_length.sum(),
            margin=margin.sum(),
            margin_squared=margin.square().sum(),
            difference_squared=difference.square().sum(),
            product=(margin * difference).sum(),
            distance=distance.sum() / 2,
        )

    def begin(self) -> None:
        self._is_first = True

    def end_step(self) -> dict[str, float]:
        """Before the first update, the mean over answers of |log-ratio| per token, in nats."""
        if not (self._is_first and self._is_watched):
            return {}
        self._is_first = False
        self._pool()
        return {"log_ratio/start": self._kept["distance"] / max(self._kept["pairs"], 1.0)}

    def log(self, mode: str, found: dict[str, float], evaluation: str | None) -> dict[str, float]:
        return self._lengths() if mode == "train" and self._is_watched else {}

    def _lengths(self) -> dict[str, float]:
        """Since the last call that gave some: mean lengths, and slope (nats of margin per token) and correlation of the
        margin on the length difference, where they are defined. Call on every process.
        """
        self._pool()
        sums = self._kept
        pairs = sums["pairs"]
        if pairs < _FEWEST_PAIRS:
            return {}
        self._kept = {}
        out = {"length/chosen": sums["chosen"] / pairs, "length/rejected": sums["rejected"] / pairs}
        difference = out["length/chosen"] - out["length/rejected"]
        margin = sums["margin"] / pairs
        covariance = sums["product"] / pairs - margin * difference
        # Rounding leaves a little of variances that are zero.
        margin_variance = sums["margin_squared"] / pairs - margin**2
        length_variance = sums["difference_squared"] / pairs - difference**2
        if length_variance > 1e-9 and margin_variance > 1e-12:
            out["length/margin_slope"] = covariance / length_variance
            out["length/margin_correlation"] = covariance / math.sqrt(margin_variance * length_variance)
        return finite(out)

    def state(self) -> dict[str, Any]:
        return {"pairs": dict(self._kept)}  # pooled and not yet logged

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        self._is_first = False
        self._kept = {name: float(value) for name, value in state.get("pairs", {}).items()}

    def _pool(self) -> None:
        new = self._sums.take()
        self._kept = {name: self._kept.get(name, 0.0) + value for name, value in new.items()}
