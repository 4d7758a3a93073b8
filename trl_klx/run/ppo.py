"""PPO from a recipe: what `trl-klx ppo`, `scripts/ppo.py` and `accelerate launch` run."""

import sys
from functools import partial

from .recipe.ppo_recipe import PPO
from .train import run

command_parser = PPO.command_parser
main = partial(run, PPO)

if __name__ == "__main__":
    sys.exit(main())
