"""The picture of over-optimisation: proxy and gold reward against the square root of the KL, with the fitted law."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, whose backend and open figures are the user's

from .law import LawFit


def plot_overoptimisation(table: list[dict[str, float]], path: Path, fit: LawFit | None, turned_at: int | None) -> Path:
    """Draw proxy reward above and gold reward below, each with ± 2 standard errors; returns the path.

    Args:
        table: rows with step, d, and proxy and gold with `_se`, as `OveroptimisationMonitor.table` has them.
        path: of the PNG, whatever its name ends with.
        fit: the law, drawn with its 95 % band over the evaluations that it is fitted to; None draws none.
        turned_at: the step at which the turn was found, which is marked; None: it was not.
    """
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    figure.suptitle("Proxy and gold reward against the KL to the reference", fontsize="medium")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    d = np.array([row["d"] for row in table])
    for axes, name, color in ((upper, "proxy", "tab:gray"), (lower, "gold", "tab:orange")):
        values, errors = (np.array([row[key] for row in table]) for key in (name, f"{name}_se"))
        axes.errorbar(d, values, 2 * np.nan_to_num(errors), fmt="o", color=color, markersize=4, capsize=2, label=name)
        axes.set_ylabel(f"{name} reward, held out")
        axes.grid(alpha=0.3)
    used = [row for row in table if turned_at is None or row["step"] <= turned_at]
    if fit is not None:
        _draw_law(lower, fit, max(row["d"] for row in used))
    if turned_at is not None:
        turn = used[-1]
        lower.plot(turn["d"], turn["gold"], "o", color="crimson", markersize=9, fillstyle="none", label="turn found")
    for row in table[:: max(1, len(table) // 8)]:
        lower.annotate(f"{row['step']}", (row["d"], row["gold"]), xytext=(4, 5), textcoords="offset points", fontsize=7)
    lower.set_xlabel("square root of the KL (KL in nats per sequence); numbers are steps")
    figure.legend(
        *lower.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.savefig(path, format="png", dpi=132)
    return path


def _draw_law(axes: Axes, fit: LawFit, end: float) -> None:
    d = np.linspace(0.0, end, 200)
    name = {"rl": r"d ($\alpha - \beta$ log d)", "best_of_n": r"d ($\alpha - \beta$ d)"}[fit.law]
    axes.plot(d, fit.gold(d), color="tab:blue", label=rf"{name}, $\alpha$ {fit.alpha:.3g}, $\beta$ {fit.beta:.3g}")
    axes.fill_between(d, *fit.band(d), color="tab:blue", alpha=0.2, label="95 % band")
    if not math.isfinite(fit.peak_kl) or math.sqrt(fit.peak_kl) > end:
        return
    low, high = (math.sqrt(value) for value in fit.peak_kl_interval)
    axes.axvline(math.sqrt(fit.peak_kl), color="tab:blue", linestyle="--", linewidth=1, label="peak, 95 % interval")
    axes.axvspan(low, min(high, end), color="tab:blue", alpha=0.08)
