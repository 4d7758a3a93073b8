"""Parsing a recipe, once and to the end: what can be read of it, and a sentence for everything that is wrong with it.

Training stops at the first of these sentences, a dry run prints them all.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from trl import ModelConfig

from ...cli.words import CommandLine
from ...config.check import settle
from ...config.names import RENAMED, does_not_exist, with_new_names
from ...config.options import KLArguments
from ...config.types import convert, default_of, field_kinds, is_list
from ...recipe_files import truth
from ...trainers.checks.loading import loading_arguments
from .arguments import BadInput, Recipe, RunArguments

_COMMAND_LINE = "on the command line"
_TRIES = 12
# Sentences of TRL and transformers, by how they begin, in our words.
_REMEDIES = {
    "Your setup doesn't support bf16/gpu": (
        "bf16=True, which is TRL's default, needs a GPU that has it, and none is here: set bf16 to false and, without "
        "a GPU, use_cpu to true."
    ),
    "generation_batch_size (": (
        "{}, and is per_device_train_batch_size * steps_per_generation * processes where it is not given: change one "
        "of these."
    ),
    "Expected a string path to an existing deepspeed config": (
        "deepspeed names no file with a configuration of DeepSpeed: give one, or instead set accelerate_config to "
        "zero2 or zero3."
    ),
}
_OURS = ("kl_", "gold_", "allow_biased", "use_bias_correction")  # how fields of this package begin


class Parsed(NamedTuple):
    """A recipe as far as it can be read (None: not at all), and a sentence for each problem."""

    recipe: Recipe | None
    problems: list[str]

    def whole(self) -> Recipe:
        """The recipe. Raises BadInput with the first problem, where there is one."""
        for problem in self.problems:
            raise BadInput(problem)
        assert self.recipe is not None  # or there would be a problem
        return self.recipe


def parse(config: type, words: Iterable[str], **overrides: bool) -> Parsed:
    """Parse `--config recipe.yaml --any_field value ...`; the command line wins.

    Args:
        config: the trainer's config class.
        words: of the command line; a `CommandLine` is not read again.
        overrides: truth values that fields take whatever is given, unless that is none.

    Raises:
        BadInput: there is no recipe to read at all.
    """
    line = words if isinstance(words, CommandLine) else CommandLine(words)
    problems: list[str] = []
    given = _given_fields(line, known_fields(config), problems)
    given |= {name: value for name, value in overrides.items() if truth(given.get(name, value)) is not None}
    if all(truth(given.get(name)) for name in ("load_in_4bit", "load_in_8bit")):
        problems.append("load_in_4bit=True and load_in_8bit=True cannot both be: remove one of the two.")
        del given["load_in_8bit"]
    run, model, args = (_made(part, given, problems) for part in (RunArguments, ModelConfig, config))
    if run is None or model is None or args is None:
        return Parsed(None, problems)
    try:
        _take_loading_arguments(args, model)
    except ValueError as error:
        problems.append(str(error))
    return Parsed(Recipe(run, args, model), problems)


def known_fields(config: type) -> dict[str, tuple]:
    """The fields that a recipe of a trainer's `config` class may have, and the types that each takes."""
    parts = (RunArguments, config, ModelConfig)
    kinds = {name: kind for part in parts for name, kind in field_kinds(part).items()}
    names = {f.name for part in parts for f in dataclasses.fields(part) if f.init}
    names -= {name for name, other in RENAMED.items() if other in names}  # as two of PPO's
    return {name: kinds[name] for name in sorted(names)} | {"env": (dict,)}


def _given_fields(line: CommandLine, known: dict[str, tuple], problems: list[str]) -> dict[str, Any]:
    """The fields of the file and of the command line, which wins; `env` is put into the environment."""
    problems += [_stray(word) for word in line.stray]
    given = {}
    try:
        recipe = dict(line.recipe)
    except ValueError as error:
        raise BadInput(str(error)) from error
    place = f"in {line.options['config'][0]}" if recipe else ""
    recipe, wrong = with_new_names(recipe, known, place)
    problems += wrong
    for name, value in recipe.items():
        if name not in known:
            problems.append(f"{place}, {does_not_exist(name, known)}")
        elif isinstance(value, dict) and dict not in known[name]:
            problems.append(f"{name} must be a plain value, not a mapping: recipes are flat.")
        else:
            given[name] = value
    for name, value in (given.pop("env", None) or {}).items():
        os.environ[str(name)] = str(value)
    options, wrong = with_new_names(line.options, known, _COMMAND_LINE)
    problems += wrong
    for option, words in options.items():
        if option == "config":
            problems += [_stray(word) for word in words[1:]]
        else:
            _take_option(option, words, known, given, problems)
    return given


