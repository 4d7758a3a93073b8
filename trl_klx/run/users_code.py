"""The user's own functions that a recipe names: importing them, trying them, and showing what they raise as theirs."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerState

from ..trainers.rewarding.calls import RewardError, called, raised, reward_values, users_frames
from .arguments import BadInput


class UsersError(BadInput):
    """The user's own code raised, which is the `__cause__`. The message is one sentence that names the code."""


def users_traceback(error: BaseException) -> str:
    """The traceback of what the user's own code raised, from where that code begins; "" where it raised nothing."""
    if not isinstance(error, (UsersError, RewardError)) or error.__cause__ is None:
        return ""
    cause = error.__cause__
    return "".join(traceback.format_exception(type(cause), cause, users_frames(cause)))


def load_function(name: Any, option: str) -> Callable:
    """Import a function from its dotted path, given as `option`.

    The working directory is on the path, as in TRL's scripts.

    Raises:
        BadInput: there is no such module or function.
        UsersError: the module raised while it was imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, function_name = str(name).rpartition(".")
    if not module_name or not all(part.isidentifier() for part in str(name).split(".")):
        raise BadInput(f"{option}={name!r} is no function: give module.function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsersError(raised(f"importing {module_name}, for {option}={name!r},", error) + ".") from error
        raise BadInput(f"{option}={name!r} cannot be imported ({error}): give module.function.") from error
    except (Exception, SystemExit) as error:
        raise UsersError(raised(f"importing {module_name}, for {option}={name!r},", error) + ".") from error
    try:
        function = getattr(module, function_name)
    except AttributeError as error:
        raise BadInput(f"{option}={name!r} cannot be imported ({error}): give module.function.") from error
    if isinstance(function, type):
        raise BadInput(f"{option}={name!r} is a class: name a function, or an instance of the class.")
    if not callable(function):
        raise BadInput(f"{option}={name!r} is no function: give module.function.")
    return function


_TRIED = "tried on made-up answers to the first row of the dataset, "
_MADE_UP = ("The answer is 42.", "42", "I do not know.")


def try_reward(reward: Callable, name: str, row: Mapping[str, Any], answers: int, max_steps: int) -> None:
    """Call a reward function once, on made-up answers to a row of the dataset, so that what would end the run at its
    first step ends it before a model is loaded.

    Only plain functions: what has to be awaited often talks to a service, and an instance may count its calls.

    Args:
        reward: the function.
        name: of the function, for the sentence.
        row: of the dataset.
        answers: how many to make up.
        max_steps: of the run, which a reward may divide by.

    Raises:
        UsersError: it raised.
        BadInput: it returned what is no rewards.
    """
    if not inspect.isfunction(reward) or inspect.iscoroutinefunction(reward):
        return
    texts = [_MADE_UP[number % len(_MADE_UP)] for number in range(answers)]
    is_chat = isinstance(row.get("prompt"), list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
    columns = {column: [value] * answers for column, value in row.items() if column not in ("prompt", "input_ids")}
    given = {
        **columns,
        "prompts": [row.get("prompt", "")] * answers,
        "completions": completions,
        "completion_ids": [[1, 2, 3]] * answers,
        "trainer_state": TrainerState(max_steps=max_steps),
        "log_extra": lambda column, values: None,
        "log_metric": lambda metric, value: None,
    }
    try:
        values = called(name, reward, given)
    except RewardError as error:
        raise UsersError(f"{_TRIED}{error}") from error.__cause__
    try:
        if not inspect.iscoroutine(values):
            reward_values(name, values, answers)
            return
        values.close()  # never awaited: see above
    except RewardError as error:
        raise BadInput(f"{_TRIED}{error}") from error
