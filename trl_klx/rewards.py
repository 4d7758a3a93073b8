"""Reward functions in the form that TRL's trainers call: prompts, completions and dataset columns by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

Completion = str | Sequence[dict[str, Any]]


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    """Reward 1.0 for a completion that is the expected answer and 0.0 for any other.

    White space around the completion is ignored; the answer is compared as it stands.

    Args:
        prompts: the B prompts, not read.
        completions: the B completions, each a string or a list of messages whose last is compared.
        answer: the dataset column `answer`, B strings.
        **kwargs: the other columns and what else TRL passes, not read.

    Returns:
        B floats, each 0.0 or 1.0.

    Raises:
        TypeError: an answer is not a string.
        ValueError: `completions` and `answer` differ in length.

    Example:
        >>> exact_match(["53331=", "201="], ["13335", "021"], answer=["13335", "012"])
        [1.0, 0.0]
    """
    for expected in answer:
        # A number would never equal the text, and a reward that is always 0.0 looks like a model that does not learn.
        if not isinstance(expected, str):
            raise TypeError(
                f"exact_match: the dataset column 'answer' holds {expected!r} of type {type(expected).__name__}: "
                "store the answers as strings"
            )
    return [float(_text(c).strip() == expected) for c, expected in zip(completions, answer, strict=True)]


def _text(completion: Completion) -> str:
    """The text of a completion; a message that only calls a tool has the content None."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


# A minus belongs to a number unless it follows one, or a word: "10-12" is a range.
_NUMBER = re.compile(r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<=\d-)\d+(?:\.\d+)?|(?<![\w.])-?\.\d+")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def final_number(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    r"""Reward 1.0 for a completion whose final answer is the expected number and 0.0 for any other.

    The final answer is what the last `\boxed{...}` holds; else what follows the last `####`; else the last number of
    the text. Commas between thousands, currency signs and trailing zeros do not matter: 1,234.50 equals 1234.5. For
    answers that are formulas use a library that parses them.

    Args:
        prompts: the B prompts, not read.
        completions: the B completions, each a string or a list of messages whose last is read.
        answer: the dataset column `answer`, B numbers as strings.
        **kwargs: the other columns and what else TRL passes, not read.

    Returns:
        B floats, each 0.0 or 1.0.

    Raises:
        ValueError: an expected answer is not a number, or `completions` and `answer` differ in length.

    Example:
        >>> final_number(["", ""], [r"So \boxed{1,234}.", "7 or 8"], answer=["1234", "7"])
        [1.0, 0.0]
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = _last_number(expected)
        if wanted is None:
            raise ValueError(f"final_number: the dataset column 'answer' holds {expected!r}, which is not a number.")
        rewards.append(float(_final_number(_text(completion)) == wanted))
    return rewards


def _final_number(text: str) -> Decimal | None:
    boxed = _BOXED.findall(text)
    if boxed:
        found = _numbers(boxed[-1])
        return found[0] if len(found) == 1 else None  # a fraction, for example, is not a plain number
    marked = text.rpartition("####")
    if marked[1]:
        found = _numbers(marked[2])
        return found[0] if found else None
    return _last_number(text)


def _last_number(text: str) -> Decimal | None:
    return next(iter(reversed(_numbers(text))), None)


def _numbers(text: str) -> list[Decimal]:
    plain = text.replace("\u2212", "-").translate(str.maketrans("", "", "$\u20ac\u00a3"))
    return [Decimal(number.replace(",", "")) for number in _NUMBER.findall(plain)]
