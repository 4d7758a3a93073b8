"""GRPO from a recipe: `scripts/grpo.py` and `trl-klx grpo`."""

import sys
from argparse import ArgumentParser

from ..trainers.grpo.config import KLXGRPOConfig
from ..trainers.grpo.trainer import KLXGRPOTrainer
from .arguments import Recipe
from .help import help_parser
from .inputs import Inputs, Stop, read_inputs
from .train import run_recipe, trainer_arguments


def command_parser(program: str) -> ArgumentParser:
    """What the command takes, for help and completion."""
    return help_parser(program, KLXGRPOConfig)


def main(argv: list[str] | None = None, program: str = "grpo.py") -> int:
    """Train with GRPO as a recipe says. Returns the exit status: 0, or 2 for bad input."""
    return run_recipe(argv, program, KLXGRPOConfig, load_inputs, build_trainer)


def load_inputs(recipe: Recipe) -> Inputs:
    """GRPO needs prompts, and reward functions with the columns that they read. Raises ValueError."""
    return read_inputs("grpo", recipe, Stop())  # type: ignore[return-value]  # None only where problems are collected


def build_trainer(recipe: Recipe, inputs: Inputs) -> KLXGRPOTrainer:
    """The trainer that the recipe describes."""
    return KLXGRPOTrainer(
        reward_funcs=inputs.rewards, gold_reward_func=inputs.gold, **trainer_arguments(recipe, inputs)
    )


if __name__ == "__main__":
    sys.exit(main())
