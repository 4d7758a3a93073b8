"""Reward functions and their weights, as a trainer is given them: whether they can be called by names, and weighed."""

import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name

# What every reward function gets, beside the dataset's columns.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that a reward function does not get: the trainers give what these would hold under names of their own.
NOT_GIVEN = ("prompt", "completion", "completion_ids", "input_ids")


def call_problems(reward: Any, columns: Collection[str], split: str, *, more: bool = False) -> Iterator[str]:
    """A sentence for why a reward function cannot be called by the names that it will get.

    Args:
        reward: the function; models, and what has no signature, pass.
        columns: of the dataset.
        split: what the dataset is called.
        more: whether a rollout function or an environment gives the functions more.
    """
    parameters, name = _parameters(reward), get_callable_name(reward)
    given = [*GIVEN, *(column for column in columns if column not in NOT_GIVEN)]
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            yield (
                f"the reward function {name!r} takes {parameter.name!r} by its position only, and is called by names: "
                "remove the slash from its parameters."
            )
            return
    for needed in _needed(parameters):
        if needed in ("prompt", "completion"):
            yield (
                f"the reward function {name!r} takes {needed!r} and is called with {needed}s=, a list of all of them: "
                "rename the parameter."
            )
            return
        if not more and needed not in (*given, "environments"):
            yield (
                f"the reward function {name!r} needs a column {needed!r} and the split {split!r} has "
                f"{', '.join(columns)}: rename or add the column."
            )
            return
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [parameter.name for parameter in parameters]
    left = [argument for argument in given if argument not in names]
    if parameters and left and not takes_all:
        yield (
            f"the reward function {name!r} has no **kwargs and is called with {left[0]}= too, as every column of "
            "the dataset and more by name: add **kwargs to its parameters."
        )


def needed_columns(reward: Any) -> list[str]:
    """The dataset's columns that a reward function has as parameters without a default."""
    return [name for name in _needed(_parameters(reward)) if name not in (*GIVEN, *NOT_GIVEN, "environments")]


def name_problems(columns: Collection[str], split: str) -> Iterator[str]:
    """A sentence for each column under whose name the reward functions get something else."""
    for column in columns:
        if column in GIVEN and column != "completion_ids":
            yield (
                f"the split {split!r} has a column {column!r}, and reward functions get what the trainer makes by that "
                "name: rename the column."
            )


def check_weights(weights: Any, rewards: int | None = None) -> None:
    """Refuse `reward_weights` that weigh nothing; with the number of `rewards`, those of another number.

    Raises:
        ValueError: with one sentence.
    """
    if weights is None:
        return
    is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    numbers = list(weights) if is_list else []
    fit = [not isinstance(w, bool) and isinstance(w, (int, float)) and math.isfinite(w) for w in numbers]
    if not is_list or not all(fit):
        raise ValueError(f"reward_weights={weights!r} must be a list of finite numbers, one per reward.")
    if rewards is not None and len(numbers) != rewards:
        raise ValueError(
            f"reward_weights has {len(numbers)} entries and there are {rewards} rewards: give one weight per reward."
        )
    if not any(numbers):
        raise ValueError(f"reward_weights={weights!r} leave no reward to learn from: give one that is not 0.")


def _parameters(reward: Any) -> list[inspect.Parameter]:
    """Those of a function; none of a model or its path, and of what has no signature."""
    if isinstance(reward, (nn.Module, str)):
        return []
    try:
        return list(inspect.signature(reward).parameters.values())
    except (ValueError, TypeError):
        return []


def _needed(parameters: list[inspect.Parameter]) -> list[str]:
    """Those without a default."""
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
