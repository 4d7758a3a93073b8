"""The rewards that a recipe names: functions of the user's own, those of TRL by TRL's names, and a reward model."""

from collections.abc import Callable
from typing import Any

from trl import rewards as trl_rewards

from ...trainers.checks.packages import MATH_VERIFY
from ...trainers.checks.rewards import check_weights
from ...trainers.rewarding.gold import check_gold_reward
from ..recipe.algorithm import Algorithm
from ..recipe.arguments import BadInput, Findings, Recipe
from .named_models import REWARDS, classifier_paths
from .users_code import FORMS, load_function

# As in TRL's script for GRPO.
_OF_TRL: dict[str, Callable[[], Callable]] = {
    "accuracy_reward": lambda: trl_rewards.accuracy_reward,
    "reasoning_accuracy_reward": lambda: trl_rewards.reasoning_accuracy_reward,
    "think_format_reward": lambda: trl_rewards.think_format_reward,
    "get_soft_overlong_punishment": lambda: trl_rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}


def load_reward(name: Any, option: str) -> Callable:
    """The reward function of a name: TRL's where TRL has one of that name, else as `load_function`.

    Raises:
        BadInput: there is none, or it needs a package that is not installed.
    """
    own = str(name).removeprefix("trl.rewards.")
    if own not in _OF_TRL:
        if own.isidentifier():
            raise BadInput(f"{option}={name!r} is not a function: give {FORMS}, or one of TRL's: {', '.join(_OF_TRL)}.")
        return load_function(name, option)
    if own.endswith("accuracy_reward") and not MATH_VERIFY.is_there:
        raise BadInput(f"{option} names {own} {MATH_VERIFY.is_missing}, or name another reward.")
    return _OF_TRL[own]()


def reads_messages(reward: Callable) -> bool:
    """Whether a reward is one of TRL's that fail on plain text."""
    names = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    return any(reward is getattr(trl_rewards, name) for name in names)


def named_rewards(algorithm: Algorithm, recipe: Recipe, found: Findings) -> tuple[list[Callable], Callable | None]:
    """The reward functions and the gold reward function, as far as they can be imported."""
    run, args, _ = recipe
    if algorithm.rows.is_pairs:
        for option in ("reward_funcs", "reward_model_name_or_path"):
            if getattr(run, option):
                found.add(
                    f"{option}={getattr(run, option)!r} has no effect in DPO, which learns from the columns chosen and "
                    "rejected: remove it."
                )
        if run.gold_reward_func:
            found.add(
                f"gold_reward_func={run.gold_reward_func!r} is not followed in DPO, which samples no answers in "
                "evaluation: remove it, or use GRPO or PPO."
            )
        return [], None
    names, has_model = run.reward_funcs or [], not set(REWARDS).isdisjoint(classifier_paths(recipe))
    if not names and not has_model:
        option = next(name for name in REWARDS if name in {**vars(args), **vars(run)})
        found.add(
            f"there is no reward, reward_funcs and {option} are both missing: give reward functions, for example "
            "trl_klx.rewards.exact_match or my_rewards.py:my_reward, or the path of a reward model."
        )
    elif args.reward_weights is not None:
        found.ask(check_weights, args.reward_weights, len(names) + has_model)
    imported = [found.ask(load_reward, name, "reward_funcs") for name in names]
    gold = found.ask(load_reward, run.gold_reward_func, "gold_reward_func") if run.gold_reward_func else None
    found.ask(check_gold_reward, args, gold)
    return [reward for reward in imported if reward is not None], gold
