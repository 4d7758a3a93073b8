"""Prompts that are empty, and rows that are longer than what the model can read."""

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import maybe_extract_prompt

from ...wording import first_line
from .rows import RowKind, rows_of

_LOOKED_AT = 1000  # rows, the longest by their text, that are tokenised
_PER_MESSAGE = 64  # tokens, at most, that a template adds to a message, or of itself


def length_problems(
    kind: RowKind, args: Any, split: str, dataset: Dataset | IterableDataset, tokenizer: Any, config: Any
) -> Iterator[str]:
    """A sentence for the first row that a model or its tokenizer cannot read.

    Only rows whose text is long enough to be too long are tokenised, and of these the longest thousand.

    Args:
        kind: what the trainer reads of each row.
        args: the config of the trainer.
        split: what the dataset is called.
        dataset: prompts or pairs, which have passed `row_problems`.
        tokenizer: of the policy.
        config: of the policy's model; None: not known.
    """
    columns = dataset.column_names or []
    pictures = [name for name in columns if name in ("image", "images")] if kind.has_pictures else []
    if pictures and config is not None and "vision_config" not in config.to_dict():
        yield f"the split {split!r} has a column {pictures[0]!r}, and the model reads no pictures: remove the column."
    if pictures or "tools" in columns or (not kind.is_pairs and columns and "prompt" not in columns):
        return
    limit, room = _limits(kind, args, config)
    chat = _chat_arguments(args)
    seen = rows_of(dataset, ["prompt", "chosen", "rejected"])
    candidates: list[tuple[int, int, dict]] = []
    one_is_kept = not kind.is_pairs or args.max_length is None or args.truncation_mode != "keep_start"
    for number, row in enumerate(seen):
        texts = [row] if not kind.is_pairs else _sides(row)
        if number == 0:
            wrong = _not_readable(texts[0], tokenizer, args, chat)
            if wrong is not None:
                yield f"row 0 of the split {split!r}: {wrong}."
                return
        if row.get("prompt") == "" and not _tokens(row, tokenizer, chat) and (not kind.is_pairs or args.kl_probe_steps):
            yield (
                f"row {number} (counted from 0) of the split {split!r}: its prompt is empty, and this tokenizer begins "
                "with no token of its own, so that there is nothing to answer: leave the row out."
            )
            return
        if not one_is_kept and number < _LOOKED_AT:
            one_is_kept = len(_tokens(maybe_extract_prompt(row), tokenizer, chat)) < args.max_length
        size = max(_most_tokens(text) for text in texts)
        if limit is not None and size > limit - room:
            heapq.heappush(candidates, (size, number, row))
            if len(candidates) > _LOOKED_AT:
                heapq.heappop(candidates)
    if not one_is_kept:
        yield (
            f"in the split {split!r} every prompt alone fills max_length={args.max_length}, and TRL leaves such pairs "
            "out: raise it, or shorten the prompts."
        )
        return
    for _, number, row in sorted(candidates, key=lambda candidate: candidate[1]):
        texts = [row] if not kind.is_pairs else _sides(row)
        length = max(len(_tokens(text, tokenizer, chat)) for text in texts)
        if limit is not None and length > limit - room:
            yield f"row {number} (counted from 0) of the split {split!r}: {_too_long(kind, args, length, limit)}."
            return


def _limits(kind: RowKind, args: Any, config: Any) -> tuple[int | None, int]:
    """The tokens that a model reads, and how many of them its answer needs at least."""
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None, 0
    if kind.is_pairs:
        is_cut = args.max_length is not None and args.max_length <= limit
        return (None, 0) if is_cut else (limit, 0)
    # Positions that are learnt end there; those that are computed go on, worse and worse.
    is_computed = any(name.startswith(("rope", "rotary", "alibi")) for name in config.get_text_config().to_dict())
    return limit, 1 if is_computed else getattr(args, kind.answer_length)


def _too_long(kind: RowKind, args: Any, length: int, limit: int) -> str:
    reads = f"the model reads {limit} (max_position_embeddings)"
    if kind.is_pairs:
        return f"prompt and answer have {length} tokens and {reads}: set max_length to {limit} or less"
    option = kind.answer_length
    return (
        f"its prompt has {length} tokens, its answer up to {getattr(args, option)} ({option}), and {reads}: "
        f"shorten the prompt or leave the row out, or lower {option}"
    )


def _chat_arguments(args: Any) -> dict[str, Any]:
    given = getattr(args, "chat_template_kwargs", None)
    return dict(given) if isinstance(given, Mapping) else {}


def _sides(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompt and answer as one text, or one conversation, of the chosen and of the rejected answer."""
    empty: Any = "" if isinstance(row["chosen"], str) else []
    prompt = row.get("prompt", empty)
    if type(prompt) is not type(row["chosen"]):
        prompt = empty  # text beside messages: not these checks' business
    return [{"prompt": prompt + row[side], "is_whole": True} for side in ("chosen", "rejected")]


def _most_tokens(row: Mapping[str, Any]) -> int:
    """No fewer tokens than a row's text can have: no token is less than a byte."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return len(prompt.encode())
    texts = [message.get("content") or "" for message in prompt]
    return sum(len(str(text).encode()) + _PER_MESSAGE for text in texts) + _PER_MESSAGE


def _tokens(row: Mapping[str, Any], tokenizer: Any, chat: dict[str, Any]) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    asks = not row.get("is_whole", False)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=asks, tokenize=True, return_dict=True, **chat)[
        "input_ids"
    ]


def _not_readable(row: Mapping[str, Any], tokenizer: Any, args: Any, chat: dict[str, Any]) -> str | None:
    """Why the tokenizer cannot read a row, with the remedy; None: it can, or will by another template."""
    if getattr(args, "chat_template_path", None) is not None:
        return None
    if isinstance(row["prompt"], list) and tokenizer.chat_template is None:
        return (
            f"the data is conversational and the tokenizer of {tokenizer.name_or_path!r} has no chat template: take an "
            "instruct model, or prompts that are plain strings"
        )
    try:
        _tokens(row, tokenizer, chat)
    except Exception as error:  # templates raise what they like
        why = f"{type(error).__name__}: {first_line(error)}"
        return f"the tokenizer cannot read it ({why}): change the row, or the chat template"
    return None
