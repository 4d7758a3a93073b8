"""KL over target and beta over the steps, one column of panels for each task and target."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from .figures import BAND, STEPS
from .traces import Key, Trace


def draw(traces: dict[Key, Trace], path: Path) -> None:
    """Lines are the median over the seeds of means over five steps, areas their range. Fixed betas are left out."""
    controlled = {key: trace for key, trace in traces.items() if key.controller != "fixed"}
    columns = list(dict.fromkeys((key.task, key.level) for key in controlled))
    colors = {name: f"C{place}" for place, name in enumerate(sorted({key.controller for key in controlled}))}
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.4 * len(columns), 5.0), sharex="col", sharey="row", squeeze=False
    )
    for (upper, lower), (task, level) in zip(axes.T, columns, strict=True):
        for controller, color in colors.items():
            mine = [
                t for key, t in controlled.items() if (key.task, key.level, key.controller) == (task, level, controller)
            ]
            if not mine:
                continue
            count = max(1, STEPS // mine[0]["every"])
            kls = np.array([np.convolve(t["kl"], np.full(count, 1 / count), "valid") / level for t in mine])
            betas = np.array([t["coef"][count - 1 :] for t in mine])
            for panel, rows in ((upper, kls), (lower, betas)):
                steps = (np.arange(rows.shape[1]) + count) * mine[0]["every"]
                panel.plot(steps, np.median(rows, axis=0), color=color, label=controller)
                panel.fill_between(steps, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.2)
        upper.axhline(1, color="black", linestyle="--", linewidth=1)
        upper.axhspan(1 - BAND, 1 + BAND, color="black", alpha=0.07)
        upper.set_title(f"{task}, target {level:g}")
        lower.set_yscale("log")
        lower.set_xlabel("step")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("KL over target")
    axes[1][0].set_ylabel("beta")
    lines = [plt.Line2D([], [], color=color, label=name) for name, color in colors.items()]
    axes[0][0].legend(handles=lines, fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
