"""The overview's pictures as SVG: text stays text, and colours are the page's own, light or dark.

A plotting library in the page would add 1 to 5 MB to every report, for pictures that need no interaction.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...monitor.uncertainty import Z95

# Placeholders that occur nowhere else in a picture, for what CSS decides.
_INK, _GRID = "#010203", "#040506"
_SERIES = ["#0708f1", "#0708f2", "#0708f3", "#0708f4", "#0708f5"]
_STYLES = ("o-", "s--", "^-.", "D:", "v-")  # beside the colours, for those who cannot tell them apart
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold dollars
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _INK),
}
_KL = "teacher_forced_mean_kl_policy_ref"


def svg(name: str, draw: Callable[..., None], *args: Any) -> Markup:
    """What `draw(axes, *args)` draws, as inline SVG; `name` tells its ids from those of others on the page."""
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        draw(axes, *args)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside upper center", ncols=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", text[text.index("<svg") :])
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)  # made here; matplotlib has escaped the labels


def course(axes: Axes, checkpoints: pd.DataFrame) -> None:
    """Both KLs over the checkpoints, in their order."""
    rows = checkpoints[checkpoints["subset"] == "all"]
    labels = {"kl_policy_ref": "KL(policy || reference)", "kl_ref_policy": "KL(reference || policy)"}
    for colour, style, (name, label) in zip(_SERIES, _STYLES, labels.items(), strict=False):
        column = f"teacher_forced_mean_{name}"
        _points(axes, rows, column, f"{column}_se", style, color=colour, label=label)
    axes.set_ylabel("KL, nats per token")
    axes.set_ylim(bottom=0)


def right_wrong(axes: Axes, table: pd.DataFrame) -> None:
    """Wrong minus right responses, with 95 % intervals, over the checkpoints."""
    axes.axhline(0, color=_INK, lw=0.8)
    _points(axes, table[table["measure"] == "kl_policy_ref"], "difference", "se", "o", color=_SERIES[1])
    axes.set_ylabel("difference, nats per token")


def _points(axes: Axes, rows: pd.DataFrame, column: str, error: str, style: str, **own: Any) -> None:
    """One point per checkpoint."""
    axes.errorbar(range(len(rows)), rows[column], _margin(rows[error]), fmt=style, markersize=4, capsize=2, **own)
    crowded = len(rows) > 3 or rows["policy"].str.len().sum() > 45
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {"rotation": 0, "ha": "center"}
    axes.set_xticks(range(len(rows)), rows["policy"], **slant)


def _margin(errors: pd.Series) -> pd.Series:
    return Z95 * errors.fillna(0.0)


def position_curves(axes: Axes, positions: pd.DataFrame, labels: list[str]) -> None:
    """KL(policy || reference) along the response, for at most five checkpoints: first, last and between."""
    shown = [labels[round(i * (len(labels) - 1) / 4)] for i in range(5)] if len(labels) > 5 else labels
    for colour, style, label in zip(_SERIES, _STYLES, shown, strict=False):
        rows = positions[positions["policy"] == label]
        place, mean, margin = rows["position"], rows[_KL], _margin(rows[f"{_KL}_se"])
        axes.plot(place, mean, style, color=colour, label=label, markersize=4, markevery=0.2)
        axes.fill_between(place, (mean - margin).clip(lower=0), mean + margin, color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("token of the response")
    axes.set_ylabel("KL, nats per token")
    axes.set_ylim(bottom=0)


def class_bars(axes: Axes, classes: pd.DataFrame, label: str) -> None:
    """Mean KL(policy || reference) by class of token, of one checkpoint."""
    rows = classes[classes["policy"] == label].sort_values(_KL)
    names = [f"{name} ({count})" for name, count in zip(rows["class"], rows["tokens"], strict=True)]
    axes.barh(names, rows[_KL], xerr=_margin(rows[f"{_KL}_se"]), color=_SERIES[0], alpha=0.5, ecolor=_INK, height=0.7)
    axes.set_xlabel("KL, nats per token")
    axes.set_xlim(left=0)
