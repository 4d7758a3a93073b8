"""What a shell completes after `trl-klx`: every command with its options: `trl-klx completion bash`.

The script is static: asking the program at every key would import TRL for seconds.
"""

import argparse
import sys
from importlib import import_module

import shtab

from .commands import COMMANDS
from .parser import CommandParser, UsageError


def command_parser(program: str) -> CommandParser:
    """What `trl-klx completion` takes."""
    parser = CommandParser(
        prog=program,
        description="Print a script that completes commands and options. It is written once, for example with "
        "trl-klx completion bash > ~/.local/share/bash-completion/completions/trl-klx",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx completion") -> int:
    """Print the script. Returns the exit status: 0, or 2 for bad input."""
    try:
        shell = command_parser(program).parse_args(argv).shell
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser for all commands."""
    whole = argparse.ArgumentParser(prog="trl-klx")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        own = [import_module(command.module).command_parser(f"trl-klx {name}")]
        added = commands.add_parser(name, help=command.help, parents=own, add_help=False)
        for action in added._actions:
            action.help = None if action.help is None else action.help.split(". ")[0].replace("\n", " ")
            if not action.choices and action.nargs != 0:
                vars(action)["complete"] = shtab.FILE
    return whole
