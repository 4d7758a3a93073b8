"""What DPO's pairs say about length: does the log-ratio margin follow the difference of the answers' lengths?"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...monitor.metrics import finite
from ..session.metrics import PooledSums

_FEWEST_PAIRS = 16  # a correlation of fewer says nothing


class PairStatistics:
    """Log-ratios and lengths of the pairs of training, pooled over micro-batches, steps and processes.

    TRL logs means only. The log-ratios of the single pairs are seen where TRL gathers them to take these means, so that
    they cost nothing and are TRL's own.

    Args:
        accelerator: TRL gathers by it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._gathered: list[tuple[Tensor, Tensor]] = []
        names = ("pairs", "chosen", "rejected", "margin", "margin_squared", "difference_squared", "product")
        self._sums = PooledSums(accelerator, (*names, "distance"))
        self._kept: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, keep what TRL gathers from all processes, and what this process gave."""
        gather = self._accelerator.gather

        def keep(tensor: Any) -> Any:
            result = gather(tensor)
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                self._gathered.append((tensor, result))
            return result

        self._accelerator.gather = keep
        try:
            yield
        finally:
            del self._accelerator.gather  # the method itself again

    def add(self, lengths: Tensor, means: tuple[float, float], beta: float) -> None:
        """Add a micro-batch.

        Args:
            lengths: (2B,) tokens of the chosen answers, then of the rejected ones.
            means: TRL's mean rewards of chosen and rejected answers, beta times the log-ratio; by these they are found
                among what it gathered, in this order.
            beta: of these rewards.
        """
        rewards = iter(self._gathered)
        found = [next((given for given, all_of in rewards if all_of.mean().item() == mean), None) for mean in means]
        self._gathered = []
        chosen, rejected = found
        if chosen is None or rejected is None:  # a mean that is not finite
            return
        chosen, rejected = chosen.double() / beta, rejected.double() / beta
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

    def distance(self) -> float:
        """Mean over answers of |log-ratio| per token, nats, of the pairs so far. Call on every process."""
        self._pool()
        return self._kept["distance"] / max(self._kept["pairs"], 1.0)

    def metrics(self) -> dict[str, float]:
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

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: the pairs that were pooled and not yet logged; the same on every process."""
        return dict(self._kept)

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state`."""
        self._kept = {name: float(value) for name, value in state.items()}

    def _pool(self) -> None:
        new = self._sums.take()
        self._kept = {name: self._kept.get(name, 0.0) + value for name, value in new.items()}
