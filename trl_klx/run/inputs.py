"""Models, data and rewards that a recipe names, read and checked before any model is loaded.

A run and a dry run read them here, by the same checks: the run stops at the first problem, the dry run collects all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedConfig
from trl.trainer.utils import get_callable_name

from ..trainers.checks.inputs import split_problems
from ..trainers.checks.lengths import length_problems
from ..trainers.checks.packages import missing_for_model
from ..trainers.checks.rewards import check_weights
from ..trainers.checks.rows import rows_of
from ..trainers.checks.start import load_tokenizer
from ..trainers.rewarding.gold import check_gold_reward
from ..wording import first_line
from .algorithms import ROWS
from .arguments import BadInput, Recipe
from .checks import model_problems
from .data import maker, open_dataset, wanted_splits
from .settings import setting_problems
from .users_code import load_function, try_reward


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, checked and loaded; the models are left to the trainer."""

    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    rewards: list[Callable] = field(default_factory=list)
    gold: Callable | None = None


class Findings(Protocol):
    """What becomes of a problem."""

    def ask(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a check that raises ValueError; None where it complained and the reading goes on."""

    def add(self, sentence: str) -> None:
        """Take a problem."""


class Stop:
    """Raises at the first problem: what a run does."""

    def ask(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return check(*args, **kwargs)

    def add(self, sentence: str) -> None:
        raise BadInput(sentence)


def read_inputs(algorithm: str, recipe: Recipe, found: Findings, *, streaming: bool = False) -> Inputs | None:
    """Read and check everything that a recipe names.

    Args:
        algorithm: grpo, ppo or dpo.
        recipe: the recipe.
        found: takes every problem.
        streaming: whether to read a dataset of the Hub as a stream, so that nothing is downloaded but its first rows.

    Returns:
        None where there is a problem with the dataset itself, and `found` does not raise.
    """
    run, args, _ = recipe
    for problem in setting_problems(recipe):
        found.add(problem)
    rewards, gold = _read_rewards(algorithm, recipe, found)
    dataset = found.ask(open_dataset, run, streaming=run.dataset_streaming or (streaming and not _is_local(recipe)))
    needs_test = bool(getattr(args, "kl_probe_steps", None)) or args.eval_strategy != "no" or bool(args.eval_on_start)
    splits = None if dataset is None else found.ask(wanted_splits, dataset, run, needs_test=needs_test)
    config = _check_models(recipe, found)
    tokenizer = found.ask(read_tokenizer, recipe)
    if splits is None:
        return None
    for option, split in splits.items():
        name = getattr(run, option)
        readers = [*rewards, *([gold] if gold is not None and option == "dataset_test_split" else [])]
        problems = found.ask(_all_problems, algorithm, name, split, readers)
        for problem in problems or []:
            found.add(problem)
        if problems == [] and tokenizer is not None:
            for problem in length_problems(ROWS[algorithm], args, name, split, tokenizer, config):
                found.add(problem)
        if problems == []:
            for reward in rewards if option == "dataset_train_split" else readers[len(rewards) :]:
                _try(reward, split, recipe, algorithm, found)
    return Inputs(splits["dataset_train_split"], splits.get("dataset_test_split"), rewards, gold)


def _is_local(recipe: Recipe) -> bool:
    return recipe.run.dataset_name is not None and Path(recipe.run.dataset_name).exists()


def _all_problems(algorithm: str, name: str, split: Any, readers: list[Callable]) -> list[str]:
    """Every problem of a split. Raises BadInput where its rows cannot even be read, as those of a stream."""
    try:
        return list(split_problems(ROWS[algorithm], name, split, readers))
    except BadInput:
        raise
    except Exception as error:  # what a file holds is read here for the first time, where it is a stream
        raise BadInput(
            f"the split {name!r} of the dataset cannot be read ({type(error).__name__}: {first_line(error)}): look at "
            "its files."
        ) from error


def _try(reward: Callable, split: Any, recipe: Recipe, algorithm: str, found: Findings) -> None:
    args = recipe.args
    answers = args.num_generations if algorithm == "grpo" else 2
    max_steps = args.max_steps if args.max_steps > 0 else 1000
    found.ask(try_reward, reward, get_callable_name(reward), next(rows_of(split)), answers, max_steps)


def _check_models(recipe: Recipe, found: Findings) -> PreTrainedConfig | None:
    """Check every model that is named; returns the policy's config."""
    args, model, trusts = recipe.args, recipe.model, _trusts(recipe)
    path = model.model_name_or_path
    config = found.ask(check_model, path, revision=model.model_revision, trust_remote_code=trusts)
    for option in ("reward_model_path", "value_model_path"):
        if getattr(args, option, None) is not None:
            found.ask(check_model, getattr(args, option), option=option, trust_remote_code=trusts)
    for problem in (*missing_for_model(config, f"model_name_or_path={path!r}"), *model_problems(recipe)):
        found.add(problem)
    return config


def _trusts(recipe: Recipe) -> bool:
    """Whether code that comes with a model may run."""
    kwargs = recipe.args.model_init_kwargs
    given = isinstance(kwargs, dict) and bool(kwargs.get("trust_remote_code"))
    return given or bool(getattr(recipe.args, "trust_remote_code", False))


def _read_rewards(algorithm: str, recipe: Recipe, found: Findings) -> tuple[list[Callable], Callable | None]:
    """The reward functions and the gold reward function, as far as they can be imported."""
    run, args, _ = recipe
    if algorithm == "dpo":
        if run.reward_funcs:
            found.add(
                f"reward_funcs={run.reward_funcs!r} has no effect in DPO, which learns from the columns chosen and "
                "rejected: remove it."
            )
        if run.gold_reward_func:
            found.add(
                f"gold_reward_func={run.gold_reward_func!r} is not followed in DPO, which samples no answers in "
                "evaluation: remove it, or use GRPO or PPO."
            )
        return [], None
    names = run.reward_funcs or []
    has_model = getattr(args, "reward_model_path", None) is not None
    if not names and not has_model:
        missing = (
            "reward_funcs is missing" if algorithm == "grpo" else "reward_funcs and reward_model_path are both missing"
        )
        found.add(
            f"there is no reward, {missing}: give reward functions, for example "
            "trl_klx.rewards.exact_match or my_rewards.py:function"
            + ", or the path of a reward model" * (algorithm == "ppo")
            + "."
        )
    elif args.reward_weights is not None:
        found.ask(check_weights, args.reward_weights, len(names) + has_model)
    imported = [found.ask(load_function, name, "reward_funcs") for name in names]
    gold = found.ask(load_function, run.gold_reward_func, "gold_reward_func") if run.gold_reward_func else None
    found.ask(check_gold_reward, args, gold)
    return [reward for reward in imported if reward is not None], gold


def check_model(
    path: str | None,
    *,
    option: str = "model_name_or_path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The config of the model at a path, given as `option`; no weight is read.

    Raises:
        BadInput: it is neither a local model nor one on the Hub.
    """
    if path is None:
        raise BadInput(f"{option} is missing: give a local folder or the name of a model on the Hub.")
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        hint = f"run `{maker(path)}` first" if maker(path) else "check the spelling"
        raise BadInput(
            f"{option}={path!r} is neither a local folder with a config.json nor a model that the Hub gives "
            f"here: {hint}."
        ) from error


def read_tokenizer(recipe: Recipe) -> Any:
    """The policy's tokenizer; None where no model is named. Raises BadInput where there is none."""
    model = recipe.model
    if model.model_name_or_path is None:
        return None
    path = model.model_name_or_path
    where: dict[str, Any] = {"revision": model.model_revision, "trust_remote_code": _trusts(recipe)}
    return load_tokenizer(path, f"model_name_or_path={path!r}", **where)
