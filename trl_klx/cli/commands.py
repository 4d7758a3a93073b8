"""The command `trl-klx`. Thin: every command is the `main(argv, program)` of another module, imported when called."""

import difflib
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..launching import become
from ..recipe_files import RECIPES, accelerate_file
from .parser import UsageError
from .words import CommandLine


class Command(NamedTuple):
    """A command: the module whose `main` it runs, one line of help, whether `accelerate launch` may start it, and the
    least that a training command needs.
    """

    module: str
    help: str
    launched: bool = False
    needs: str | None = None


_SAMPLER = "--model_name_or_path, --dataset_name and --reward_funcs"
COMMANDS = {
    "starter": Command(
        "trl_klx.tasks.starter", "make a small trained model, its data and its reward (20 s on two cores)"
    ),
    "grpo": Command(
        "trl_klx.run.grpo", "train with GRPO, on prompts and reward functions", launched=True, needs=_SAMPLER
    ),
    "ppo": Command(
        "trl_klx.run.ppo",
        "train with PPO, on prompts and reward functions or a reward model",
        launched=True,
        needs=_SAMPLER,
    ),
    "dpo": Command(
        "trl_klx.run.dpo",
        "train with DPO, on pairs of chosen and rejected answers",
        launched=True,
        needs="--model_name_or_path and --dataset_name",
    ),
    "new": Command("trl_klx.run.new_command", "write a recipe, a reward and two rows of data for a model"),
    "recipes": Command("trl_klx.cli.recipes_command", "list the recipes of the package, or copy one here"),
    "explain": Command(
        "trl_klx.run.explain.explain_command", "show which gradient a recipe has, and what to use instead"
    ),
    "controllers": Command(
        "trl_klx.cli.controllers_command", "list the controllers of beta, and try settings on simulated plants"
    ),
    "measure": Command(
        "trl_klx.measure.measure_command", "compare checkpoints with a reference on given responses", launched=True
    ),
    "card": Command("trl_klx.hub.card_command", "write the model card of a run again, and push what the run left"),
    "completion": Command("trl_klx.cli.completion", "print a script for shell completion"),
}


def usage() -> str:
    """What `trl-klx --help` prints."""
    lines = "\n".join(f"  {name:<11} {command.help}" for name, command in COMMANDS.items())
    return f"""\
usage: trl-klx COMMAND [options]

{lines}

Training: trl-klx grpo --config RECIPE.yaml [--accelerate_config cpu] [--field value ...], and ppo and dpo alike.
With --dry_run they train nothing, and print what a run would need and everything that is wrong with it.
To begin: `trl-klx new grpo --model_name_or_path MODEL` writes a recipe; `trl-klx recipes` lists those of the package.
`trl-klx COMMAND --help` shows the options of a command, `trl-klx --version` the versions of what runs.
"""


def versions() -> str:
    """What `trl-klx --version` prints; none of the packages is imported for it."""
    own = import_module(__name__.partition(".")[0]).__version__
    found = [f"Python {platform.python_version()}"]
    for name in ("trl", "transformers", "torch", "accelerate", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"trl_klx {own} ({', '.join(found)})"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(usage(), end="")
        return 0
    if name == "--version":
        print(versions())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"error: the command {name!r} does not exist: {hint}use {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command, words, program = COMMANDS[name], CommandLine(rest), f"trl-klx {name}"
    if command.needs is not None and not rest:
        print(
            f"error: {program} needs a recipe, --config RECIPE.yaml (`trl-klx new {name}` writes one, and `trl-klx "
            f"recipes` lists some), or at least {command.needs}.",
            file=sys.stderr,
        )
        return 2
    try:
        launcher = _launcher(words) if command.launched and not words.asks_for_help else None
    except ValueError as error:  # or there is no such recipe: no process need be started to report that
        print(f"error: {error}", file=sys.stderr)
        return 2
    if launcher is None:
        return import_module(command.module).main(words, program=program)
    return become([*launcher, "-m", command.module, *words.without("accelerate_config")])


def _launcher(words: CommandLine) -> list[str] | None:
    """`accelerate launch` as words or recipe ask for it, as in TRL's commands. None: one process is enough, for a dry
    run too, which plans for the layout.

    Raises:
        ValueError: what they ask for does not exist, or the recipe cannot be read.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    layout = words.given("accelerate_config")
    if layout is not None:
        config = accelerate_file(str(layout))
        if config is None:
            known = ", ".join(sorted(path.stem for path in RECIPES.glob("accelerate/*.yaml")))
            raise UsageError(f"--accelerate_config {layout} is neither a file nor one of {known}.")
        launch += ["--config_file", str(config)]
    processes = words.given("num_processes")
    if processes is not None:
        if not str(processes).isdecimal() or int(processes) < 1:
            raise UsageError(f"num_processes={processes!r} must be a whole number, at least 1.")
        launch += ["--num_processes", str(processes)]
    is_alone = layout is None and int(processes or 1) == 1
    return None if is_alone or words.flag("dry_run") else launch
