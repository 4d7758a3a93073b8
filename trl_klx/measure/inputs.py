"""Responses to measure: JSON lines, Parquet, a dataset on the Hub or in memory, with the rows that `where` keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from .errors import MeasureError

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Row:
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
) -> list[Row]:
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
    indices = range(len(dataset)) if where is None else _where(dataset, where)
    if not len(indices):
        raise MeasureError(
            f"where={where!r} keeps none of the {len(dataset)} rows: loosen it."
            if where
            else "the data have no rows: give at least one."
        )
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
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise MeasureError(
            f"data={str(data)!r} cannot be loaded ({reason}): give a .jsonl or .parquet file with a row per response, "
            "or the name of a dataset."
        ) from error
    assert isinstance(loaded, DatasetDict)
    if split not in loaded:
        raise MeasureError(f"split={split!r} is not in {data}, which has {', '.join(loaded)}: name one of these.")
    return loaded[split]


def _check_columns(dataset: Dataset, needs_response: bool) -> None:
    columns = set(dataset.column_names)
    wanted: list[tuple[str, ...]] = [("prompt", "messages")]
    if needs_response:
        wanted.append(("response", "completion", "response_ids", "messages"))
    for names in wanted:
        if not columns & set(names):
            raise MeasureError(
                f"the data have no column {' or '.join(map(repr, names))} (they have "
                f"{', '.join(dataset.column_names)}): rename one to it."
            )


def _where(dataset: Dataset, where: str) -> list[int]:
    frame = dataset.to_pandas()
    try:
        kept = frame.query(where, engine="python")
        return [int(index) for index in kept.index]
    except Exception as error:  # pandas raises whatever its parser or the columns' types do
        columns = ", ".join(dataset.column_names)
        raise MeasureError(
            f"where={where!r} cannot be evaluated ({' '.join(str(error).split())}): write an expression over the "
            f'columns {columns}, such as "not correct".'
        ) from error


def _row(index: int, row: Mapping[str, Any]) -> Row:
    conversation = row.get("messages")
    prompt = row.get("prompt")
    response = next((row[name] for name in ("response", "completion") if row.get(name) is not None), None)
    if conversation and prompt is None:
        prompt, response = conversation[:-1], conversation[-1:]
    group = row.get("group")
    return Row(
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
