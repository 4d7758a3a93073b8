"""Everything that a recipe names, read and checked: a run stops at the first problem, a dry run collects all."""

from collections.abc import Callable, Iterator
from typing import Any

from trl.trainer.utils import get_callable_name

from ...trainers.checkpoints.run_lock import check_not_in_use, folder_problem
from ...trainers.checks.inputs import split_problems
from ...trainers.checks.lengths import length_problems
from ...trainers.checks.packages import missing_packages
from ...trainers.checks.rows import rows_of
from ...trainers.checks.start import load_tokenizer
from ...trainers.errors import FolderError
from ...wording import first_line
from ..recipe.algorithm import Algorithm, Inputs
from ..recipe.arguments import BadInput, Findings, Recipe
from .data import open_dataset, wanted_splits
from .named_models import NamedModels, named_models, trusts_code
from .named_rewards import named_rewards, reads_messages
from .tried_settings import setting_problems
from .users_code import try_reward


def start_problems(recipe: Recipe) -> Iterator[str]:
    """Sentences about packages that are not installed and about output_dir."""
    args, model = recipe.args, recipe.model
    fields = ("attn_implementation", "load_in_4bit", "load_in_8bit")
    asked = {name: getattr(model, name) for name in fields if getattr(model, name, None)}
    yield from missing_packages(args, {**(args.model_init_kwargs or {}), **asked})
    problem = folder_problem(args.output_dir)
    if problem is not None:
        yield problem
        return
    try:
        check_not_in_use(args.output_dir)
    except FolderError as error:
        yield str(error)


def read_inputs(
    algorithm: Algorithm, recipe: Recipe, found: Findings, *, streaming: bool = False
) -> tuple[Inputs | None, NamedModels | None]:
    """Read and check everything that a recipe names.

    Args:
        algorithm: of the recipe.
        recipe: the recipe.
        found: takes every problem.
        streaming: whether to read a dataset of the Hub as a stream, so that nothing is downloaded but its first rows.

    Returns:
        Data and rewards, and what the models consist of; None for what has a problem of its own, and `found` does not
        raise.
    """
    run, args, _ = recipe
    for problem in setting_problems(recipe):
        found.add(problem)
    rewards, gold = named_rewards(algorithm, recipe, found)
    as_stream = run.dataset_streaming or (streaming and not run.data_is_local)
    dataset = found.ask(open_dataset, run, streaming=as_stream, seed=args.seed)
    needs_test = bool(getattr(args, "kl_probe_steps", None)) or args.eval_strategy != "no" or bool(args.eval_on_start)
    splits = None if dataset is None else found.ask(wanted_splits, dataset, run, needs_test=needs_test)
    config, models = named_models(recipe, found)
    tokenizer = found.ask(_tokenizer, recipe)
    if splits is None:
        return None, models
    for option, split in splits.items():
        name, is_test = getattr(run, option), option == "dataset_test_split"
        readers = [*rewards, *([gold] if gold is not None and is_test else [])]
        problems = found.ask(_all_problems, algorithm, name, split, readers)
        if problems == [] and tokenizer is not None:
            problems = list(length_problems(algorithm.rows, args, name, split, tokenizer, config))
            tried = readers[len(rewards) :] if is_test else rewards
        else:
            tried = []
        for problem in problems or []:
            found.add(problem)
        for reward in tried:
            _try(reward, split, args, found)
    return Inputs(splits["dataset_train_split"], splits.get("dataset_test_split"), rewards, gold), models


def _all_problems(algorithm: Algorithm, name: str, split: Any, readers: list[Callable]) -> list[str]:
    """Every problem of a split. Raises BadInput where its rows cannot even be read, as those of a stream."""
    try:
        return list(split_problems(algorithm.rows, name, split, readers))
    except BadInput:
        raise
    except Exception as error:  # what a file holds is read here for the first time, where it is a stream
        raise BadInput(
            f"the split {name!r} of the dataset cannot be read ({type(error).__name__}: {first_line(error)}): look at "
            f"its files{', and save them as UTF-8' if isinstance(error, UnicodeDecodeError) else ''}."
        ) from error


def _try(reward: Callable, split: Any, args: Any, found: Findings) -> None:
    answers = getattr(args, "num_generations", 2)  # GRPO's
    max_steps = args.max_steps if args.max_steps > 0 else 1000
    name, row = get_callable_name(reward), next(rows_of(split))
    if reads_messages(reward) and isinstance(row.get("prompt"), str):
        found.add(
            f"the reward {name} of TRL reads messages, and the prompts are text: make each a list of messages, or give "
            "a reward function of your own."
        )
        return
    found.ask(try_reward, reward, name, row, answers, max_steps)


def _tokenizer(recipe: Recipe) -> Any:
    """The policy's tokenizer; None where no model is named. Raises ValueError where there is none."""
    model, path = recipe.model, recipe.model.model_name_or_path
    if path is None:
        return None
    where: dict[str, Any] = {"revision": model.model_revision, "trust_remote_code": trusts_code(recipe)}
    return load_tokenizer(path, f"model_name_or_path={path!r}", **where)
