"""The two pictures of a run: what reward was bought at which KL, and how the KL was held."""

import math
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, whose backend and open figures are the user's
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .metrics import evaluated_sets, is_number, logged_groups, set_name

# Colour and marker: who cannot tell the colours apart, or prints, has the markers.
_SET_STYLES = (("crimson", "o"), ("darkorange", "s"), ("purple", "^"), ("teal", "D"), ("black", "v"))
_GROUP_STYLES = (
    *(("tab:green", "s"), ("tab:purple", "^"), ("tab:brown", "D")),
    *(("tab:pink", "v"), ("tab:olive", "P"), ("tab:cyan", "X")),
)
_POINTS: dict[str, Any] = {"s": 18, "cmap": "viridis", "edgecolors": "0.3", "linewidths": 0.4}  # yellow needs an edge
_DPI = 132  # 726 pixels wide, so that on a phone, at half the size, the labels can still be read
REWARD_VS_KL, KL_CONTROL = "reward_vs_kl.png", "kl_control.png"


class Gain(NamedTuple):
    """What a kind of run gains, and where its KL in training is from."""

    metric: str
    label: str
    source: str


REWARD = Gain("reward", "mean reward", "training batches")
# DPO has no reward: the margin is what it raises, and its KL is from answers sampled now and then, not from the data.
MARGIN = Gain("rewards/margins", "implicit reward margin, chosen minus rejected", "probes in training")


def plot_run(
    history: list[dict],
    folder: Path,
    *,
    target_unit: str = "token",
    reading: str = "k3",
    coef_name: str = "beta",
) -> list[Path]:
    """Draw the pictures that the logged metrics allow; returns the files written.

    Args:
        history: log entries with `step` and metrics, as `HistoryCallback` writes them.
        folder: where the pictures go.
        target_unit: unit of `kl/target`: "token" or "sequence".
        reading: the estimator that the target is about, for the unit "token".
        coef_name: what the trainer's config calls the weight of the KL.
    """
    train = with_numbers(history, "kl/sequence")
    if not train:
        return []
    gain = MARGIN if with_numbers(train, MARGIN.metric) else REWARD
    written = [_reward_vs_kl(history, folder / REWARD_VS_KL, gain)] if with_numbers(train, gain.metric) else []
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    figure.suptitle(f"KL to the reference and {coef_name}, over the steps", fontsize="medium")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    name = "kl/sequence" if target_unit == "sequence" else f"kl/{reading}"
    _draw_kl(upper, history, name, gain.source)
    upper.set_ylabel(f"KL (nats per {target_unit})")
    _draw_coef(lower, history, coef_name)
    for group, style in zip(logged_groups(history), cycle(_GROUP_STYLES), strict=False):
        _draw_group(upper, lower, history, group, target_unit, style)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    upper.set_ylim(bottom=min(0.0, *_column(train, name)))
    return [*written, _save(figure, folder / KL_CONTROL)]


def with_numbers(entries: list[dict], *names: str) -> list[dict]:
    """The entries that have all of these numbers."""
    return [entry for entry in entries if all(is_number(entry.get(name)) for name in names)]


def _column(entries: list[dict], name: str) -> list[float]:
    return [entry[name] if is_number(entry.get(name)) else math.nan for entry in entries]


def _root(entries: list[dict], name: str) -> list[float]:
    return [math.sqrt(max(kl, 0.0)) for kl in _column(entries, name)]


def _held_out_sets(history: list[dict], *metrics: str) -> Iterator[tuple[str, list[dict], dict[str, Any]]]:
    """(prefix, entries, style with label) of each evaluation set that has the first metric, and entries with all."""
    prefixes = evaluated_sets([{n: v for n, v in e.items() if is_number(v)} for e in history], metrics[0])
    for prefix, (color, marker) in zip(prefixes, cycle(_SET_STYLES), strict=False):
        entries = with_numbers(history, *(f"{prefix}{metric}" for metric in metrics))
        if entries:
            label = f"held out: {set_name(prefix)}" if set_name(prefix) else "held out"
            yield prefix, entries, {"color": color, "marker": marker, "label": label}


def _reward_vs_kl(history: list[dict], path: Path, gain: Gain) -> Path:
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    moves = bool(with_numbers(history, "kl/origin"))
    name, place = ("kl/origin", "start") if moves else ("kl/sequence", "reference")
    train = with_numbers(history, name)
    kl, steps = _root(train, name), _column(train, "step")
    points = axes.scatter(kl, _column(train, gain.metric), c=steps, label=gain.source, **_POINTS)
    for prefix, entries, style in _held_out_sets(history, name, gain.metric):
        kl, values = _root(entries, f"{prefix}{name}"), _column(entries, f"{prefix}{gain.metric}")
        axes.plot(kl, values, markersize=7, **style)
    figure.colorbar(points, ax=axes, label="step")
    figure.suptitle(f"{gain.label.partition(',')[0].capitalize()} against the KL to the {place}", fontsize="medium")
    axes.set_xlabel("square root of the KL (KL in nats per sequence)")
    axes.set_ylabel(gain.label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _draw_group(upper: Axes, lower: Axes, history: list[dict], group: str, unit: str, style: tuple[str, str]) -> None:
    """A group's KL with its target, and its own beta where it has one."""
    name, (color, marker) = f"kl_groups/{group}", style
    train = with_numbers(history, f"{name}/{unit}")
    steps = _column(train, "step")
    every = max(1, len(steps) // 10)
    marks: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "markevery": every, "linewidth": 1}
    upper.plot(steps, _column(train, f"{name}/{unit}"), label=group, **marks)
    upper.plot(steps, _column(train, f"{name}/target"), "--", color=color, linewidth=1)
    lower.plot(steps, _column(train, f"{name}/coef"), **marks)


def _draw_kl(axes: Axes, history: list[dict], name: str, source: str) -> None:
    train = with_numbers(history, name)
    steps, kl = _column(train, "step"), _column(train, name)
    axes.plot(steps, kl, ".-", markersize=3, color="tab:blue", label=source)
    error = _column(train, f"{name}_se")
    low, high = ([value + sign * 2 * e for value, e in zip(kl, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, alpha=0.2, color="tab:blue", label="± 2 standard errors")
    for prefix, entries, style in _held_out_sets(history, name):
        values = _column(entries, f"{prefix}{name}")
        axes.plot(_column(entries, "step"), values, linestyle="", clip_on=False, zorder=3, **style)
    if targets := with_numbers(history, "kl/target"):
        axes.step(_column(targets, "step"), _column(targets, "kl/target"), "--", color="black", label="target")
    axes.grid(alpha=0.3)


def _draw_coef(axes: Axes, history: list[dict], name: str) -> None:
    logged = with_numbers(history, "kl/coef")
    coefs = _column(logged, "kl/coef")
    axes.plot(_column(logged, "step"), coefs, color="tab:orange")
    if coefs and min(coefs) > 0 and max(coefs) > 5 * min(coefs):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(coefs) < 50 * min(coefs) else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(name)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path
