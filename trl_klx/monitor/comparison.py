"""Runs beside each other: what each gained, at which KL, and how both went over the steps."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .history import HISTORY_FILE, read_history
from .metrics import evaluated_sets
from .plots import MARGIN, REWARD, Gain, with_numbers

Folder = str | os.PathLike[str]
# Markers too, for who cannot tell the colours apart.
_STYLES = [{"color": f"C{place}", "marker": marker} for place, marker in enumerate("os^DvPX")]
_HELP = 'give the folders of runs, as a list or with names: compare_runs({"k3": "runs/k3", "exact": "runs/exact"})'


class _Curve(NamedTuple):
    """(S,) numbers of a run, or of several alike, at S logged steps; an error is NaN where there is none."""

    step: NDArray
    gain: NDArray
    gain_se: NDArray
    kl: NDArray
    kl_se: NDArray


def compare_runs(runs: Mapping[str, Folder | Sequence[Folder]] | Sequence[Folder]) -> Figure:
    """Draw runs beside each other: reward over the steps, KL over the steps, and reward against KL.

    The reward is the mean that the run was trained on (DPO: the implicit margin of its pairs). The KL is KL(policy ||
    reference) in nats per sequence on the policy's own answers, as in `kl/sequence`; where a run's reference moved, its
    KL to the start. Both are of held-out prompts if all runs were evaluated twice or more, else of training batches.

    Bands and bars are ± 2 standard errors. Of one run they are those of its KL, which counts prompts as independent:
    whether another seed would do the same they cannot tell. Of several runs under one name, which differ in the seed,
    the mean is drawn, with the standard error of reward and KL over the runs.

    Args:
        runs: the output folder of each run, or several of them, by the name that the legend shows; or only the
            folders. Each has the `metrics.jsonl` that a run leaves.

    Returns:
        A figure that pyplot does not know; `figure.savefig("comparison.png")` writes it.

    Raises:
        ValueError: there is no run, a folder holds none or none with reward and KL, or runs cannot be compared; one
            sentence that names it.
    """
    read = {name: [_history(folder) for folder in folders] for name, folders in _named(runs).items()}
    histories = {folder: history for own in read.values() for folder, history in own}
    gain = _gain(histories)
    prefix = _held_out_prefix(list(histories.values()), gain)
    curves = {name: _curve(name, [h for _, h in own], prefix, gain) for name, own in read.items()}
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(f"{'Held-out prompts' if prefix else gain.source.capitalize()}, ± 2 standard errors")
    of_steps, kl_of_steps, tradeoff = figure.subplots(1, 3)
    for (name, curve), style in zip(curves.items(), cycle(_STYLES), strict=False):
        label = f"{name} ({len(read[name])} runs)" if len(read[name]) > 1 else name
        _over_steps(of_steps, curve.step, curve.gain, curve.gain_se, {**style, "label": label})
        _over_steps(kl_of_steps, curve.step, curve.kl, curve.kl_se, style)
        _against_kl(tradeoff, curve, style)
    moved = any(with_numbers(history, "kl/origin") for history in histories.values())
    of_kl = f"KL to the {'start' if moved else 'reference'} (nats per sequence)"
    for axes, x, y in (
        (of_steps, "step", gain.label),
        (kl_of_steps, "step", of_kl),
        (tradeoff, f"square root of the {of_kl}", gain.label),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _named(runs: Mapping[str, Folder | Sequence[Folder]] | Sequence[Folder]) -> dict[str, list[Path]]:
    """The folders of each name. A folder without one is called by its last part, or in full where two share it."""
    if isinstance(runs, (str, os.PathLike)):
        raise ValueError(f"{os.fspath(runs)} is one folder, where several are to be compared: {_HELP}.")
    if not runs:
        raise ValueError(f"there is no run to compare: {_HELP}.")
    if not isinstance(runs, Mapping):
        folders = [Path(folder) for folder in runs]
        ends = [folder.name for folder in folders]
        runs = {f.name if ends.count(f.name) == 1 else str(f): f for f in folders}
    named = {
        str(name): [Path(f) for f in ([given] if isinstance(given, (str, os.PathLike)) else given)]
        for name, given in runs.items()
    }
    for name, own in named.items():
        if not own:
            raise ValueError(f"{name!r} has no run: {_HELP}.")
    return named


def _history(folder: Path) -> tuple[Path, list[dict]]:
    """The folder and what its run logged."""
    history = read_history(folder / HISTORY_FILE)
    if not history:
        found = "is no folder" if not folder.is_dir() else f"has no {HISTORY_FILE} of a run"
        raise ValueError(f"{folder} {found}: give the output_dir of a run, trained without kl_report=False.")
    return folder, history


def _gain(histories: Mapping[Path, list[dict]]) -> Gain:
    """What all runs are to raise: the reward, or DPO's margin."""
    found: dict[Gain, Path] = {}
    for folder, history in histories.items():
        gain = next((g for g in (REWARD, MARGIN) if with_numbers(history, g.metric, "kl/sequence")), None)
        if gain is None:
            raise ValueError(
                f"{folder} logged no reward (DPO: margin) with a KL (kl/sequence): train it with a KL, or measure one "
                "with kl_monitor and, in DPO, kl_probe_steps."
            )
        found.setdefault(gain, folder)
    if len(found) > 1:
        raise ValueError(
            f"{found[REWARD]} logged a reward and {found[MARGIN]} the margin of DPO's pairs: compare runs of one kind."
        )
    return next(iter(found))


