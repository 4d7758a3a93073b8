"""Responses to measure: from JSON lines, Parquet, a dataset on the Hub or in memory, to tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from ...wording import first_line
from .errors import MeasureError, RowError

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Response:
    """One response, as the user gave it."""

    index: int  # its place in the data, before `where`
    id: str
    group: str  # responses of one group, by default of one prompt, are not independent
    correct: bool | None
    prompt: Any  # str or messages
    response: Any  # str or messages; None where `response_ids` or nothing is given
    response_ids: list[int] | None


def load_rows(
    data: str | Path | Dataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    where: str | None = None,
    needs_response: bool = True,
) -> list[Response]:
    """Read the data and keep the rows that count.

    Columns: `prompt` (text, or messages), `response` or `completion` (text, or one assistant's message), or
    `messages` (a conversation that ends with the assistant's) in place of both; optional `response_ids` (the tokens
    themselves, where the sampler's are known), `id`, `group` and `correct`.

    Args:
        data: a .jsonl, .json or .parquet file, a folder or Hub name for `datasets.load_dataset`, a `Dataset`, or rows.
        split: which split of a dataset on the Hub or in a folder.
        where: an expression over the columns, in the language of `pandas.DataFrame.query`:
            "model == 'dpo' and not correct".
        needs_response: False where responses will be sampled.

    Raises:
        MeasureError: data, column or expression is wrong, or no row is left.
    """
    dataset = _load(data, split)
    _check_columns(dataset, needs_response)
    if not len(dataset):
        raise MeasureError("the data have no rows: give at least one.")
    indices = range(len(dataset)) if where is None else _where(dataset, where)
    if not indices:
        raise MeasureError(f"where={where!r} keeps none of the {len(dataset)} rows: loosen it.")
    return [_row(index, dataset[index]) for index in indices]


def _load(data: Any, split: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, (str, Path)):
        return Dataset.from_list([dict(row) for row in data])
    path = Path(data)
    try:
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            # Into memory: a cache of a user's small file would outlive the run.
            reader = Dataset.from_json if _FORMATS[path.suffix] == "json" else Dataset.from_parquet
            return reader(str(path), keep_in_memory=True)
        loaded = load_dataset(str(data))
    except Exception as error:  # `datasets` raises a different class for every way a path can be wrong
        raise MeasureError(
            f"data={str(data)!r} cannot be loaded ({first_line(error.__cause__ or error)}): give a .jsonl or .parquet "
            "file with a row per response, "
            "or the name of a dataset."
        ) from error
    assert isinstance(loaded, DatasetDict)
    if split not in loaded:
        raise MeasureError(f"split={split!r} is not in {data}, which has {', '.join(loaded)}: name one of these.")
    return loaded[split]


def _check_columns(dataset: Dataset, needs_response: bool) -> None:
    responses = ("response", "completion", "response_ids", "messages")
    for names in [("prompt", "messages"), *([responses] if needs_response else [])]:
        if not set(names) & set(dataset.column_names):
            raise MeasureError(
                f"the data have no column {' or '.join(map(repr, names))} (they have "
                f"{', '.join(dataset.column_names)}): rename one to it."
            )


def _where(dataset: Dataset, where: str) -> list[int]:
    try:
        return [int(index) for index in dataset.to_pandas().query(where, engine="python").index]
    except Exception as error:  # pandas raises whatever its parser or the columns' types do
        columns = ", ".join(dataset.column_names)
        raise MeasureError(
            f"where={where!r} cannot be evaluated ({' '.join(str(error).split())}): write an expression over the "
            f'columns {columns}, such as "not correct".'
        ) from error


def _row(index: int, row: Mapping[str, Any]) -> Response:
    conversation = row.get("messages")
    prompt = row.get("prompt")
    response = next((row[name] for name in ("response", "completion") if row.get(name) is not None), None)
    if conversation and prompt is None:
        prompt, response = conversation[:-1], conversation[-1:]
    group = row.get("group")
    return Response(
        index=index,
        id=str(index if row.get("id") is None else row["id"]),
        group=str(prompt if group is None else group),
        correct=_correct(row.get("correct"), index),
        prompt=prompt,
        response=response,
        response_ids=row.get("response_ids"),
    )


def _correct(value: Any, index: int) -> bool | None:
    if value is None or value != value:  # a table's missing number is NaN
        return None
    if value not in (0, 1):  # bool("false") is true
        raise MeasureError(f"the column 'correct' of row {index} is {value!r}: give true or false, or nothing.")
    return bool(value)


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; only `response_ids` count."""

    row: Response
    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def encode(tokenizer: PreTrainedTokenizerBase, row: Response, *, add_eos: bool) -> Encoded:
    """Tokenise a row: the prompt as the model was given it, then the response.

    Messages go through the chat template, up to where the assistant's turn begins; a prompt that is a string and
    `response_ids` are taken as they are. Text of prompt and response is tokenised together where this leaves the
    prompt's tokens as they are. Where a token would span the boundary (prompt "1+", response "+2", token "++"), the
    response is tokenised alone, as a model that has been given the prompt can only write after it.

    Args:
        tokenizer: the reference's.
        row: what to tokenise.
        add_eos: whether the end of text is the last token of a response given as text.

    Raises:
        RowError: prompt or response is missing, empty or no text.
    """
    text, special = _prompt_text(tokenizer, row.prompt)
    prompt_ids = _ids(tokenizer, text, special)
    if not prompt_ids:
        raise RowError("its prompt is empty, so the probability of the response's first token is not known")
    if row.response_ids is not None:
        if not row.response_ids:
            raise RowError("its response is empty")
        return Encoded(row, prompt_ids, [int(token) for token in row.response_ids])
    response = _response_text(row.response)
    together = _ids(tokenizer, text + response, special)
    start = len(prompt_ids)
    aligned = len(together) > start and together[:start] == prompt_ids
    ids = together[start:] if aligned else _ids(tokenizer, response, False)
    end = tokenizer.eos_token_id
    return Encoded(row, prompt_ids, [*ids, end] if add_eos and ids[-1:] != [end] else ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Response) -> list[int]:
    """The prompt's tokens, for sampling."""
    ids = _ids(tokenizer, *_prompt_text(tokenizer, row.prompt))
    if not ids:
        raise RowError("its prompt is empty")
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # A tokenizer that closes every text would put the end of text between prompt and response.
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id and ids[0] != ids[-1] else ids


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> tuple[str, bool]:
    """The prompt as one string, and whether the tokenizer still has to add its special tokens."""
    if isinstance(prompt, str):
        return prompt, True
    if not prompt:
        raise RowError("it has no prompt")
    if not tokenizer.chat_template:
        raise RowError("its prompt is a list of messages and the tokenizer has no chat template: give text")
    begun = prompt[-1]["role"] == "assistant"  # the response continues what the assistant has begun
    messages = [{name: value for name, value in message.items() if value is not None} for message in prompt]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # a template may refuse roles, orders, ... with an error of its own
        raise RowError(f"the chat template refuses its prompt ({' '.join(str(error).split())})") from error
    return str(text), False


def _response_text(response: Any) -> str:
    if isinstance(response, list):
        if len(response) != 1 or response[0].get("role") != "assistant":
            raise RowError("its response is not one message of the assistant")
        response = response[0].get("content")
    if response is None or response == "":
        raise RowError("its response is empty")
    if not isinstance(response, str):
        raise RowError(f"its response is a {type(response).__name__}, not text")
    return response
