"""Two pictures of the runs: KL over target and beta over the steps; reward over KL beside the frontier."""

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from .figures import BAND, STEPS, end_of
from .traces import Key, Trace


def draw(traces: dict[Key, Trace], path: Path) -> None:
    """Lines are the median over the seeds of means over five steps, areas their range; of runs of one kind the longest.

    Fixed betas are left out.
    """
    controlled = {key: trace for key, trace in traces.items() if key.controller != "fixed"}
    columns = list(dict.fromkeys((key.task, key.level) for key in controlled))
    colors = {name: f"C{place}" for place, name in enumerate(sorted({key.controller for key in controlled}))}
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=(3.4 * len(columns), 5.0),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (upper, lower), (task, level) in zip(axes.T, columns, strict=True):
        for controller, color in colors.items():
            mine = [
                t for key, t in controlled.items() if (key.task, key.level, key.controller) == (task, level, controller)
            ]
            if not mine:
                continue
            mine = [trace for trace in mine if trace["steps"] == max(trace["steps"] for trace in mine)]
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
    _save(figure, path)


def draw_frontier(traces: dict[Key, Trace], path: Path) -> None:
    """Reward over KL at the end, one panel for each task whose fixed betas give a line, with runs of as many steps.

    Nothing is drawn where there is no such task.
    """
    fixed_runs = Counter((key.task, key.steps) for key in traces if key.controller == "fixed")
    tasks = [task for task, count in fixed_runs.items() if count > 1]
    if not tasks:
        return
    ends = {key: end_of(trace) for key, trace in traces.items() if (key.task, key.steps) in tasks}
    names = sorted({key.controller for key in ends} - {"fixed"})
    markers = {name: {"color": f"C{place}", "marker": "os^Dv"[place % 5]} for place, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.8), squeeze=False, layout="constrained")
    for panel, (task, steps) in zip(axes[0], tasks, strict=True):
        mine = {key: end for key, end in ends.items() if (key.task, key.steps) == (task, steps)}
        fixed = sorted((*end, key.level) for key, end in mine.items() if key.controller == "fixed")
        panel.plot([kl for kl, _, _ in fixed], [reward for _, reward, _ in fixed], "k.-", linewidth=1)
        for kl, reward, level in fixed:
            panel.annotate(f"{level:g}", (kl, reward), (3, -11), textcoords="offset points", fontsize="x-small")
        for key, end in mine.items():
            if key.controller != "fixed":
                panel.plot(*end, **markers[key.controller], alpha=0.7)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="both", labelsize="x-small", labelrotation=60)
        panel.set_title(f"{task}, {steps} steps")
        panel.set_xlabel("KL at the end")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("reward at the end")
    marks = [plt.Line2D([], [], color="black", marker=".", label="fixed, with its beta")]
    marks += [plt.Line2D([], [], linestyle="", label=name, **marker) for name, marker in markers.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize="x-small")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
