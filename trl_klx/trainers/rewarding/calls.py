"""How reward functions are called, and what they may return: the same for GRPO, PPO and a gold reward.

They are the user's own code. What they raise is shown as theirs, under one sentence that names the function.
"""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ...wording import first_line
from ..errors import RunError

# The package's own frames on the way to the user's code: what calls it, and what imports it.
_CALLERS = [
    ("trainers", "rewarding", "calls.py"),
    ("run", "sources", "users_code.py"),
    ("run", "sources", "data.py"),
]


class RewardError(RunError, ValueError):
    """A reward function raised, which is then the `__cause__`, or returned something other than rewards."""


def raised(what: str, error: BaseException) -> str:
    """The sentence about an exception of the user's own code, without its end: what, which, and where."""
    kind = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    if isinstance(error, SystemExit):
        kind = f"SystemExit({error.code!r}), which would end the run"
    frames = traceback.extract_tb(users_frames(error))
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{what} raised {kind}{place}"


def users_frames(error: BaseException) -> TracebackType | None:
    """The traceback of an exception from where the user's own code begins; None where none of it ran."""
    frames = error.__traceback__
    while frames is not None and _is_a_way_there(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames


def _is_a_way_there(file: str) -> bool:
    """Whether a file only calls the user's functions, or imports them."""
    return "importlib" in file or Path(file).parts[-3:] in _CALLERS


def checked(name: str, reward: Callable) -> Callable[..., Any]:
    """A reward function that raises nothing but `RewardError`, and returns floats or an awaitable of them."""

    def call(**given: Any) -> Any:
        values = called(name, reward, given)
        if inspect.isawaitable(values):
            return _awaited(name, values, given)
        return reward_values(name, values, len(given["prompts"]))

    return call


def checked_for_trl(name: str, reward: Callable, *, can_wait: bool) -> Callable[..., Any]:
    """The same, as TRL calls it: a coroutine function where it awaits those (`can_wait`), else one that waits here."""
    call = checked(name, reward)

    async def wait(**given: Any) -> list[float]:
        return await call(**given)

    def wait_here(**given: Any) -> list[float]:
        values = call(**given)
        return run_together([values])[0] if inspect.isawaitable(values) else values

    is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    return wait if can_wait and is_async else wait_here


def called(name: str, reward: Callable, given: Mapping[str, Any]) -> Any:
    """What a reward function returns, which may be awaitable. Raises `RewardError` from whatever it raises."""
    try:
        return reward(**given)
    except (Exception, SystemExit) as error:
        raise failed(name, error, given) from error


async def _awaited(name: str, values: Any, given: Mapping[str, Any]) -> list[float]:
    try:
        found = await values
    except (Exception, SystemExit) as error:
        raise failed(name, error, given) from error
    return reward_values(name, found, len(given["prompts"]))


def run_together(coroutines: list) -> list:
    """Await all in a thread of their own: the caller may already be inside an event loop, as in a notebook."""
    if not coroutines:
        return []

    async def gather() -> list:
        return list(await asyncio.gather(*coroutines))

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, gather()).result()


def failed(name: str, error: BaseException, given: Mapping[str, Any]) -> RewardError:
    """The error about a reward function that raised."""
    are_texts = all(isinstance(completion, str) for completion in given["completions"])
    shape = "strings, as the prompts are" if are_texts else "lists of messages, as the prompts are"
    return RewardError(f"{raised(f'the reward function {name!r}', error)}; the completions it got are {shape}.")


def reward_values(name: str, values: Any, rows: int) -> list[float]:
    """One float per answer, NaN where the function returned None; tensors, arrays and any sequence of numbers will do.

    Raises:
        RewardError: it is not a sequence, of another length, or holds what is not a number.
    """
    wanted = "return a list with one number per answer, None where it does not apply"
    is_list = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, set, frozenset))
    if not is_list or getattr(values, "ndim", 1) == 0:
        what = f"a {type(values).__name__}" if isinstance(values, (Mapping, set, frozenset)) else repr(values)
        raise RewardError(f"the reward function {name!r} returned {what[:200]} for {rows} answers: {wanted}.")
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(found) != rows:
        raise RewardError(f"the reward function {name!r} returned {len(found)} rewards for {rows} answers: {wanted}.")
    return [_number(name, value, row, wanted) for row, value in enumerate(found)]


def _number(name: str, value: Any, row: int, wanted: str) -> float:
    if value is None:
        return math.nan
    try:
        # Tensors and numpy's numbers have a float, as text has; a list of one number has none.
        if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(
            f"the reward function {name!r} returned {repr(value)[:100]} for answer {row}, which is not a number: "
            f"{wanted}."
        ) from error
