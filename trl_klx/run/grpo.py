"""GRPO from a recipe: what `trl-klx grpo`, `scripts/grpo.py` and `accelerate launch` run."""

import sys
from functools import partial

from .recipe.grpo_recipe import GRPO
from .train import run

command_parser = GRPO.command_parser
main = partial(run, GRPO)

if __name__ == "__main__":
    sys.exit(main())
