"""Groups of prompts (tasks, domains), each with a KL, a target and a controller of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from ...config.options import KLArguments


def group_names(args: KLArguments, *datasets: Any) -> tuple[str, ...]:
    """The groups that `kl_group_column` names in the datasets, sorted: the same on every process. () without a column.

    A dataset may be None, or a mapping of named splits. A stream cannot be looked through beforehand: its groups are
    those of `kl_group_targets`.

    Raises:
        ValueError: a dataset lacks the column or a row its group, or a group and the targets do not fit.
    """
    column = args.kl_group_column
    if column is None:
        return ()
    targets = args.kl_group_targets if isinstance(args.kl_group_targets, dict) else {}
    found: set[str] = set()
    streams = False
    for dataset in _flat(datasets):
        names = dataset.column_names
        if names is not None and column not in names:
            raise ValueError(
                f"kl_group_column={column!r} is not a column of the dataset: give one of {', '.join(names)}."
            )
        if isinstance(dataset, IterableDataset):
            streams = True
            continue
        values = dataset.unique(column)
        if None in values:
            raise ValueError(f"kl_group_column={column!r} is empty in a row of the dataset: give every row its group.")
        found |= {str(value) for value in values}
    if streams:
        if not targets:
            raise ValueError(
                f"kl_group_column={column!r} is in a streamed dataset, whose groups cannot be known beforehand: name "
                "them all in kl_group_targets, or load the dataset without streaming."
            )
        found |= set(targets)
    _check_targets(args, targets, found)
    return tuple(sorted(found))


def _flat(datasets: Iterable[Any]) -> list[Any]:
    """Every split of every dataset that is there."""
    return [
        split
        for dataset in datasets
        if dataset is not None
        for split in (dataset.values() if isinstance(dataset, Mapping) else [dataset])
    ]


def _check_targets(args: KLArguments, targets: Mapping[str, float], found: set[str]) -> None:
    strange = sorted(set(targets) - found)
    if strange:
        raise ValueError(
            f"kl_group_targets names {strange[0]!r} and kl_group_column={args.kl_group_column!r} has only "
            f"{', '.join(sorted(found))}: correct the name, or remove it."
        )
    bare = sorted(found - set(targets))
    if targets and bare and args.kl_target is None:
        raise ValueError(f"kl_group_targets has no target for {bare[0]!r}: add it, or set kl_target for all others.")


def group_numbers(
    rows: Sequence[Mapping[str, Any]], column: str, names: tuple[str, ...], device: torch.device
) -> Tensor:
    """(B,) place in `names` of each row's group.

    Raises:
        ValueError: a row is of a group that was not there when training began.
    """
    places = {name: place for place, name in enumerate(names)}
    numbers = []
    for row in rows:
        name = str(row.get(column))
        if name not in places:
            raise ValueError(
                f"a row has {column}={name!r}, and the groups of this run are {', '.join(names)}: name it in "
                "kl_group_targets, or leave the row out."
            )
        numbers.append(places[name])
    return torch.tensor(numbers).to(device, non_blocking=True)
