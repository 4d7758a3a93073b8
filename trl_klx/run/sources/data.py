"""The dataset that a recipe names: opened, prepared row by row, and a sentence about whatever keeps it from that."""

import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ...recipe_files import shipped_recipe
from ...trainers.rewarding.calls import raised
from ...wording import first_line
from ..recipe.arguments import BadInput, RunArguments
from .named_data import FORMATS, load_named
from .users_code import UsersError, load_function


def maker(path: str) -> str | None:
    """The command that makes what the shipped recipes expect at a path."""
    if path.startswith("runs/starter"):
        return "trl-klx starter"
    prepared = {"runs/stories": "tinystories-15m", "runs/sums": "smollm2-135m"}
    folder = next((folder for start, folder in prepared.items() if path.startswith(start)), None)
    return folder and f"python {shipped_recipe(f'recipes/{folder}/prepare.py')}"


def open_dataset(args: RunArguments, *, streaming: bool, seed: int) -> DatasetDict:
    """The dataset that the recipe names, all its splits, each row prepared; `seed` is that of the run.

    Raises:
        BadInput: there is none, or a row cannot be read or prepared, with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = load_named(args, streaming=streaming, seed=seed)
    except BadInput:
        raise
    except Exception as error:  # `datasets` raises a different class for every way a path can be wrong
        names = args.dataset_names
        option = "dataset_name" if args.datasets is None else "datasets with path"
        missing = [name for name in names if _means_a_path(name) and not Path(name).exists()]
        name = (missing or names)[0]
        reason = f"there is no such {_kind_of(name)}" if missing else why_unreadable(names, error)
        hint = f"; run `{maker(name)}` first" if maker(name) else _beside(name) if missing else ""
        which = name if missing or len(names) == 1 else ", ".join(names)
        said = f"{option}={which!r} cannot be loaded ({reason}){hint}"
        raise BadInput(said if said.endswith("?") else f"{said}.") from error
    return prepare_rows(dataset, args.dataset_prepare)


def _means_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "runs/")) or Path(name).suffix in FORMATS


def _beside(path: str) -> str:
    """What is there in place of a path that is not, if its name is near."""
    there = [other.name for other in Path(path).parent.glob("*")]
    near = difflib.get_close_matches(Path(path).name, there, n=1, cutoff=0.7)
    return f": did you mean {str(Path(path).with_name(near[0]))!r}?" if near else "; check the spelling"


def _kind_of(path: str) -> str:
    return "file" if Path(path).suffix in FORMATS else "folder"


def wanted_splits(dataset: DatasetDict, args: RunArguments, *, needs_test: bool) -> dict[str, Any]:
    """The splits that a run reads, by the option that names them. Raises BadInput where one is not there."""
    wanted = {"dataset_train_split": args.dataset_train_split}
    if needs_test:
        wanted["dataset_test_split"] = args.dataset_test_split
    for option, split in wanted.items():
        if split not in dataset:
            there = _splits(dataset, args, option)
            raise BadInput(f"{option}={split!r} is not in {', '.join(args.dataset_names)}, {there}.")
    return {option: dataset[split] for option, split in wanted.items()}


def _splits(dataset: DatasetDict, args: RunArguments, option: str) -> str:
    """Which splits there are, and how to get others."""
    if option == "dataset_train_split":
        return f"which has {', '.join(dataset)}: name one of these"
    if args.datasets is not None and args.test_split_size is None:
        return "a mixture, which has train alone: set test_split_size, or eval_strategy to no"
    path = Path(str(args.dataset_name))
    if path.is_file():
        two = f"train{path.suffix} and test{path.suffix}"
        return f"a file, which has train alone: name a folder with {two}, or set eval_strategy to no"
    return f"which has {', '.join(dataset)}: name one of these"


def prepare_rows(dataset: DatasetDict, name: str | None) -> DatasetDict:
    """Put the result of the function `name` in the place of every row.

    Raises:
        BadInput: it cannot be imported, fails on a row, or makes no row of one.
    """
    if name is None:
        return dataset
    function = load_function(name, "dataset_prepare")
    prepared = {}
    for split, rows in dataset.items():
        first = next(iter(rows), None)
        if first is None:
            prepared[split] = rows  # refused later, as empty
            continue
        _prepared(function, dict(first), f"the first row of the split {split!r}", name)
        given = {"function": function, "name": name, "split": split}
        # `datasets` knows an imported function by its name, and would take what an earlier version of it made.
        anew = {"load_from_cache_file": False} if isinstance(rows, Dataset) else {}
        try:
            made = rows.map(_numbered, with_indices=True, fn_kwargs=given, remove_columns=list(first), **anew)
        except BadInput:
            raise
        except Exception as error:  # rows whose types do not fit together
            raise BadInput(
                f"dataset_prepare={name!r} makes rows of the split {split!r} that do not fit together "
                f"({type(error).__name__}: {first_line(error)}): give every row the same columns and types."
            ) from error
        if isinstance(made, Dataset):
            made._fingerprint = _content(made)  # or tokens made of it would be taken from a cache
        prepared[split] = made
    return type(dataset)(prepared)


def _content(rows: Dataset) -> str:
    """A fingerprint of what the rows hold."""
    digest = hashlib.sha256(repr(rows.features).encode())
    for batch in rows.data.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def _numbered(row: Mapping[str, Any], number: int, function: Callable, name: str, split: str) -> Mapping[str, Any]:
    return _prepared(function, row, f"row {number} of the split {split!r}", name)


def _prepared(function: Callable, row: Mapping[str, Any], place: str, name: str) -> Mapping[str, Any]:
    try:
        result = function(row)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        sentence = raised(f"dataset_prepare={name!r} fails on {place}: it", error)
        raise UsersError(f"{sentence}; it must take one row and return one.") from error
    if not isinstance(result, Mapping) or not result:
        raise BadInput(
            f"dataset_prepare={name!r} returns {repr(result)[:80]} for {place}: it must take one row and return one, a "
            "dict of columns."
        )
    return result


def why_unreadable(names: list[str], error: BaseException) -> str:
    """The reason why datasets cannot be loaded: the line of a local file where it is one, else the last line of the
    error."""
    kinds: dict[str, tuple[str, str]] = {}  # of each column, and where it was first seen
    for file in (file for name in names for file in _json_files(Path(name))):
        reason = _wrong_line(file, kinds)
        if reason is not None:
            return reason
    while error.__cause__ is not None:
        error = error.__cause__
    if "corresponds to no data" in str(error):  # a table of a header alone
        return "a split is empty: give it at least one row"
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"


def _json_files(path: Path) -> Iterator[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return (file for file in files if file.is_file() and file.suffix in (".jsonl", ".json"))


def _wrong_line(file: Path, kinds: dict[str, tuple[str, str]]) -> str | None:
    """What is wrong with the first wrong line of a file of JSON objects, one a line, beside the files before it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        return f"{file} cannot be read, {first_line(error)}{remedy}"
    if not any(line.strip() for line in lines):
        return f"{file} is empty: give it at least one row"
    if file.suffix == ".json":
        return None  # may be one value over many lines
    earlier_columns = set(kinds)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"{file}, line {number} is not JSON, {error.msg} at column {error.colno}: mend or remove the line"
        if not isinstance(row, dict):
            return f"{file}, line {number} is a {type(row).__name__} and no object of columns"
        for column, value in row.items():
            place = f"{file}, line {number}"
            if earlier_columns and column not in earlier_columns:
                return f"{place} has the column {column!r}, which the files before it lack"
            kind, where = kinds.setdefault(column, (_kind(value), place))
            if not kind:
                kinds[column] = (_kind(value), place)
            elif _kind(value) not in ("", kind):
                return f"{place}: {column} is {_kind(value)}, and {kind} in {where}"
    return None


def _kind(value: Any) -> str:
    """What `datasets` tells apart, in the user's words; "" for null, which goes with all."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
