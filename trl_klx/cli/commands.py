"""The command `trl-klx`. Thin: every command is the `main(argv, program)` of another module, imported when called."""

import sys
from importlib import import_module
from typing import NamedTuple

from ..launching import become
from ..recipe_files import RECIPES, accelerate_file
from .words import CommandLine


class Command(NamedTuple):
    """A command: the module whose `main` it runs, one line of help, and whether `accelerate launch` may start it."""

    module: str
    help: str
    launched: bool = False


COMMANDS = {
    "starter": Command(
        "trl_klx.tasks.starter", "make a small trained model, its data and its reward (20 s on two cores)"
    ),
    "grpo": Command("trl_klx.run.grpo", "train with GRPO, on prompts and reward functions", launched=True),
    "ppo": Command(
        "trl_klx.run.ppo", "train with PPO, on prompts and reward functions or a reward model", launched=True
    ),
    "dpo": Command("trl_klx.run.dpo", "train with DPO, on pairs of chosen and rejected answers", launched=True),
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
Recipes are in {RECIPES}
(README.md there lists them; a prepare.py beside a recipe makes its model and data).
`trl-klx COMMAND --help` shows the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(usage(), end="")
        return 0
    if name not in COMMANDS:
        print(f"error: the command {name!r} does not exist: use {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command, words, program = COMMANDS[name], CommandLine(rest), f"trl-klx {name}"
    if command.launched and "accelerate_config" in words.options and not words.asks_for_help:
        return _launch(command, words, program)
    return import_module(command.module).main(words, program=program)


def _launch(command: Command, words: CommandLine, program: str) -> int:
    """Become `accelerate launch` of a command; a dry run plans for the layout in this process."""
    layout = "".join(words.options["accelerate_config"][:1])
    config = accelerate_file(layout)
    if config is None:
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("accelerate/*.yaml")))
        print(f"error: --accelerate_config {layout} is neither a file nor one of {known}.", file=sys.stderr)
        return 2
    try:
        is_dry_run = words.flag("dry_run")
    except ValueError as error:  # or there is no such recipe: no process need be started to report that
        print(f"error: {error}", file=sys.stderr)
        return 2
    if is_dry_run:
        return import_module(command.module).main(words, program=program)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return become([*launch, "-m", command.module, *words.without("accelerate_config")])
