"""Parsing a recipe to the end: every complaint is collected, and what it was about is left out."""

import dataclasses
import re
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ...cli.parser import UsageError
from ...config.check import settle
from ...recipe_files import read_recipe
from ..arguments import BadInput, Recipe, known_fields, parse_recipe, stray_word, unknown_field
from ..early import early_flag

_GIVE_UP_AFTER = 12


class Lenient(NamedTuple):
    """The recipe as far as it can be read (None: not at all), and a sentence for each problem on the way."""

    recipe: Recipe | None
    problems: list[str]


def parse_leniently(program: str, config: type, argv: list[str]) -> Lenient:
    """Parse a recipe, collecting what every rule has to say instead of stopping at the first.

    Raises:
        BadInput: there is no recipe to read at all.
    """
    problems: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not _has_accelerator():
            with suppress(UsageError):  # what is neither true nor false is left for the parser to refuse
                early_flag(argv, "use_cpu")
                argv = [*argv, "--use_cpu", "true"]
        try:
            return Lenient(parse_recipe(program, config, argv), problems)
        except BadInput:
            given, overrides, source = _split(argv)
        problems += [stray_word(word) for word in argv[:1] if not word.startswith("--")]
        known = known_fields(config)
        for name in [name for name in (*given, *overrides) if name.removeprefix("no_") not in known]:
            problems.append(unknown_field(name, known))
            given.pop(name, None)
            overrides.pop(name, None)
        broken = _broken_rules(program, config, given, overrides, source)
        problems += broken
        if broken:  # what TRL says of the rest is asked without the fields of ours that contradict each other
            own = {name for name in known if name.startswith(("kl_", "gold_", "allow_biased", "use_bias_correction"))}
            given, overrides = ({k: v for k, v in d.items() if k not in own} for d in (given, overrides))
        for _ in range(_GIVE_UP_AFTER):
            try:
                return Lenient(_parse(program, config, given, overrides, source), problems)
            except BadInput as error:
                sentence = str(error)
            problems += [sentence] * (sentence not in problems)
            blamed = [name for name in re.findall(r"\w+", sentence) if name in given or name in overrides]
            if not blamed:
                return Lenient(None, problems)
            given.pop(blamed[0], None)
            overrides.pop(blamed[0], None)
    return Lenient(None, problems)


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _split(argv: list[str]) -> tuple[dict[str, Any], dict[str, list[str]], str]:
    """The recipe's fields, those of the command line with their words, and the recipe's path as it was given.

    Raises:
        BadInput: the file is missing, or no mapping.
    """
    overrides: dict[str, list[str]] = {}
    name = ""
    for word in (part for text in argv for part in (text.split("=", 1) if text.startswith("--") else [text])):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            overrides[name] = []
        elif name:
            overrides[name].append(word)
    source = str(Path(*overrides.pop("config", [])))
    try:
        return {str(name): value for name, value in read_recipe(source).items()}, overrides, source
    except ValueError as error:
        raise BadInput(str(error)) from error


def _parse(program: str, config: type, given: dict[str, Any], overrides: dict[str, list[str]], source: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(given))
        words = [word for name, values in overrides.items() for word in (f"--{name}", *values)]
        try:
            return parse_recipe(program, config, ["--config", str(path), *words])
        except BadInput as error:
            raise BadInput(str(error).replace(str(path), source)) from error


def _broken_rules(
    program: str, config: type, given: dict[str, Any], overrides: dict[str, list[str]], source: str
) -> list[str]:
    """What each rule of this package says of the fields as they were given, asked one by one."""
    unchecked = type("Unchecked", (config,), {"__post_init__": lambda self: None})
    try:
        args = _parse(program, dataclasses.dataclass(unchecked), given, overrides, source).args
    except BadInput:
        return []  # a value of the wrong type, which the next attempt names
    return list(settle(args).values())
