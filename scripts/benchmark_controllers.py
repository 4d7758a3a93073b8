"""Compares fixed, adaptive and PID beta on simulated plants: how fast and how well each brings the KL to its target.

python scripts/benchmark_controllers.py --output controllers.json

Plants, courses and figures are those of `trl_klx/control/plants.py`. All controllers have default
settings where their name gives none, and meet the same plants and noise. `trl-klx controllers` compares settings on
them; this script adds a PID with constant gains, and ours without each of its parts.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from trl_klx.cli.controllers_command import add_plant_options, figures_table, plants_of
from trl_klx.control import Controller, PIDController, make_controller
from trl_klx.control.plants import WINDOW, Figures, phase_figures, run_courses


class PlainPID(PIDController):
    """A PID with constant gains and without patience."""

    lowest_error = -0.5
    patience = math.inf

    def __init__(self, coef: float, *, kp: float = 0.5, ki: float = 0.02, **target_and_bounds: float) -> None:
        super().__init__(coef, kp=kp, ki=ki, gain_min=1.0, **target_and_bounds)


class ImpatientPID(PIDController):
    patience = math.inf


# name: kind, and settings other than the defaults
CONTROLLERS: dict[str, tuple[str | type[Controller], dict[str, float]]] = {
    "fixed": ("fixed", {}),
    "adaptive": ("adaptive", {}),
    "pid": ("pid", {}),
    "plain pid": (PlainPID, {}),
    # With the gains that were tuned by hand for the starter task; then our law without each of its parts.
    "plain pid, kp 4, ki 0.04": (PlainPID, {"kp": 4.0, "ki": 0.04}),
    "pid, constant gain": ("pid", {"gain_min": 1.0}),
    "pid, no patience": (ImpatientPID, {}),
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
    if isinstance(kind, str):
        return make_controller(kind, beta, target=None if kind == "fixed" else target, **settings)
    return kind(beta, target=target, **settings)


def main(arguments: list[str] | None = None) -> dict[str, Figures]:
    args = parse(arguments)
    plants = plants_of(args)
    results = {}
    for name in args.controllers:
        courses = run_courses(plants, partial(make, name), seed=args.seed + 1)
        results[name] = phase_figures(courses, args.window)
    title = f"{args.plants} plants, seed {args.seed}"
    Console(width=None if sys.stdout.isatty() else 140).print(figures_table(results, title=title, window=args.window))
    if args.output:
        Path(args.output).write_text(json.dumps({"settings": vars(args), "figures": results}, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
