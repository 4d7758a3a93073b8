"""The user's own functions that a recipe names: importing them, trying them, and showing what they raise as theirs."""

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from transformers import TrainerState

from ...recipe_files import shipped_recipe
from ...trainers.rewarding.calls import RewardError, called, raised, reward_values, users_frames
from ..recipe.arguments import BadInput


class UsersError(BadInput):
    """The user's own code raised, which is the `__cause__`. The message is one sentence that names the code."""


def users_traceback(error: BaseException) -> str:
    """The traceback of what the user's own code raised, from where that code begins; "" where it raised nothing."""
    if not isinstance(error, (UsersError, RewardError)) or error.__cause__ is None:
        return ""
    cause = error.__cause__
    return "".join(traceback.format_exception(type(cause), cause, users_frames(cause)))


FORMS = "module.function or path/to/file.py:function"


def load_function(name: Any, option: str) -> Callable:
    """Import a function that an option names: `module.function`, or `path/to/file.py:function`.

    The working directory is on the path, as in TRL's scripts. A file under recipes/ that is not in the working
    directory is taken from the recipes that come with the package.

    Raises:
        BadInput: there is no such module, file or function.
        UsersError: the user's module raised while it was imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = f"{option}={name!r}"
    file, is_file, function_name = str(name).rpartition(".py:")
    if is_file:
        where = f"{file}.py"
    elif str(name).endswith(".py"):
        raise BadInput(f"{given} names a file alone: add the function, as in {name}:my_reward.")
    else:
        where, _, function_name = str(name).rpartition(".")
        if not where or not all(part.isidentifier() for part in str(name).split(".")):
            raise BadInput(f"{given} is not a function: give {FORMS}.")
    try:
        module = _module_of_file(where) if is_file else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        if _is_missing(error, where):
            raise BadInput(f"{given} cannot be imported ({error}): give {FORMS}.") from error
        raise UsersError(raised(f"importing {where}, for {given},", error) + ".") from error
    try:
        function = getattr(module, function_name)
    except AttributeError as error:
        functions = [value for value in vars(module).values() if inspect.isfunction(value)]
        own = [function.__name__ for function in functions if function.__module__ == module.__name__]
        there = f"its functions are {', '.join(own)}" if own else f"give {FORMS}"
        raise BadInput(f"{given} cannot be imported ({error}): {there}.") from error
    if isinstance(function, type):
        raise BadInput(f"{given} is a class: name a function, or an instance of the class.")
    if not callable(function):
        raise BadInput(f"{given} is not a function: give {FORMS}.")
    return function


def _module_of_file(where: str) -> ModuleType:
    """The module in a file, run once; it can import what lies beside it, as a script can."""
    file = shipped_recipe(where).resolve()
    name = str(file)
    if not file.is_file():
        raise ModuleNotFoundError(f"there is no file {where}", name=where)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # of a name that ends in .py
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(file.parent))
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _is_missing(error: BaseException, where: str) -> bool:
    """Whether the module or file that was asked for is missing, and not one that it imports."""
    return (
        isinstance(error, ModuleNotFoundError) and error.name is not None and f"{where}.".startswith(f"{error.name}.")
    )


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
        BadInput: it returned something other than rewards.
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
