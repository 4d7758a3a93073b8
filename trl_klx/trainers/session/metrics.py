"""What a run has measured since its last log: one store, of means, pooled ratios, and KL rows summed per prompt.

`mode` is "train" or "eval" everywhere: the two are logged apart.
"""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from ...monitor.metrics import finite
from ...monitor.moments import KLSummary, prompt_sums, sequence_rows, summarise

Means = dict[str, defaultdict[str, list[float]]]  # by mode, by name: the values that the next log averages


class Metrics:
    """The numbers of a run until the next log; the same on every process.

    Args:
        accelerator: for gathering.
        trls: where TRL's trainer keeps the numbers that its own `log` averages; None: the trainer has none.
    """

    def __init__(self, accelerator: Accelerator, trls: Means | None = None) -> None:
        self._accelerator = accelerator
        self.trl_logs = trls is not None
        self.means: Means = {"train": defaultdict(list), "eval": defaultdict(list)} if trls is None else trls
        self.ratios: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}  # sum and count, by name

    def add(self, mode: str, name: str, value: float) -> None:
        """Take a number that is the same on every process; the log shows the mean of those since the last."""
        self.means[mode][name].append(value)

    def set(self, mode: str, name: str, value: float) -> None:
        """Take a number of which the log shows the latest."""
        self.means[mode][name] = [value]

    def pool(self, mode: str, sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Log sum over count of each, pooled over processes and until the next log; returns those of this call.

        One collective: call on every process, with the same names. A sum that is not finite is left out.
        """
        flat = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        totals = self._accelerator.reduce(flat, reduction="sum").tolist()
        pooled, found = self.ratios[mode], {}
        for name, (total, count) in zip(sums, totals, strict=True):
            if count > 0 and math.isfinite(total):  # one infinite KL would hide all others until the next log
                before = pooled.get(name, (0.0, 0.0))
                pooled[name], found[name] = (before[0] + total, before[1] + count), total / count
        return found

    def drop_non_finite(self, mode: str) -> None:
        """Take NaN and infinity out of the means, and with them the names that have nothing else."""
        means = self.means[mode]
        for name in list(means):
            means[name] = [value for value in means[name] if math.isfinite(value)]
            if not means[name]:
                del means[name]

    def take(self, mode: str) -> dict[str, float]:
        """All means and pooled ratios since the last log."""
        out = {name: sum(values) / len(values) for name, values in self.means[mode].items()}
        out |= {name: total / count for name, (total, count) in self.ratios[mode].items()}
        self.means[mode].clear()
        self.ratios[mode].clear()
        return out


class PooledSums:
    """Named sums over micro-batches, steps and processes, until they are taken.

    Args:
        accelerator: for the one reduction.
        names: of the sums.
    """

    def __init__(self, accelerator: Accelerator, names: tuple[str, ...]) -> None:
        self._accelerator, self._names = accelerator, names
        self._sums = self._zeros()

    def _zeros(self) -> Tensor:
        device = self._accelerator.device
        dtype = torch.float64 if device.type != "mps" else torch.float32
        return torch.zeros(len(self._names), dtype=dtype, device=device)

    def add(self, **values: Tensor) -> None:
        """Add the sums of a micro-batch of this process: scalars, one for each name."""
        self._sums += torch.stack([values[name].detach().to(self._sums) for name in self._names])

    def take(self) -> dict[str, float]:
        """The sums of all processes since the last call. Call on every process."""
        sums, self._sums = self._accelerator.reduce(self._sums, reduction="sum"), self._zeros()
        return dict(zip(self._names, sums.tolist(), strict=True))


class PromptMean:
    """Mean over tokens of a number per token, with a standard error that counts prompts as independent.

    Args:
        accelerator: for gathering.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}  # of this process
        self._sums: dict[str, Tensor] = {}  # per prompt, of all processes, by mode

    def add(self, mode: str, values: Tensor, mask: Tensor, prompts: Tensor) -> None:
        """Take (B, T) values; `mask`, (B, T), marks those that count, and `prompts`, (B,), are as in `KLSession`."""
        self._rows[mode].append(sequence_rows({"": values}, mask, prompts))

    def pool(self, mode: str) -> None:
        """Gather what was added; a batch that is not finite is left out. Call on every process."""
        rows, self._rows[mode] = self._rows[mode], []
        if rows:
            add_sums(self._sums, mode, prompt_sums(self._accelerator.gather(torch.cat(rows)).cpu()))

    def take(self, mode: str) -> KLSummary | None:
        """The mean since the last call; None without values. Call on every process."""
        self.pool(mode)
        sums = self._sums.pop(mode, None)
        return None if sums is None else summarise(sums, ("",))[""]


def add_sums(pools: dict[str, Tensor], name: str, sums: Tensor) -> None:
    """Add sums per prompt to those of a name, unless one is not finite: it would hide all others until the next log."""
    if sums.isfinite().all():
        pools[name] = prompt_sums(torch.cat([pools[name], sums])) if name in pools else sums


def named(name: str, found: KLSummary | None) -> dict[str, float]:
    """A mean per token under `name`, and its standard error, as far as they are finite."""
    return {} if found is None else finite({name: found.per_token, f"{name}_se": found.per_token_se})
