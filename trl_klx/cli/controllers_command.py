"""What the controllers of beta do, and what given settings would do on simulated plants: `trl-klx controllers`."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..control.controllers import KINDS, Controller, make_controller
from ..control.plants import (
    COURSES,
    DELAY,
    EPISODES,
    GAIN,
    LAG,
    LENGTH,
    TOKENS,
    Figures,
    Plants,
    make_plants,
    measure,
    simulate,
)
from ..recipe_files import read_recipe
from .parser import CommandParser, UsageError

_COEFS = ("beta", "kl_coef")  # names of beta's start: GRPO's, and PPO's and DPO's
_SETTINGS = ("kl_horizon", "kl_kp", "kl_ki", "kl_kd", "kl_gain_min", "kl_coef_min", "kl_coef_max", "kl_coef_end")
_RELATIVE = ("coef_min", "coef_max", "coef_end")  # in the unit of beta, so a plant needs them relative to its own
_TARGETED = ("adaptive", "pid")
UPDATES = {course: len(phases) * LENGTH[course] for course, phases in COURSES.items()}


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
    parser.add_argument("--sequences", type=float, default=EPISODES, help="per update (default: %(default)s)")
    parser.add_argument("--picture", help="where to draw the KL over time")
    add_plant_options(parser)
    return parser


def add_plant_options(parser: Any) -> None:
    """The options that `plants_of` reads."""
    parser.add_argument("--plants", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of plants and noise (default: %(default)s)")
    parser.add_argument("--gain", type=float, nargs=2, default=GAIN, help="lowest and highest, log KL per log beta")
    parser.add_argument("--delay", type=int, nargs=2, default=DELAY, help="lowest and highest, in updates")
    parser.add_argument("--lag", type=float, nargs=2, default=LAG, help="lowest and highest, in updates")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="behind a reading")


def plants_of(args: Any) -> Plants:
    """The plants that the options ask for."""
    chosen = {name: getattr(args, name) for name in ("seed", "gain", "delay", "lag", "tokens")}
    return make_plants(args.plants, **chosen)


def main(argv: list[str] | None = None, program: str = "trl-klx controllers") -> int:
    """List, simulate, and print. Returns the exit status: 0, or 2 for bad input."""
    try:
        args = command_parser(program).parse_args(argv)
        if args.plants < 1:
            raise UsageError(f"--plants is {args.plants}: give one or more.")
        rows: dict[str, tuple[str, dict[str, float]]] = {kind: (kind, {}) for kind in ("fixed", *_TARGETED)}
        kind, settings = _asked_for(args)
        if settings or kind not in (None, *rows):
            rows[_name(kind, settings)] = (str(kind), settings)
        for controller in rows.values():
            _make(*controller, beta=1.0, target=1.0, total=1)  # refuses what it cannot take
        _check_picture(args.picture)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plants = plants_of(args)
    figures = {name: _measure(plants, args, *controller) for name, controller in rows.items()}
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(kinds_table())
    console.print(figures_table(figures, title=f"{args.plants} simulated plants, seed {args.seed}"))
    if args.picture:
        _draw(plants, args, rows)
        console.print(f"picture: {args.picture}")
    return 0


def kinds_table() -> Table:
    """The controllers that there are, and the defaults of their settings."""
    table = Table(title="kl_controller", caption="Beta is `beta` in GRPO, `kl_coef` in PPO and DPO.", show_lines=True)
    table.add_column("kind")
    table.add_column("what it does")
    table.add_column("settings and defaults")
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


def figures_table(results: Mapping[str, Figures], *, title: str, window: int = 100) -> Table:
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


def _asked_for(args: Any) -> tuple[str | None, dict[str, float]]:
    """Kind and settings of the recipe and the command line, bounds and ends relative to the start of beta."""
    given = _read_fields(args.config) if args.config else {}
    given |= {name: value for name, value in vars(args).items() if name in _known() and value is not None}
    kind = given.get("kl_controller")
    start = next((given[name] for name in _COEFS if given.get(name) is not None), 1.0)
    settings = {name.removeprefix("kl_"): given[name] for name in _SETTINGS if given.get(name) is not None}
    if settings and kind is None:
        raise UsageError(f"kl_{next(iter(settings))} belongs to no controller: give --kl_controller.")
    for name in _RELATIVE:
        if name in settings:
            settings[name] = _positive(f"kl_{name}", settings[name]) / _positive("the start of beta", start)
    return kind, settings


def _known() -> set[str]:
    return {"kl_controller", *_COEFS, *_SETTINGS}


def _read_fields(name: str) -> dict[str, Any]:
    """The fields of a recipe that say where beta starts and what moves it."""
    content = read_recipe(name)
    # Of DPO's two coefficients it is kl_coef that weights the KL.
    if "kl_coef" in content:
        content.pop("beta", None)
    return {name: value for name, value in content.items() if name in _known()}


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{name} is {value!r}: give a number above 0.")
    return float(value)


def _check_picture(name: str | None) -> None:
    if name and not Path(name).resolve().parent.is_dir():
        raise UsageError(f"--picture {name}: the folder {Path(name).parent} does not exist.")


def _name(kind: str | None, settings: Mapping[str, float]) -> str:
    return ", ".join([str(kind), *(f"{name} {value:g}" for name, value in settings.items())])


def _make(kind: str, settings: Mapping[str, float], *, beta: float, target: float, total: int) -> Controller:
    own = {name: value * beta if name in _RELATIVE else value for name, value in settings.items()}
    if "total" in KINDS[kind].takes:
        own["total"] = total
    return make_controller(kind, beta, target=target if kind in _TARGETED else None, **own)


def _measure(plants: Plants, args: Any, kind: str, settings: Mapping[str, float]) -> Figures:
    # An annealed beta does not look at the KL: it has its course by the end of the longer one.
    total = max(UPDATES.values())
    return measure(
        plants,
        lambda beta, target: _make(kind, settings, beta=beta, target=target, total=total),
        seed=args.seed + 1,
        episodes=args.sequences,
    )


def _draw(plants: Plants, args: Any, rows: Mapping[str, tuple[str, Mapping[str, float]]]) -> None:
    """KL over target in both courses: the median over the plants, and the middle 80 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(COURSES), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (course, phases) in zip(axes, COURSES.items(), strict=True):
        for name, (kind, settings) in rows.items():
            controllers = [
                _make(kind, settings, beta=beta, target=target, total=max(UPDATES.values()))
                for beta, target in zip(plants.beta, plants.target, strict=True)
            ]
            relative = simulate(plants, controllers, course, args.seed + 1, args.sequences)
            low, middle, high = np.quantile(relative, [0.1, 0.5, 0.9], axis=1)
            (line,) = axis.plot(middle, label=name)
            axis.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for place, phase in enumerate(phases):
            axis.axvline(place * LENGTH[course], color="0.8", linewidth=0.8, zorder=0)
            axis.text(place * LENGTH[course], 1.01, f" {phase}", transform=axis.get_xaxis_transform(), fontsize=9)
        axis.axhspan(0.75, 1.25, color="0.92", zorder=0)
        axis.set(yscale="log", ylim=(0.05, 20), xlabel="update", ylabel="KL / target")
    axes[0].legend(fontsize=9)
    figure.savefig(args.picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
