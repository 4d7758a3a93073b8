"""Reward functions for the examples, in the form that TRL's trainers call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def _score(completion: Completion, expected: str) -> float:
    # A number would never equal the text, and a reward that is always 0.0 looks like a model that does not learn.
    if not isinstance(expected, str):
        raise TypeError(
            f"exact_match: the dataset column 'answer' holds {expected!r} of type {type(expected).__name__}: "
            "store the answers as strings"
        )
    # A message that only calls a tool has the content None.
    text = completion if isinstance(completion, str) else completion[-1]["content"] or ""
    return float(text.strip() == expected)
