"""Reward functions for the examples, in the form that TRL's trainers call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Commas only between groups of three digits: "1, 2 and 3" are three numbers. A minus after a digit is a subtraction.
_NUMBER = re.compile(r"(?:(?<![\w.])-)?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?:(?<![\w.])-)?\d+(?:\.\d+)?")
Completion = str | Sequence[dict[str, Any]]


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    """Reward 1.0 for a completion that is the expected answer and 0.0 for any other.

    White space around the completion is ignored; the answer is compared as it stands. Pass the function to
    `GRPOTrainer(reward_funcs=exact_match)`: TRL hands over every dataset column by its name.

    Args:
        prompts: the B prompts. TRL passes them to every reward function; this one does not read them.
        completions: the B completions, each a string or, for conversational data, a list of messages
            `{"role": ..., "content": ...}` whose last message is compared.
        answer: the dataset column `answer`, B strings.
        **kwargs: the other columns and what else TRL passes, not read.

    Returns:
        B floats, each 0.0 or 1.0.

    Raises:
        TypeError: if an answer is not a string.
        ValueError: if `completions` and `answer` differ in length.

    Example:
        >>> exact_match(["53331=", "201="], ["13335", "021"], answer=["13335", "012"])
        [1.0, 0.0]
    """
    return [_score(completion, expected) for completion, expected in zip(completions, answer, strict=True)]


def final_number(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Reward 1.0 for a completion whose last number is the expected one, and 0.0 for any other.

    Numbers are compared as numbers: `1,200.0`, `1200` and `$1200.` are one. A completion without a number gets 0.0.

    Args:
        completions: the B completions, strings or lists of messages, as for `exact_match`.
        answer: the dataset column `answer`, B strings that each hold the expected number as their last (of a solution
            in the form of GSM8K, `... #### 42`, that is 42).
        **kwargs: the other columns and what else TRL passes, not read.

    Returns:
        B floats, each 0.0 or 1.0.

    Raises:
        ValueError: if an answer holds no number, or if `completions` and `answer` differ in length.

    Example:
        >>> final_number(["7 + 5 = 12.", "12 + 1 = 13"], answer=["12", "12"])
        [1.0, 0.0]
    """
    return [float(_last_number(_text(c)) == _expected(a)) for c, a in zip(completions, answer, strict=True)]


def _score(completion: Completion, expected: str) -> float:
    # A number would never equal the text, and a reward that is always 0.0 looks like a model that does not learn.
    if not isinstance(expected, str):
        raise TypeError(
            f"exact_match: the dataset column 'answer' holds {expected!r} of type {type(expected).__name__}: "
            "store the answers as strings"
        )
    return float(_text(completion).strip() == expected)


def _text(completion: Completion) -> str:
    # A message that only calls a tool has the content None.
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _expected(answer: str) -> float:
    number = _last_number(answer)
    if number is None:
        raise ValueError(f"final_number: the dataset column 'answer' holds {answer!r}, which has no number in it")
    return number