def _kl_name(history: list[dict]) -> str:
    return "kl/origin" if with_numbers(history, "kl/origin") else "kl/sequence"


def _held_out_prefix(histories: list[list[dict]], gain: Gain) -> str:
    """Of the first evaluation set that all runs read twice or more; empty where there is none."""

    def is_read(prefix: str, history: list[dict]) -> bool:
        return len(with_numbers(history, f"{prefix}{gain.metric}", f"{prefix}{_kl_name(history)}")) > 1

    prefixes = evaluated_sets(histories[0], gain.metric)
    return next((prefix for prefix in prefixes if all(is_read(prefix, history) for history in histories)), "")


def _curve(name: str, histories: list[list[dict]], prefix: str, gain: Gain) -> _Curve:
    """Of one run with the errors that it logged, or the mean of several at the steps that all of them logged."""
    tables = []
    for history in histories:
        columns = (f"{prefix}{gain.metric}", f"{prefix}{_kl_name(history)}")
        entries = with_numbers(history, "step", *columns)
        tables.append({e["step"]: [*(e[c] for c in columns), e.get(f"{columns[1]}_se", math.nan)] for e in entries})
    steps = sorted(set.intersection(*map(set, tables)))
    if not steps:
        raise ValueError(f"the runs of {name!r} logged no step in common: give runs of the same logging_steps.")
    # (runs, steps, 3)
    gains, kls, errors = np.moveaxis(np.array([[table[step] for step in steps] for table in tables], dtype=float), 2, 0)
    if len(tables) == 1:
        return _Curve(np.array(steps), gains[0], np.full(len(steps), math.nan), kls[0], errors[0])
    gain_se, kl_se = (values.std(axis=0, ddof=1) / math.sqrt(len(tables)) for values in (gains, kls))
    return _Curve(np.array(steps), gains.mean(axis=0), gain_se, kls.mean(axis=0), kl_se)


def _over_steps(axes: Axes, steps: NDArray, values: NDArray, errors: NDArray, style: dict[str, Any]) -> None:
    axes.plot(steps, values, markersize=4, **style)
    band = values - 2 * errors, values + 2 * errors
    axes.fill_between(steps, *band, color=style["color"], alpha=0.2, linewidth=0)


def _against_kl(axes: Axes, curve: _Curve, style: dict[str, Any]) -> None:
    error = np.nan_to_num(curve.kl_se)
    low, middle, high = (np.sqrt(np.maximum(curve.kl + width * error, 0)) for width in (-2, 0, 2))
    bars = {"xerr": np.array([middle - low, high - middle]), "yerr": 2 * np.nan_to_num(curve.gain_se)}
    axes.errorbar(middle, curve.gain, **bars, **style, markersize=4, linewidth=1)
