"""The rows of a dataset: prompts and answers that are text or messages, and pairs of a better and a worse answer."""

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset


class RowKind(NamedTuple):
    """What a trainer reads of each row."""

    columns: tuple[tuple[str, ...], ...]  # of each tuple a dataset needs one
    answer_length: str = ""  # the field that bounds the answers it samples; "": the rows are pairs of answers
    has_pictures: bool = True

    @property
    def is_pairs(self) -> bool:
        return not self.answer_length


PROMPTS = RowKind((("prompt",),), "max_completion_length")  # GRPO
PROMPTS_OR_TOKENS = RowKind((("prompt", "input_ids"),), "response_length", has_pictures=False)  # PPO
PAIRS = RowKind((("chosen",), ("rejected",)))  # DPO
_FIRST = 64  # rows of a stream that are looked at beforehand
_passed: set[tuple[Any, ...]] = set()  # datasets and checks, see `once`


def column_problems(kind: RowKind, split: str, columns: list[str]) -> Iterator[str]:
    """A sentence for every column that a trainer needs and a dataset lacks."""
    for names in kind.columns:
        if not set(names) & set(columns):
            either = " or ".join(repr(name) for name in names)
            yield f"the split {split!r} has no column {either} (it has {', '.join(columns)}): rename one to it."


