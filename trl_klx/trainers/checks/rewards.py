"""Reward functions and their weights, as a trainer is given them: whether they can be called by names, and weighed."""

import inspect
import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name

# What every reward function gets, beside the dataset's columns.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that a reward function does not get: the trainers give what these would hold under names of their own.
NOT_GIVEN = ("prompt", "completion", "completion_ids", "input_ids")


def check_call(reward: Any, columns: Collection[str] | None, split: str, *, more: bool = False) -> None:
    """Refuse a reward function that cannot be called by the names that it will get.

    Args:
        reward: the function; models, and what has no signature, pass.
        columns: of the dataset; None: not known.
        split: what the dataset is called.
        more: whether a rollout function or an environment gives the functions more.

    Raises:
        ValueError: it takes no `**kwargs`, or needs what is not there.
    """
    parameters = _parameters(reward)
    name = get_callable_name(reward)
    of_columns = [column for column in columns or () if column not in NOT_GIVEN]
    given = [*GIVEN, *of_columns]
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"the reward function {name!r} takes {parameter.name!r} by its position only, and is called by names: "
                "remove the slash from its parameters."
            )
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        known = columns is not None and not more and parameter.name != "environments"
        if needed and parameter.name in ("prompt", "completion"):
            raise ValueError(
                f"the reward function {name!r} takes {parameter.name!r} and is called with {parameter.name}s=, a list "
                "of all of them: rename the parameter."
            )
        if needed and known and parameter.name not in given:
            raise ValueError(
                f"the reward function {name!r} needs a column {parameter.name!r} and the split {split!r} has "
                f"{', '.join(columns or ())}: rename or add the column."
            )
    if parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        taken = {parameter.name for parameter in parameters}
        left = [argument for argument in given if argument not in taken]
        if left:
            raise ValueError(
                f"the reward function {name!r} has no **kwargs and is called with {left[0]}= too, as every column of "
                "the dataset and more by name: add **kwargs to its parameters."
            )


def needed_columns(reward: Any) -> list[str]:
    """The dataset's columns that a reward function has as parameters without a default."""
    parameters = _parameters(reward)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    return [p.name for p in named if p.name not in (*GIVEN, *NOT_GIVEN, "environments")]


def check_names(columns: Collection[str] | None, split: str) -> None:
    """Refuse columns under whose names the reward functions get something else. Raises ValueError."""
    for column in columns or ():
        if column in GIVEN and column != "completion_ids":
            raise ValueError(
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