def _take_option(
    option: str, words: list[str], known: dict[str, tuple], given: dict[str, Any], problems: list[str]
) -> None:
    """Put what the words after an option mean into `given`: a list takes all of them, a truth value may have none."""
    name = option.removeprefix("no_") if option not in known else option
    kinds = known.get(name, ())
    negated = name != option
    if name not in known or (negated and bool not in kinds):
        problems.append(f"{_COMMAND_LINE}, {does_not_exist(option, known)}")
        return
    takes_all = any(map(is_list, kinds)) and (str not in kinds or len(words) > 1)
    if negated or (not words and bool in kinds):
        given[name], rest = not negated, words
    elif not words:
        problems.append(f"--{option} needs a value: write --{option} VALUE.")
        return
    else:
        given[name], rest = (list(words), []) if takes_all else (words[0], words[1:])
    problems += [_stray(word) for word in rest]


def _made(part: type, given: dict[str, Any], problems: list[str]) -> Any:
    """An instance of a part of the recipe, without what is wrong with it; None where none can be made.

    What TRL and transformers refuse is left out, field by field, as long as their sentences name one.
    """
    draft: Any = object.__new__(part)  # not yet what `__post_init__` makes of it
    fields = [field for field in dataclasses.fields(part) if field.init]
    for field in fields:
        setattr(draft, field.name, given[field.name] if field.name in given else default_of(field))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = settle(draft) if isinstance(draft, KLArguments) else convert(draft)
    problems += [sentence for sentence in wrong.values() if sentence not in problems]
    kept = [field.name for field in fields if field.name in given and field.name not in wrong]
    if wrong:  # what TRL finds wrong with the rest is asked without the fields of ours that contradict each other
        kept = [name for name in kept if not name.startswith(_OURS)]
    values = {name: getattr(draft, name) for name in kept}
    for _ in range(_TRIES):
        try:
            return part(**values)
        except (ValueError, OSError, TypeError) as error:  # the latter two of files and mappings that TRL takes apart
            what = "" if isinstance(error, ValueError) else "a field that holds a file or a mapping cannot be read: "
            sentence = f"{what}{_with_remedy(str(error))}"
        problems += [sentence] * (sentence not in problems)
        blamed = next((name for name in re.findall(r"\w+", sentence) if name in values), None)
        if blamed is None:
            return None
        del values[blamed]
    return None


def _with_remedy(sentence: str) -> str:
    """What TRL or transformers refuse, with the fields that a recipe has, and with what to do."""
    for start, own in _REMEDIES.items():
        if sentence.startswith(start):
            return own.format(sentence.rstrip("."))
    return sentence


def _take_loading_arguments(args: Any, model: ModelConfig) -> None:
    """Let `model_init_kwargs` set what has a field of its own too; TRL's fields have defaults, which would win.

    Raises:
        ValueError: both are given, and differ; or the field cannot hold the value.
    """
    if args.model_init_kwargs is None:
        return
    loading = loading_arguments(args.model_init_kwargs)
    for option, name in (("dtype", "dtype"), ("model_revision", "revision"), ("attn_implementation",) * 2):
        if name not in loading:
            continue
        value, own = loading.pop(name), getattr(model, option)
        if own not in (value, getattr(ModelConfig(), option)):
            raise ValueError(
                f"{option}={own!r} and model_init_kwargs with {name}={value!r} differ: remove one of them."
            )
        setattr(model, option, value)
    args.model_init_kwargs = loading or None
    for problem in convert(model).values():
        raise ValueError(f"in model_init_kwargs, {problem}")


def _stray(word: str) -> str:
    form = f"--config {word}" if word.endswith((".yaml", ".yml")) else "--field value"
    return f"{word!r} on the command line belongs to no field: write {form}."
