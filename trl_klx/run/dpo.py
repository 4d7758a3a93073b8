"""DPO from a recipe: `scripts/dpo.py` and `trl-klx dpo`."""

import sys
from argparse import ArgumentParser

from ..trainers.dpo.config import KLXDPOConfig
from ..trainers.dpo.trainer import KLXDPOTrainer
from .arguments import Recipe
from .help import help_parser
from .inputs import Inputs, Stop, read_inputs
from .train import run_recipe, trainer_arguments


def command_parser(program: str) -> ArgumentParser:
    """What the command takes, for help and completion."""
    return help_parser(program, KLXDPOConfig)


def main(argv: list[str] | None = None, program: str = "dpo.py") -> int:
    """Train with DPO as a recipe says. Returns the exit status: 0, or 2 for bad input."""
    return run_recipe(argv, program, KLXDPOConfig, load_inputs, build_trainer)


def load_inputs(recipe: Recipe) -> Inputs:
    """DPO needs pairs, whose prompt may be left to TRL to find; the KL is probed on the prompts of the test split.

    Raises ValueError.
    """
    return read_inputs("dpo", recipe, Stop())  # type: ignore[return-value]  # None only where problems are collected


def build_trainer(recipe: Recipe, inputs: Inputs) -> KLXDPOTrainer:
    """The trainer that the recipe describes; its reference is the model that it starts from."""
    return KLXDPOTrainer(**trainer_arguments(recipe, inputs))


if __name__ == "__main__":
    sys.exit(main())
