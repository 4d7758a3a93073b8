"""What a run has measured since its last log: one store, of means, pooled ratios, and KL rows summed per prompt.

`mode` is "train" or "eval" everywhere: the two are logged apart. What micro-batches measure stays on the device until
the log, which brings it to the host at once: a number at a time would have the host wait for the device each time.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ...kl import effective_sample_size, fill_masked
from ...kl.term import KLTerm
from ...monitor.metrics import finite
from ...monitor.moments import KLSummary, prompt_sums, sequence_rows, summarise

Means = dict[str, defaultdict[str, list[float]]]  # by mode, by name: the values that the next log averages


class _Deferred(NamedTuple):
    """A scalar that is still on the device."""

    name: str
    value: Tensor  # of this process
    largest: bool  # the largest over processes, or else the mean


class _Sums(NamedTuple):
    """Sums and counts that are still on the device, (names, 2), of this process."""

    names: tuple[str, ...]
    totals: Tensor


def _widest(accelerator: Accelerator) -> torch.dtype:
    """The widest float of its device."""
    return torch.float64 if accelerator.device.type != "mps" else torch.float32


class Metrics:
    """The numbers of a run until the next log; the same on every process.

    Args:
        accelerator: for gathering.
        trls: where TRL's trainer keeps the numbers that its own `log` averages; None: the trainer has none.
    """

    def __init__(self, accelerator: Accelerator, trls: Means | None = None) -> None:
        self._accelerator = accelerator
        self._deferred: dict[str, list[_Deferred]] = {"train": [], "eval": []}
        self._sums: dict[str, list[_Sums]] = {"train": [], "eval": []}
        self.trl_logs = trls is not None
        self.means: Means = {"train": defaultdict(list), "eval": defaultdict(list)} if trls is None else trls
        self.ratios: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}  # sum and count, by name

    def add(self, mode: str, name: str, value: float) -> None:
        """Take a number that is the same on every process; the log shows the mean of those since the last."""
        self.means[mode][name].append(value)

    def set(self, mode: str, name: str, value: float) -> None:
        """Take a number of which the log shows the latest."""
        self.means[mode][name] = [value]

    def defer(self, mode: str, name: str, value: Tensor, *, largest: bool = False) -> None:
        """Take a scalar of this process; the log shows the mean of those since the last, each the mean over processes,
        or the `largest` of them. Call on every process.
        """
        self._deferred[mode].append(_Deferred(name, value.detach(), largest))

    def pool(self, mode: str, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Log sum over count of each, pooled over processes and until the next log. Call on every process, with the
        same names. A sum that is not finite is left out.
        """
        flat = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        self._sums[mode].append(_Sums(tuple(sums), flat))

    def defer_weights(self, mode: str, token_weights: Tensor, mask: Tensor, term: KLTerm) -> None:
        """Log `kl/ess` (mean over processes) and `kl/weight_max` (largest anywhere) of the weights on a KL, unbounded.

        With a cap on the tokens' weights also `kl/weight_cut`, the share of tokens above it; where answers are left out
        of the KL, `kl/answers_left_out`, their share.

        Args:
            mode: see the module.
            token_weights: (B, T) unbounded weights of the tokens, of which those of `term` are products.
            mask: (B, T) tokens that count.
            term: what the KL is.
        """
        sums, weights = {}, term.unbounded_weights(token_weights, mask)
        if term.weight_cap is not None:
            above = fill_masked(token_weights, mask) > term.weight_cap
            sums["kl/weight_cut"] = above.sum(), mask.bool().sum()
        if term.leaves_answers_out:
            counted = mask.bool().any(-1, keepdim=True)
            sums["kl/answers_left_out"] = (counted & ~term.kept(token_weights, mask)).sum(), counted.sum()
        if sums:
            self.pool(mode, sums)
        largest = fill_masked(weights, mask).amax() if weights.numel() else weights.new_zeros(())
        self.defer(mode, "kl/ess", effective_sample_size(weights, mask))
        self.defer(mode, "kl/weight_max", largest, largest=True)

    def settle(self, mode: str) -> None:
        """Gather what was deferred, and what is to be pooled. Call on every process."""
        deferred, self._deferred[mode] = self._deferred[mode], []
        sums, self._sums[mode] = self._sums[mode], []
        flat = [value.value.reshape(1) for value in deferred] + [part.totals.flatten() for part in sums]
        if not flat:
            return
        dtype = _widest(self._accelerator)
        gathered = self._accelerator.gather(torch.cat([part.to(dtype) for part in flat]).unsqueeze(0)).cpu()
        each, totals = gathered[:, : len(deferred)], gathered[:, len(deferred) :].sum(0).view(-1, 2).tolist()
        for (name, _, largest), mean, most in zip(deferred, each.mean(0).tolist(), each.amax(0).tolist(), strict=True):
            self.add(mode, name, most if largest else mean)
        pooled, names = self.ratios[mode], (name for part in sums for name in part.names)
        for name, (total, count) in zip(names, totals, strict=True):
            if count > 0 and math.isfinite(total):  # one infinite KL would hide all others until the next log
                before = pooled.get(name, (0.0, 0.0))
                pooled[name] = before[0] + total, before[1] + count

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
        self.means[mode].clear()
        return out | self.take_ratios(mode)

    def take_ratios(self, mode: str) -> dict[str, float]:
        """The pooled ratios since the last log, which TRL's own `log` does not know."""
        out = {name: total / count for name, (total, count) in self.ratios[mode].items()}
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
        accelerator = self._accelerator
        return torch.zeros(len(self._names), dtype=_widest(accelerator), device=accelerator.device)

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
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}  # of this process, since the last log

    def add(self, mode: str, values: Tensor, mask: Tensor, prompts: Tensor) -> None:
        """Take (B, T) values; `mask`, (B, T), marks those that count, and `prompts`, (B,), are as in `KLSession`."""
        self._rows[mode].append(sequence_rows({"": values}, mask, prompts))

    def take(self, mode: str) -> KLSummary | None:
        """The mean since the last call, without batches that are not finite; None where nothing is left. Call on every
        process.
        """
        rows, self._rows[mode] = self._rows[mode], []
        if not rows:
            return None
        sums: dict[str, Tensor] = {}
        local = torch.cat(rows)
        gathered = self._accelerator.gather(local).cpu().view(-1, *local.shape)
        for batch in gathered.split([len(part) for part in rows], dim=1):
            add_sums(sums, mode, prompt_sums(batch.flatten(0, 1)))
        return summarise(sums[mode], ("",))[""] if sums else None


def add_sums(pools: dict[str, Tensor], name: str, sums: Tensor) -> None:
    """Add sums per prompt to those of a name, unless one is not finite: it would hide all others until the next log."""
    if sums.isfinite().all():
        pools[name] = prompt_sums(torch.cat([pools[name], sums])) if name in pools else sums


def named(name: str, found: KLSummary | None) -> dict[str, float]:
    """A mean per token under `name`, and its standard error, as far as they are finite."""
    return {} if found is None else finite({name: found.per_token, f"{name}_se": found.per_token_se})
