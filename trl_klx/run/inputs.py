"""Model path, dataset and reward functions, checked before any model is loaded."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers import AutoConfig

from .arguments import BadInput, Recipe, RunArguments

# What TRL itself passes to every reward function.
_FROM_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, checked and loaded; the models are left to the trainer."""

    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    rewards: list[Callable] = field(default_factory=list)
    gold: Callable | None = None


def check_model(
    path: str | None,
    *,
    option: str = "model_name_or_path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a path, given as `option`, that is neither a local model nor one on the Hub; reads its config only."""
    if path is None:
        raise BadInput(f"{option} is missing: give a local folder or the name of a model on the Hub.")
    try:
        AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        maker = _maker(path)
        hint = f"run `{maker}` first" if maker else "check the spelling"
        raise BadInput(
            f"{option}={path!r} is neither a local folder with a config.json nor a model that the Hub gives "
            f"here: {hint}."
        ) from error


def _maker(path: str) -> str | None:
    """The command that makes what is at a path, as the recipes have it."""
    return next((f"trl-klx {name}" for name in ("starter", "stories") if path.startswith(f"runs/{name}")), None)


def load_reward_functions(names: list[str] | str, *, option: str = "reward_funcs") -> list[Callable]:
    """Import reward functions from dotted paths, given as `option`.

    The working directory is on the path, as in TRL's scripts.
    """
    names = [names] if isinstance(names, str) else names
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return [_load_function(name, option) for name in names]


def load_gold_reward(name: str | None) -> Callable | None:
    """Import the gold reward function from its dotted path, if there is one."""
    if name is None:
        return None
    return load_reward_functions([name], option="gold_reward_func")[0]


def _load_function(name: str, option: str) -> Callable:
    module_name, _, function_name = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), function_name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{option}={name!r} cannot be imported ({error}): give module.function.") from error
    if not callable(function):
        raise BadInput(f"{option}={name!r} is no function: give module.function.")
    return function


def load_splits(
    recipe: Recipe, *, columns: Sequence[tuple[str, ...]], rewards: Sequence[Callable] = (), needs_test: bool = False
) -> Inputs:
    """Load the dataset and check its splits, columns and size against what the run needs.

    Args:
        recipe: names the dataset, and says whether the run evaluates.
        columns: of each tuple, the dataset must have one column.
        rewards: reward functions; their columns must be there too, and in the test split the gold reward's.
        needs_test: whether the test split is needed even where the run does not evaluate.

    Raises:
        BadInput: the gold reward, dataset, split or column is missing, or a split is empty.
    """
    run, args, _ = recipe
    gold = load_gold_reward(run.gold_reward_func)
    dataset = prepare_rows(load_named_dataset(run), run.dataset_prepare)
    wanted = {"dataset_train_split": run.dataset_train_split}
    if needs_test or args.eval_strategy != "no" or args.eval_on_start:
        wanted["dataset_test_split"] = run.dataset_test_split
    for option, split in wanted.items():
        if split not in dataset:
            raise BadInput(
                f"{option}={split!r} is not in {run.dataset_name}, which has {', '.join(dataset)}: name one of these."
            )
        read = [*rewards, *([gold] if gold is not None and option == "dataset_test_split" else [])]
        if isinstance(dataset[split], Dataset) and len(dataset[split]) == 0:
            raise BadInput(f"the split {split!r} of the dataset is empty: give it at least one row.")
        if dataset[split].column_names is not None:  # a stream may not know its columns before it is read
            check_columns(dataset[split].column_names, split, columns, read)
    test = dataset[run.dataset_test_split] if "dataset_test_split" in wanted else None
    return Inputs(dataset[run.dataset_train_split], test, list(rewards), gold)


def prepare_rows(dataset: DatasetDict, name: str | None) -> DatasetDict:
    """Put the result of the function `name`, a dotted path, in the place of every row.

    Raises:
        BadInput: it cannot be imported, or fails on the first row.
    """
    if name is None:
        return dataset
    (function,) = load_reward_functions([name], option="dataset_prepare")
    prepared = {}
    for split, rows in dataset.items():
        first = next(iter(rows), None)
        if first is None:
            prepared[split] = rows  # refused later, as empty
            continue
        try:
            function(dict(first))
        except Exception as error:  # a user's function may raise anything
            raise BadInput(
                f"dataset_prepare={name!r} fails on the first row of the split {split!r} "
                f"({type(error).__name__}: {first_line(error)}): it must take one row and return one."
            ) from error
        prepared[split] = rows.map(function, remove_columns=list(first))
    return type(dataset)(prepared)


def load_named_dataset(args: RunArguments) -> DatasetDict:
    """The dataset that the recipe names, all its splits.

    Raises:
        BadInput: there is none, with the reason.
    """
    if args.dataset_name is None:
        raise BadInput("dataset_name is missing: give a folder with train.jsonl, or the name of a dataset on the Hub.")
    try:
        return load_dataset(args.dataset_name, name=args.dataset_config, streaming=args.dataset_streaming)
    except Exception as error:  # `datasets` raises a different class for every way a path can be wrong
        looks_local = args.dataset_name.startswith(("/", ".", "runs/")) and not Path(args.dataset_name).exists()
        reason = "there is no such folder" if looks_local else f"{type(error).__name__}: {first_line(error)}"
        maker = _maker(args.dataset_name)
        hint = f"; run `{maker}` first" if maker else ""
        raise BadInput(f"dataset_name={args.dataset_name!r} cannot be loaded ({reason}){hint}.") from error


def check_columns(
    columns: Sequence[str], split: str, wanted: Sequence[tuple[str, ...]], rewards: Sequence[Callable]
) -> None:
    """Refuse the columns of a split that lack one of each tuple of `wanted`, or what a reward function needs."""
    for names in wanted:
        if not set(names) & set(columns):
            either = " or ".join(repr(name) for name in names)
            has = ", ".join(columns)
            raise BadInput(f"the split {split!r} has no column {either} (it has {has}): rename one to it.")
    for function in rewards:
        for name, parameter in inspect.signature(function).parameters.items():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required and name not in _FROM_TRL and name not in columns:
                raise BadInput(
                    f"the reward function {getattr(function, '__name__', function)!r} needs a column {name!r} and the "
                    f"split {split!r} has {', '.join(columns)}: rename or add the column."
                )


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
