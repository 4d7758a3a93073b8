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

from .uncertainty import Z95

# Placeholders that no picture else contains, for what CSS decides.
_INK, _GRID = "#010203", "#040506"
_SERIES = ["#0708f1", "#0708f2", "#0708f3", "#0708f4", "#0708f5"]
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def plot(draw: Callable[[Axes], None], name: str, *, width: float = 5.6, height: float = 2.9) -> Markup:
    """A picture as inline SVG; `name` tells its ids from those of others on the page."""
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)  # made here; matplotlib has escaped the labels


def _errors(values: pd.Series) -> pd.Series:
    return Z95 * values.fillna(0.0)


def course(checkpoints: pd.DataFrame) -> Callable[[Axes], None]:
    """Both KLs over the checkpoints, in their order."""
    rows = checkpoints[checkpoints["subset"] == "all"]

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        for colour, (name, label) in zip(
            _SERIES,
            (("kl_policy_ref", "KL(policy || reference)"), ("kl_ref_policy", "KL(reference || policy)")),
            strict=False,
        ):
            column = f"teacher_forced_mean_{name}"
            errors = _errors(rows[f"{column}_se"])
            axes.errorbar(places, rows[column], errors, color=colour, marker="o", markersize=4, capsize=2, label=label)
        axes.set_xticks(
            places, rows["policy"], rotation=30 if len(rows) > 3 else 0, ha="right" if len(rows) > 3 else "center"
        )
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw


def position_curves(positions: pd.DataFrame, labels: list[str]) -> Callable[[Axes], None]:
    """KL(policy || reference) along the response, for at most five checkpoints: first, last and between."""
    shown = [labels[round(i * (len(labels) - 1) / 4)] for i in range(5)] if len(labels) > 5 else labels

    def draw(axes: Axes) -> None:
        for colour, label in zip(_SERIES, shown, strict=False):
            rows = positions[positions["policy"] == label]
            mean, error = (
                rows["teacher_forced_mean_kl_policy_ref"],
                _errors(rows["teacher_forced_mean_kl_policy_ref_se"]),
            )
            axes.plot(rows["position"], mean, color=colour, label=label)
            axes.fill_between(
                rows["position"], (mean - error).clip(lower=0), mean + error, color=colour, alpha=0.15, lw=0
            )
        axes.set_xlabel("token of the response")
        axes.set_ylabel("KL(policy || reference), nats")
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw


def class_bars(classes: pd.DataFrame, label: str) -> Callable[[Axes], None]:
    """Mean KL(policy || reference) by class of token, of one checkpoint."""
    rows = classes[classes["policy"] == label].sort_values("teacher_forced_mean_kl_policy_ref")

    def draw(axes: Axes) -> None:
        names = [f"{name} ({count})" for name, count in zip(rows["class"], rows["tokens"], strict=True)]
        errors = _errors(rows["teacher_forced_mean_kl_policy_ref_se"])
        axes.barh(
            names, rows["teacher_forced_mean_kl_policy_ref"], xerr=errors, color=_SERIES[0], ecolor=_INK, height=0.7
        )
        axes.set_xlabel("KL(policy || reference), nats per token")
        axes.set_xlim(left=0)

    return draw


def right_wrong(table: pd.DataFrame) -> Callable[[Axes], None]:
    """Wrong less right responses, with 95 % intervals, over the checkpoints."""
    rows = table[table["measure"] == "kl_policy_ref"]

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        axes.axhline(0, color=_INK, lw=0.8)
        errors = _errors(rows["se"])
        axes.errorbar(places, rows["difference"], errors, color=_SERIES[1], marker="o", markersize=4, capsize=2, ls="")
        axes.set_xticks(
            places, rows["policy"], rotation=30 if len(rows) > 3 else 0, ha="right" if len(rows) > 3 else "center"
        )
        axes.set_ylabel("KL(P || R) wrong - right, nats")

    return draw
