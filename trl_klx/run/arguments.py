"""Reading a recipe: YAML file, command line, and one clear sentence for whatever is wrong with them."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from trl import ModelConfig, ScriptArguments, TrlParser

from ..config.types import convert, field_kinds
from ..recipe_files import read_recipe, shipped_recipe
from ..trainers.checks.loading import loading_arguments


@dataclass
class RunArguments(ScriptArguments):
    """What TRL's scripts take, with rewards by name."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, as module.function or path/to/file.py:function, for example "
            "trl_klx.rewards.exact_match."
        },
    )
    gold_reward_func: str | None = field(
        default=None,
        metadata={
            "help": "What the reward stands for, as one more function: scored in evaluation, never trained on. GRPO "
            "and PPO follow it against the KL, and act by gold_action when it has turned."
        },
    )
    dataset_prepare: str | None = field(
        default=None,
        metadata={
            "help": "Function of a dataset's row, named like a reward, whose result takes the row's place, for example "
            "trl_klx.tasks.gsm8k.gsm8k_prompts."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: print the resolved configuration, parameter counts, a memory estimate, the "
            "gradient and every problem found. Exit status 1 where there are problems."
        },
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Accelerate file whose layout a dry run plans for (`trl-klx` starts it)."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # YAML with one name and no brackets
            self.reward_funcs = [self.reward_funcs]


class Recipe(NamedTuple):
    """A parsed recipe: dataset and rewards, the config of the trainer, and how the model is loaded."""

    run: RunArguments
    args: Any  # KLXGRPOConfig, KLXPPOConfig or KLXDPOConfig
    model: ModelConfig


class _Parser(TrlParser):
    """TRL's, raising what argparse prints; a word of the wrong type is left to the rules of the fields."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        for action in self._actions:
            if action.type is not None:
                action.type, action.choices = _as_far_as_it_goes(action.type), None

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see `{self.prog} --help`.")


def _as_far_as_it_goes(convert: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            return text

    return parse


class BadInput(ValueError):
    """Something the user gave cannot work. The message is one sentence that names the field, value and remedy."""


def parse_recipe(program: str, config: type, argv: list[str]) -> Recipe:
    """Parse `--config recipe.yaml --any_field value …`, with a trainer's `config` class; the command line wins.

    A recipe that is not there but comes with the package (recipes/starter/…) is taken from the package.

    Raises:
        BadInput: the file is missing or no mapping, or a field or value does not exist.
    """
    dataclass_types: tuple[Any, ...] = (RunArguments, config, ModelConfig)
    parser = _Parser(dataclass_types, prog=program, usage=f"{program} --config RECIPE.yaml [--field value ...]")
    for action in parser._actions:
        if action.dest == "liger_kernel_config":  # the one mapping that transformers does not read from text
            action.type = json.loads
    argv = [part for text in argv for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
    if "--config" in argv[:-1]:
        position = argv.index("--config") + 1
        argv[position] = str(shipped_recipe(argv[position]))
    known = known_fields(config)
    _check_config_file(argv, config)
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
        for given in (parsed[0], parsed[2]):
            for problem in convert(given).values():
                raise ValueError(problem)
        _take_loading_arguments(parsed[1], parsed[2])
    except (ValueError, OSError, TypeError) as error:  # the latter two of files and mappings that TRL takes apart
        what = "" if isinstance(error, ValueError) else "a field that holds a file or a mapping cannot be read: "
        raise BadInput(f"{what}{error}") from error
    fields = [text.lstrip("-").split("=")[0].replace("-", "_") for text in unknown if text.startswith("--")]
    if fields:
        raise BadInput(f"on the command line, {unknown_field(fields[0], known)}")
    if unknown:
        raise BadInput(stray_word(unknown[0]))
    return Recipe(*parsed)


def _take_loading_arguments(args: Any, model: ModelConfig) -> None:
    """Let `model_init_kwargs` say what has a field of its own too; TRL's fields have defaults, which would win.

    Raises:
        ValueError: both are given, and differ.
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


def known_fields(config: type) -> set[str]:
    """The fields that a recipe of a trainer's `config` class may have."""
    dataclass_types = (RunArguments, config, ModelConfig)
    return {f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init} | {"env"}


def mapping_fields(config: type) -> set[str]:
    """Those of them that take a mapping; on a command line, as JSON."""
    return {name for name, kinds in field_kinds(config).items() if dict in kinds} | {"env"}


def _check_config_file(argv: list[str], config: type) -> None:
    if "--config" not in argv:
        return
    position = argv.index("--config") + 1
    if position == len(argv):
        raise BadInput("--config needs the path of a recipe, for example recipes/starter/grpo_exact_both_pid.yaml.")
    path = Path(argv[position])
    try:
        content = read_recipe(path)
    except ValueError as error:
        raise BadInput(str(error)) from error
    known, mappings = known_fields(config), mapping_fields(config)
    for name, value in content.items():
        if name not in known:
            raise BadInput(f"in {path}, {unknown_field(name, known)}")
        if isinstance(value, dict) and name not in mappings:
            raise BadInput(f"{name} must be a plain value, not a mapping: recipes are flat.")


def stray_word(word: str) -> str:
    """The sentence about a word that is neither an option nor its value."""
    return f"{word!r} on the command line belongs to no field: write --field value."


def starts_no_process(accelerate_config: str) -> str:
    """The sentence about an accelerate file that is given where it has no effect."""
    return (
        f"accelerate_config={accelerate_config!r} starts processes only on the command line of `trl-klx`, or as "
        "`accelerate launch --config_file`: give it there, or plan for it by --dry_run."
    )


def unknown_field(name: str, known: set[str]) -> str:
    """The sentence about a field that does not exist."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "remove it."
    return f"the field {str(name)!r} does not exist: {hint}"
