"""`trl-klx recipes`: what recipes came with the package, and a copy of one to change."""

import shutil
import sys
from pathlib import Path

from ..recipe_files import RECIPES
from .parser import CommandParser, UsageError

_ALGORITHMS = ("grpo_", "ppo_", "dpo_")  # as the files' names begin


def command_parser(program: str) -> CommandParser:
    """What `trl-klx recipes` takes."""
    parser = CommandParser(
        prog=program,
        description="List the recipes that came with the package, each with the question that it answers, or copy one "
        "to this folder, to change it. In any folder, --config finds them by the names that are listed.",
    )
    parser.add_argument("recipe", nargs="?", help="which to copy, for example starter/grpo_exact_both_pid")
    parser.add_argument("--to", help="the file to write (default: its own name, in this folder)")
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx recipes") -> int:
    """Returns the exit status."""
    try:
        args = command_parser(program).parse_args(argv)
        if args.recipe is None and args.to is not None:
            raise UsageError(f"--to {args.to} names a copy: name the recipe to copy, too.")
        if args.recipe is None:
            _list()
        else:
            _copy(args.recipe, args.to)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _shipped() -> list[Path]:
    return sorted(path for path in RECIPES.glob("*/*.yaml") if path.name.startswith(_ALGORITHMS))


def _list() -> None:
    for path in _shipped():
        print(f"{RECIPES.name}/{path.relative_to(RECIPES).as_posix()}\n    {question(path.read_text())}")
    print(f"\nThey lie in {RECIPES}. README.md there compares them; a prepare.py beside some makes model and data.")


def question(text: str) -> str:
    """The first sentence of a recipe's header."""
    header = text.split("\n#\n")[0].replace("\n#", "")
    return header.removeprefix("# Question: ").partition("?")[0] + "?"


def _copy(name: str, to: str | None) -> None:
    """Copy a recipe. Raises ValueError where there is none of the name, or something in the copy's place."""
    wanted = Path(name).with_suffix(".yaml").parts
    found = [path for path in _shipped() if path.parts[-len(wanted) :] == wanted]
    if len(found) != 1:
        several = ", ".join("/".join(path.parts[-2:]) for path in found)
        raise UsageError(
            f"the recipe {name} is one of several, {several}: name its folder, too."
            if found
            else f"the recipe {name} does not exist: `trl-klx recipes` lists those that do."
        )
    target = Path(to or found[0].name)
    if target.is_dir():
        target /= found[0].name
    if target.exists():
        raise UsageError(f"{target} exists: name another file by --to, or move it away.")
    try:
        shutil.copyfile(found[0], target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}): name another file by --to.") from error
    algorithm = found[0].name.split("_")[0]
    print(f"copied to {target}: `trl-klx {algorithm} --config {target}` runs it, with --dry_run it is only checked.")
