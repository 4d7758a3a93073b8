"""Compares fixed, adaptive and PID beta on simulated plants: how fast and how well each brings the KL to its target.

python scripts/benchmark_controllers.py --output controllers.json

Plants, courses and figures are those of `trl_klx/control/plants.py`; the second table is of plants that were fitted to
real runs (`trl_klx/control/learners.py`), its figures those of `control_bench/figures.py`, of the true KL. All
controllers have default settings where their name gives none, and meet the same plants and noise. `trl-klx
controllers` compares settings on the first.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
from control_bench.figures import figures
from rich.console import Console
from rich.table import Table

from trl_klx.cli.controllers_command import add_plant_options, figures_table, plants_of
from trl_klx.control import Controller, make_controller
from trl_klx.control.learners import FITTED, make_learners, simulate
from trl_klx.control.plants import WINDOW, Figures, phase_figures, run_courses

# name: kind, and settings other than the defaults
CONTROLLERS: dict[str, tuple[str, dict[str, float]]] = {
    "fixed": ("fixed", {}),
    "adaptive": ("adaptive", {}),
    "pid": ("pid", {}),
    "pid, gain_min 1": ("pid", {"gain_min": 1.0}),
    "pid, half the gains": ("pid", {"kp": 1.0, "ki": 0.05}),
    "pid, kp 1": ("pid", {"kp": 1.0}),
    "pid, ki 0.05": ("pid", {"ki": 0.05}),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plant_options(parser)
    parser.add_argument("--window", type=int, default=WINDOW, help="updates within the band that count as settled")
    parser.add_argument("--controllers", nargs="+", choices=list(CONTROLLERS), default=list(CONTROLLERS))
    parser.add_argument("--output", default=None, help="JSON file for the figures")
    return parser.parse_args(arguments)


def make(name: str, beta: float, target: float) -> Controller:
    kind, settings = CONTROLLERS[name]
    return make_controller(kind, beta, target=None if kind == "fixed" else target, **settings)


UPDATES = 150  # on plants that learn


def on_learners(name: str, kind: str, count: int, seed: int) -> dict[str, float]:
    """How a controller holds plants near one that was fitted to a run."""
    plants = make_learners(count, seed=seed, names=[kind])
    controllers = [make(name, beta, target) for beta, target in zip(plants.beta, plants.target, strict=True)]
    relative, _ = simulate(plants, controllers, UPDATES, seed + 1)
    still = [0.0] * UPDATES
    found = [figures({"level": 1.0, "every": 1, "kl": list(kls), "kl_se": still}) for kls in relative.T]
    there = [one for one in found if one.crossed is not None]
    if not there:
        return {"crossed": 0.0}
    highest = [one.overshoot for one in there]
    return {
        "crossed": len(there) / count,
        "crossed at": float(np.median([one.crossed for one in there])),
        "within 25 %": float(np.mean([one.within for one in there])),
        "highest mean, median": float(np.median(highest)),
        "highest mean, 90 %": float(np.quantile(highest, 0.9)),
        "lowest mean, median": float(np.median([one.undershoot for one in there])),
        "lowest mean, 10 %": float(np.quantile([one.undershoot for one in there], 0.1)),
    }


def learners_table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=f"Plants near those fitted to real runs, {UPDATES} updates")
    columns = list(max((found for kinds in results.values() for found in kinds.values()), key=len))
    for column in ("plant, controller", *columns):
        table.add_column(column, justify="left" if column.startswith("plant") else "right")
    for kind in FITTED:
        for name, kinds in results.items():
            cells = [kinds[kind].get(column, math.nan) for column in columns]
            texts = [
                f"{cell:.0f}" if column == "crossed at" else f"{cell:.2f}"
                for column, cell in zip(columns, cells, strict=True)
            ]
            table.add_row(f"{kind}, {name}", *texts)
        table.add_section()
    return table


def main(arguments: list[str] | None = None) -> dict[str, Figures]:
    args = parse(arguments)
    plants = plants_of(args)
    results = {}
    for name in args.controllers:
        courses = run_courses(plants, partial(make, name), seed=args.seed + 1)
        results[name] = phase_figures(courses, args.window)
    title = f"{args.plants} plants, seed {args.seed}"
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(figures_table(results, title=title, window=args.window))
    learning = {
        name: {kind: on_learners(name, kind, max(1, args.plants // 5), args.seed) for kind in FITTED}
        for name in args.controllers
    }
    console.print(learners_table(learning))
    if args.output:
        written = {"settings": vars(args), "figures": results, "learners": learning}
        Path(args.output).write_text(json.dumps(written, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
