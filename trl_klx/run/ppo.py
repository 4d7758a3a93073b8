"""PPO from a recipe: `scripts/ppo.py` and `trl-klx ppo`."""

import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from .arguments import Recipe
from .help import help_parser
from .inputs import Inputs, Stop, read_inputs
from .train import refuse, run_recipe, trainer_arguments

if TYPE_CHECKING:
    from ..trainers.ppo.trainer import KLXPPOTrainer


def command_parser(program: str) -> ArgumentParser:
    """What the command takes, for help and completion; raises ImportError where TRL has no PPO."""
    from ..trainers.ppo.config import KLXPPOConfig

    return help_parser(program, KLXPPOConfig)


def main(argv: list[str] | None = None, program: str = "ppo.py") -> int:
    """Train with PPO as a recipe says. Returns the exit status: 0, or 2 for bad input."""
    try:  # TRL has PPO up to 1.12 only
        from ..trainers.ppo.config import KLXPPOConfig
    except ImportError as error:
        return refuse(error)
    return run_recipe(argv, program, KLXPPOConfig, load_inputs, build_trainer)


def load_inputs(recipe: Recipe) -> Inputs:
    """PPO needs prompts, and rewards from functions, a model or both; a value model may start from one of its own.

    Raises ValueError.
    """
    return read_inputs("ppo", recipe, Stop())  # type: ignore[return-value]  # None only where problems are collected


def build_trainer(recipe: Recipe, inputs: Inputs) -> "KLXPPOTrainer":
    """The trainer that the recipe describes."""
    from ..trainers.ppo.trainer import KLXPPOTrainer

    return KLXPPOTrainer(
        reward_funcs=inputs.rewards,
        gold_reward_func=inputs.gold,
        reward_model=recipe.args.reward_model_path,
        value_model=recipe.args.value_model_path,
        **trainer_arguments(recipe, inputs),
    )


if __name__ == "__main__":
    sys.exit(main())