def rows_of(dataset: Dataset | IterableDataset, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows as a trainer will see them: all of a dataset in memory, the first of a stream or behind a transform."""
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        yield from islice(iter(dataset), _FIRST)
        return
    if columns is not None:
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    for batch in dataset.with_format(None).iter(batch_size=1000):
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))


def once(problems: Iterator[str], dataset: Dataset | IterableDataset, *check: Any) -> Iterator[str]:
    """The problems of a dataset's rows; none, and no row is read, where this `check` has found none in this process.

    What a run has checked its trainer checks again: the dataset is known by its fingerprint, which is of its content.
    """
    known = (dataset._fingerprint, *check) if isinstance(dataset, Dataset) else None
    if known in _passed:
        return
    found = list(problems)
    if known is not None and not found:
        _passed.add(known)
    yield from found


def row_problems(kind: RowKind, split: str, dataset: Dataset | IterableDataset) -> Iterator[str]:
    """A sentence for the first row of each kind that a trainer cannot use."""
    if kind.is_pairs:
        pairs = _pair_problems(split, rows_of(dataset, ["prompt", "chosen", "rejected"]))
        return once(pairs, dataset, kind)
    return once(_prompt_problems(split, rows_of(dataset, ["prompt", "input_ids"])), dataset, kind)


def _prompt_problems(split: str, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    first: Any = None
    for number, row in enumerate(rows):
        column = "prompt" if "prompt" in row else "input_ids"
        value = row.get(column)
        wrong = _not_tokens(value) if column == "input_ids" else _not_a_prompt(value)
        first = value if number == 0 else first
        if wrong is None and isinstance(value, str) != isinstance(first, str):
            wrong = f"is {_shown(value)}, and that of row 0 is {_shown(first)}: make all text, or all messages"
        if wrong is not None:
            yield f"row {number} (counted from 0) of the split {split!r}: its {column} {wrong}."
            return


def column_is_empty(dataset: Dataset | IterableDataset, column: str) -> bool:
    """Whether a column is None in every row, as `datasets` fills it in a split that lacks it."""
    return all(row.get(column) is None for row in rows_of(dataset, [column]))


def check_prompts(prompts: list) -> None:
    """Refuse prompts of a batch that are neither text nor messages: a stream's rows are seen only as they come.

    Raises:
        ValueError: with one sentence.
    """
    for prompt in prompts:
        wrong = _not_a_prompt(prompt)
        if wrong is not None:
            raise ValueError(f"a row of the dataset cannot be used, its prompt {wrong}.")


def _pair_problems(split: str, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    equal, count, first_equal, doubled = 0, 0, 0, 0
    for number, row in enumerate(rows):
        wrong = _not_a_pair(row)
        if wrong is not None:
            yield f"row {number} (counted from 0) of the split {split!r}: {wrong}."
            return
        count += 1
        prompt = row.get("prompt")
        is_text = isinstance(prompt, str) and prompt != ""
        doubled += is_text and row["chosen"].startswith(prompt) and row["rejected"].startswith(prompt)
        if row["chosen"] == row["rejected"]:
            first_equal = first_equal if equal else number
            equal += 1
    if doubled and doubled == count:
        warnings.warn(
            f"in every row of the split {split!r} chosen and rejected begin with the prompt, which is then there "
            "twice: leave it out of them, or remove the column prompt.",
            UserWarning,
            stacklevel=2,
        )
    if equal and equal == count:
        yield (
            f"in every row of the split {split!r} chosen and rejected are equal, so there is nothing to prefer: give "
            "pairs that differ."
        )
    elif equal:
        warnings.warn(
            f"in {equal} of {count} rows of the split {split!r} chosen and rejected are equal (the first is row "
            f"{first_equal}, counted from 0): they teach nothing; leave them out.",
            UserWarning,
            stacklevel=2,
        )


def _not_a_pair(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a pair, with its remedy; None: nothing."""
    for column in ("chosen", "rejected"):
        value = row.get(column)
        wrong = None if value == "" else _not_a_prompt(value)  # an answer may end at once
        if wrong is not None:
            return f"its {column} {wrong}"
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        return f"chosen is {_shown(chosen)} and rejected is {_shown(rejected)}: make both text, or both messages"
    if "prompt" in row:
        wrong = _not_a_prompt(row["prompt"])
        if wrong is not None:
            return f"its prompt {wrong}"
        if isinstance(row["prompt"], list) and isinstance(chosen, str):
            return "its prompt is messages, and chosen and rejected are text: make all text, or all messages"
        if isinstance(chosen, list):
            return _prompt_beside_messages(row["prompt"], chosen, rejected)
    elif not (chosen and rejected):
        return "there is no column prompt, and an answer that is empty holds none: add the column"
    elif isinstance(chosen, list) and chosen[0] != rejected[0]:
        return "there is no column prompt, and chosen and rejected do not begin with the same message: add the column"
    elif isinstance(chosen, list) and min(len(chosen), len(rejected)) < 2:
        return "there is no column prompt, and chosen or rejected has one message only: add the column"
    return None


def _prompt_beside_messages(prompt: str | list, chosen: list, rejected: list) -> str | None:
    """Why a prompt cannot stand beside answers that are messages: these may hold it already."""
    remove = "remove the column prompt (a function named by dataset_prepare can: it returns chosen and rejected alone)"
    if isinstance(prompt, str):
        hold_it = chosen[0] == rejected[0] and min(len(chosen), len(rejected)) > 1
        remedy = f"they hold it already, so {remove}" if hold_it else "make the prompt messages, too"
        return f"its prompt is text, and chosen and rejected are messages: {remedy}"
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return f"chosen and rejected begin with the messages of the prompt, which would stand there twice: {remove}"
    return None


def _not_a_prompt(value: Any) -> str | None:
    """Why a value is neither text nor messages, with the remedy; None: it is one of them."""
    if isinstance(value, str):
        return None
    if value is None:
        return "is None: give it text or messages, or leave the row out"
    if not isinstance(value, list):
        return f"is {_shown(value)}: give it text or messages"
    if not value:
        return "is an empty list: give it messages, or leave the row out"
    for message in value:
        if not isinstance(message, dict) or "role" not in message:
            return f"holds {_shown(message)}: messages are dicts of role and content"
        content = message.get("content")
        has_content = isinstance(content, (str, list)) or message.get("tool_calls")
        if not isinstance(message["role"], str) or not has_content:
            return f"holds the message {repr(message)[:80]}: give it a role and a content, both text"
    return None


def _not_tokens(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return f"is {_shown(value)}: give it the tokens of a prompt, a list of whole numbers"
    strange = [token for token in value if not isinstance(token, int) or isinstance(token, bool) or token < 0]
    return f"holds {strange[0]!r}: tokens are whole numbers from 0 on" if strange else None


def _shown(value: Any) -> str:
    """A value and what it is, in the user's words."""
    if isinstance(value, str):
        return f"the text {repr(value)[:60]}"
    if isinstance(value, list) and value and all(isinstance(part, dict) and "role" in part for part in value):
        return "messages"
    return f"{repr(value)[:60]}, of type {type(value).__name__}"
