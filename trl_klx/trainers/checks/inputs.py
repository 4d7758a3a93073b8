"""What is wrong with data and rewards, found before a model is loaded: the same for runs, dry runs and Python."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl.trainer.utils import get_callable_name

from .lengths import length_problems
from .rewards import call_problems, check_weights, name_problems, needed_columns
from .rows import RowKind, column_is_empty, column_problems, row_problems, rows_of


def check_inputs(
    kind: RowKind,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    rewards: Sequence[Any] = (),
    *,
    more: bool = False,
    has_prompts: bool = True,
) -> None:
    """Refuse data and rewards that a trainer cannot use.

    Args:
        kind: what the trainer reads of each row.
        args: the config.
        train_dataset, eval_dataset: as the trainers take them; the latter may be a mapping of named ones.
        rewards: functions, models or their paths.
        more: whether a rollout function or an environment gives the reward functions more than the dataset does.
        has_prompts: False where environments make the prompts, so that the dataset need not hold any.

    Raises:
        ValueError: the first problem, in one sentence.
    """
    if rewards:
        check_weights(getattr(args, "reward_weights", None), len(rewards))
    for split, dataset in _splits(train_dataset, eval_dataset):
        for problem in split_problems(kind, split, dataset, rewards, more=more, has_prompts=has_prompts):
            raise ValueError(problem)


def check_lengths(
    kind: RowKind, args: Any, train_dataset: Any, eval_dataset: Any, tokenizer: Any, model_config: Any
) -> None:
    """Refuse data that the model or its tokenizer cannot read. Raises ValueError with the first problem."""
    for split, dataset in _splits(train_dataset, eval_dataset):
        for problem in length_problems(kind, args, split, dataset, tokenizer, model_config):
            raise ValueError(problem)


def check_kept(given: Any, kept: Any, max_length: int | None) -> None:
    """Warn of how many pairs TRL has dropped because their prompt alone fills `max_length`. Raises ValueError where
    all."""
    if not isinstance(given, Dataset) or not isinstance(kept, Dataset) or len(kept) == len(given):
        return
    dropped = (
        f"{len(given) - len(kept)} of {len(given)} pairs are left out, because their prompts alone fill max_length"
    )
    if len(kept) == 0:
        raise ValueError(f"{dropped}={max_length}: raise it, or shorten the prompts.")
    warnings.warn(f"{dropped}={max_length}.", UserWarning, stacklevel=3)


def split_problems(
    kind: RowKind,
    split: str,
    dataset: Dataset | IterableDataset,
    rewards: Sequence[Any] = (),
    *,
    more: bool = False,
    has_prompts: bool = True,
) -> Iterator[str]:
    """A sentence for everything that is wrong with a dataset, and with the rewards that read it."""
    first = next(rows_of(dataset), None)
    if first is None:
        yield f"the split {split!r} of the dataset is empty: give it at least one row."
        return
    columns = dataset.column_names or list(first)  # a stream may not know them
    missing = list(column_problems(kind, split, columns))
    if has_prompts:
        yield from missing
    for reward in rewards:
        wrong = list(call_problems(reward, columns, split, more=more))
        yield from wrong
        for column in [] if wrong else needed_columns(reward):
            if column in first and column_is_empty(dataset, column):
                yield (
                    f"the reward function {get_callable_name(reward)!r} needs a column {column!r}, which is None in "
                    f"every row of the split {split!r}: fill it."
                )
    if rewards:
        yield from name_problems(columns, split)
    if not missing:
        yield from row_problems(kind, split, dataset)


def _splits(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Dataset | IterableDataset]]:
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    every = [("train_dataset", train_dataset), *named.items()]
    return [(split, dataset) for split, dataset in every if isinstance(dataset, (Dataset, IterableDataset))]
