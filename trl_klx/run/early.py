"""What has to be known before a recipe is parsed: whether it is a dry run, for example. Read as the parser reads it."""

from argparse import ArgumentTypeError
from contextlib import suppress
from typing import Any

from transformers.hf_argparser import string_to_bool

from ..cli.parser import CommandParser, UsageError
from ..recipe_files import read_recipe


def early_flag(argv: list[str], name: str) -> bool:
    """A field that is true or false, false by default.

    Raises:
        UsageError: it is neither.
    """
    value, source = early_value(argv, name)
    if source is None:
        return False
    try:
        return string_to_bool(str(value))  # 1 and 0 in a recipe mean what they mean on the command line
    except ArgumentTypeError as error:
        raise UsageError(f"{name}={value!r} {source} must be true or false.") from error


def early_value(argv: list[str], name: str) -> tuple[Any, str | None]:
    """A field's value and, in words, where it stands: the command line, which wins, or the recipe; None: nowhere.

    A recipe that cannot be read has no fields here, for parsing it says what is wrong.
    """
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest="value", nargs="?", const="true")
    given, _ = parser.parse_known_args(argv)
    if given.value is not None:
        return given.value, "on the command line"
    with suppress(ValueError):
        recipe = read_recipe(given.config) if given.config else {}
        if name in recipe:
            return recipe[name], f"in {given.config}"
    return None, None
