"""DPO from a recipe: what `trl-klx dpo`, `scripts/dpo.py` and `accelerate launch` run."""

import sys
from functools import partial

from .recipe.dpo_recipe import DPO
from .train import run

command_parser = DPO.command_parser
main = partial(run, DPO)

if __name__ == "__main__":
    sys.exit(main())
