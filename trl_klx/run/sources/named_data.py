"""What `dataset_name` and `datasets` stand for: a file, a folder, a dataset on the Hub, or a mixture of these."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from ...config.choices import unknown
from ..recipe.arguments import BadInput, RunArguments

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_ENTRY = [field.name for field in dataclasses.fields(DatasetConfig)]
# What `save_to_disk` writes into a folder.
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


def load_named(args: RunArguments, *, streaming: bool, seed: int) -> Any:
    """The splits that a recipe names, as `datasets` makes them; `seed` is that of a mixture's split.

    Raises:
        BadInput: none is named, or what is named cannot be one.
        Exception: whatever `datasets` raises.
    """
    if args.datasets is not None:
        return _mixture(args, streaming=streaming, seed=seed)
    name = args.dataset_name
    if name is None:
        raise BadInput(
            "dataset_name is missing: give a .jsonl, .json, .parquet or .csv file, a folder with train.jsonl, or the "
            "name of a dataset on the Hub."
        )
    folder = Path(name)
    if any((folder / file).is_file() for file in _SAVED):
        saved = load_from_disk(name)
        return DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
    return load_dataset(**_source(name, "dataset_name"), name=args.dataset_config, streaming=streaming)


def _source(name: str, option: str) -> dict[str, Any]:
    """What `load_dataset` is to load. A path that exists never means a dataset on the Hub, nor the name of a format.

    Raises:
        BadInput: a file of an unknown format.
        FileNotFoundError: there is no such file.
    """
    path = Path(name)
    if path.is_dir():
        return {"path": str(path.resolve())}
    if not path.is_file():
        if path.suffix in FORMATS:
            raise FileNotFoundError(name)  # and no dataset on the Hub
        return {"path": name}
    if path.suffix not in FORMATS:
        raise BadInput(f"{option}={name!r} is a file of an unknown format: give {', '.join(FORMATS)}, or a folder.")
    return {"path": FORMATS[path.suffix], "data_files": str(path.resolve())}


def _mixture(args: RunArguments, *, streaming: bool, seed: int) -> Any:
    """TRL's mixture, whose entries may be files. The split is drawn by the run's seed: all processes have the same."""
    if args.dataset_name is not None:
        raise BadInput(f"dataset_name={args.dataset_name!r} and datasets are both given: remove one of them.")
    if args.test_split_size is not None and args.streaming:
        raise BadInput(f"test_split_size={args.test_split_size} cannot split a stream: set streaming to false.")
    entries = [_entry(entry) for entry in args.datasets or []]
    shares = [entry.fraction for entry in entries if entry.fraction is not None]
    if shares and (len(shares) < len(entries) or min(shares) < 0 or not sum(shares)):
        raise BadInput(f"datasets with fraction {shares}: give each of the {len(entries)} datasets one, 0 or more.")
    if shares and args.streaming:
        raise BadInput(f"datasets with fraction {shares} cannot be streams: set streaming to false.")
    streams = (args.streaming or streaming) and not shares and args.test_split_size is None
    mixed: Any = get_dataset(DatasetMixtureConfig(datasets=entries, streaming=streams))
    if args.test_split_size is None:
        return mixed
    return mixed["train"].train_test_split(test_size=args.test_split_size, seed=seed)


def _entry(given: Mapping[str, Any]) -> DatasetConfig:
    """One of `datasets`. Raises BadInput where it is none."""
    for name in given:
        if name not in _ENTRY:
            raise BadInput(unknown("a field of datasets", name, _ENTRY))
    if not isinstance(given.get("path"), str):
        raise BadInput(f"datasets holds {dict(given)!r}, without a path: give a file, a folder or a name on the Hub.")
    source = _source(given["path"], "datasets with path")
    return DatasetConfig(**{**given, **source})
