"""What the controllers of beta do, and what given settings would do on simulated plants: `trl-klx controllers`."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from ..control import plants as simulation
from ..control.controllers import KINDS, Controller, make_controller
from ..control.plants import COURSES, LENGTH, Array, Figures, Plants
from ..recipe_files import read_recipe
from .parser import CommandParser, UsageError

_COEFS = ("beta", "kl_coef")  # names of beta's start: GRPO's, and PPO's and DPO's
_SETTINGS = ("kl_horizon", "kl_kp", "kl_ki", "kl_gain_min", "kl_coef_min", "kl_coef_max", "kl_coef_end")
_RELATIVE = ("coef_min", "coef_max", "coef_end")  # in the unit of beta, so a plant needs them relative to its own
_TARGETED = ("adaptive", "pid")
_LONGEST = max(len(phases) * LENGTH[course] for course, phases in COURSES.items())  # updates


def command_parser(program: str) -> CommandParser:
    """What `trl-klx controllers` takes."""
    parser = CommandParser(
        prog=program,
        description="List the controllers of beta, and show what the defaults, and the settings of a recipe or of the "
        "command line, do on simulated plants (trl_klx/control/plants.py): how soon the KL settles within 25 %% of its "
        "target, and by how much it overshoots.",
    )
    parser.add_argument("--config", help="a recipe, whose controller is compared with the defaults")
    parser.add_argument("--kl_controller", choices=list(KINDS), help="a controller to compare with the defaults")
    for name in _SETTINGS:
        parser.add_argument(f"--{name}", type=float, help="as in a recipe")
    parser.add_argument("--beta", type=float, help="where beta starts; only ratios to it count (default: 1)")
    parser.add_argument(
        "--sequences", type=float, default=simulation.EPISODES, help="per update (default: %(default)s)"
    )
    parser.add_argument("--picture", help="where to draw the KL over time")
    add_plant_options(parser)
    return parser


def add_plant_options(parser: Any) -> None:
    """The options that `plants_of` reads."""
    ranges = "lowest and highest"
    parser.add_argument("--plants", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of plants and noise (default: %(default)s)")
    parser.add_argument("--gain", type=float, nargs=2, default=simulation.GAIN, help=f"{ranges}, log KL per log beta")
    parser.add_argument("--delay", type=int, nargs=2, default=simulation.DELAY, help=f"{ranges}, in updates")
    parser.add_argument("--lag", type=float, nargs=2, default=simulation.LAG, help=f"{ranges}, in updates")
    parser.add_argument("--tokens", type=int, nargs="+", default=simulation.TOKENS, help="behind a reading")


def plants_of(args: Any) -> Plants:
    """The plants that the options ask for."""
    chosen = {name: getattr(args, name) for name in ("seed", "gain", "delay", "lag", "tokens")}
    return simulation.make_plants(args.plants, **chosen)


class Candidate(NamedTuple):
    """A controller to try; bounds and ends are relative to the start of beta."""

    kind: str
    settings: dict[str, float]

    @property
    def name(self) -> str:
        return ", ".join([self.kind, *(f"{name} {value:g}" for name, value in self.settings.items())])

    def make(self, beta: float, target: float) -> Controller:
        own: dict[str, Any] = {n: value * beta if n in _RELATIVE else value for n, value in self.settings.items()}
        if "total" in KINDS[self.kind].takes:
            own["total"] = _LONGEST  # an annealed beta has its course by the end of the longer one
        return make_controller(self.kind, beta, target=target if self.kind in _TARGETED else None, **own)


def main(argv: list[str] | None = None, program: str = "trl-klx controllers") -> int:
    """List, simulate, and print. Returns the exit status: 0, or 2 for bad input."""
    try:
        args = command_parser(program).parse_args(argv)
        if args.plants < 1:
            raise UsageError(f"--plants is {args.plants}: give one or more.")
        candidates = [Candidate(kind, {}) for kind in ("fixed", *_TARGETED)]
        asked = _asked_for(args)
        if asked is not None and asked not in candidates:
            candidates.append(asked)
        for candidate in candidates:
            candidate.make(1.0, 1.0)  # refuses what it cannot take
        if args.picture and not Path(args.picture).resolve().parent.is_dir():
            raise UsageError(f"--picture {args.picture}: the folder {Path(args.picture).parent} does not exist.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plants = plants_of(args)
    courses = {
        candidate.name: simulation.run_courses(plants, candidate.make, seed=args.seed + 1, episodes=args.sequences)
        for candidate in candidates
    }
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(kinds_table())
    figures = {name: simulation.phase_figures(relative) for name, relative in courses.items()}
    console.print(figures_table(figures, title=f"{args.plants} simulated plants, seed {args.seed}"))
    if args.picture:
        _draw(courses, args.picture)
        console.print(f"picture: {args.picture}")
    return 0


def kinds_table() -> Table:
    """The controllers that there are, and the defaults of their settings."""
    table = Table(title="kl_controller", caption="Beta is `beta` in GRPO, `kl_coef` in PPO and DPO.", show_lines=True)
    for column in ("kind", "what it does", "settings and defaults"):
        table.add_column(column)
    for kind, cls in KINDS.items():
        taken = {name: parameter for base in cls.__mro__ for name, parameter in _parameters(base).items()}
        settings = [f"kl_{name}{_default(taken[name])}" for name in cls.takes if name in taken and name != "total"]
        table.add_row(kind, (cls.__doc__ or "").split("\n")[0].rstrip("."), ", ".join(settings) or "-")
    return table


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    init = vars(cls).get("__init__")
    return inspect.signature(init).parameters if inspect.isfunction(init) else {}


def _default(parameter: inspect.Parameter) -> str:
    if parameter.name in ("target", "coef_end"):
        return " (required)"
    factor = {"coef_min": "start / 100", "coef_max": "100 start"}.get(parameter.name)
    return f" = {factor or format(parameter.default, 'g')}"


def figures_table(results: Mapping[str, Figures], *, title: str, window: int = simulation.WINDOW) -> Table:
    """The figures of controllers on plants, a row per controller and phase: median / 90 % quantile over the plants."""
    caption = f"median / 90 % quantile over the plants; settled: within 25 % of the target for {window} updates"
    table = Table(title=title, caption=caption)
    table.add_column("controller, phase")
    for column in ("settling, updates", "never settled", "within 25 %", "overshoot", "error"):
        table.add_column(column, justify="right")
    for name, phases in results.items():
        for phase, found in phases.items():
            table.add_row(
                f"{name}, {phase}",
                _pair(found, "settling", "{:.0f}"),
                f"{found['never settled']:.0%}",
                f"{found['within']:.0%}",
                _pair(found, "overshoot", "{:.2f}"),
                _pair(found, "error", "{:.2f}"),
            )
        table.add_section()
    return table


def _pair(found: Mapping[str, float | None], name: str, form: str) -> str:
    values = (found[f"{name}, median"], found[f"{name}, 90 %"])
    return " / ".join("-" if value is None else form.format(value) for value in values)


def _asked_for(args: Any) -> Candidate | None:
    """The controller of the recipe and the command line."""
    given = read_recipe(args.config) if args.config else {}
    if "kl_coef" in given:  # of DPO's two coefficients it is kl_coef that weights the KL
        given.pop("beta", None)
    given |= {name: value for name, value in vars(args).items() if value is not None}
    kind = given.get("kl_controller")
    start = next((given[name] for name in _COEFS if given.get(name) is not None), 1.0)
    settings = {name.removeprefix("kl_"): given[name] for name in _SETTINGS if given.get(name) is not None}
    if settings and kind is None:
        raise UsageError(f"kl_{next(iter(settings))} belongs to no controller: give --kl_controller.")
    for name in _RELATIVE:
        if name in settings:
            settings[name] = _positive(f"kl_{name}", settings[name]) / _positive("the start of beta", start)
    return None if kind is None else Candidate(kind, settings)


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{name} is {value!r}: give a number above 0.")
    return float(value)


def _draw(courses: Mapping[str, Mapping[str, Array]], path: str) -> None:
    """KL over target in both courses: the median over the plants, and the middle 80 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(COURSES), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (course, phases) in zip(axes, COURSES.items(), strict=True):
        for (name, relative), style in zip(courses.items(), ("-", "--", "-.", ":"), strict=False):
            low, middle, high = np.quantile(relative[course], [0.1, 0.5, 0.9], axis=1)
            (line,) = axis.plot(middle, style, label=name)
            axis.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for place, phase in enumerate(phases):
            axis.axvline(place * LENGTH[course], color="0.8", linewidth=0.8, zorder=0)
            axis.text(place * LENGTH[course], 1.01, f" {phase}", transform=axis.get_xaxis_transform(), fontsize=9)
        axis.axhspan(0.75, 1.25, color="0.92", zorder=0)
        axis.set(yscale="log", ylim=(0.05, 20), xlabel="update", ylabel="KL / target")
    figure.suptitle("KL over its target on simulated plants: median, middle 80 %; grey: within 25 %", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(courses), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
