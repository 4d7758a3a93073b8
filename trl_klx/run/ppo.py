"""PPO from a recipe: `scripts/ppo.py` and `trl-klx ppo`."""

import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from ..trainers.gold import check_gold_reward
from .arguments import BadInput, Recipe
from .help import help_parser
from .inputs import Inputs, check_model, load_reward_functions, load_splits
from .train import refuse, run_recipe, trainer_arguments

if TYPE_CHECKING:
    from ..trainers.ppo import KLXPPOTrainer


def command_parser(program: str) -> ArgumentParser:
    """What the command takes, for help and completion; raises ImportError where TRL has no PPO."""
    from ..trainers.ppo_config import KLXPPOConfig

    return help_parser(program, KLXPPOConfig)


def main(argv: list[str] | None = None, program: str = "ppo.py") -> int:
    """Train with PPO as a recipe says. Returns the exit status: 0, or 2 for bad input."""
    try:  # TRL has PPO up to 1.12 only
        from ..trainers.ppo_config import KLXPPOConfig
    except ImportError as error:
        return refuse(error)
    return run_recipe(argv, program, KLXPPOConfig, load_inputs, build_trainer)


def load_inputs(recipe: Recipe) -> Inputs:
    """PPO needs prompts, and rewards from functions, a model or both; a value model may start from one of its own."""
    run, args, model = recipe
    if not (run.reward_funcs or args.reward_model_path):
        raise BadInput(
            "reward_funcs and reward_model_path are both missing: give reward functions as dotted paths, for example "
            "trl_klx.rewards.exact_match, or the path of a reward model."
        )
    rewards = load_reward_functions(run.reward_funcs or [])
    inputs = load_splits(recipe, columns=[("prompt", "input_ids")], rewards=rewards)
    check_gold_reward(args, inputs.gold)
    trusts = bool((args.model_init_kwargs or {}).get("trust_remote_code"))
    check_model(model.model_name_or_path, revision=model.model_revision, trust_remote_code=trusts)
    for option in ("reward_model_path", "value_model_path"):
        if getattr(args, option) is not None:
            check_model(getattr(args, option), option=option, trust_remote_code=trusts)
    return inputs


def build_trainer(recipe: Recipe, inputs: Inputs) -> "KLXPPOTrainer":
    """The trainer that the recipe describes."""
    from ..trainers.ppo import KLXPPOTrainer

    return KLXPPOTrainer(
        reward_funcs=inputs.rewards,
        gold_reward_func=inputs.gold,
        reward_model=recipe.args.reward_model_path,
        value_model=recipe.args.value_model_path,
        **trainer_arguments(recipe, inputs),
    )


if __name__ == "__main__":
    sys.exit(main())
