"""The algorithms by their names."""

from pathlib import Path

from .algorithm import Algorithm
from .arguments import BadInput
from .dpo_recipe import DPO
from .grpo_recipe import GRPO
from .ppo_recipe import PPO

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in (GRPO, PPO, DPO)}


def algorithm_for(recipe: str | Path, given: str | None = None) -> Algorithm:
    """The algorithm of a recipe: as given, or the first word of its file's name.

    Raises:
        BadInput: neither is the name of one.
    """
    *others, last = ALGORITHMS
    if given is not None and given not in ALGORITHMS:
        raise BadInput(f"algorithm={given!r} does not exist: use {', '.join(others)} or {last}.")
    name = given or Path(recipe).stem.split("_")[0]
    if name not in ALGORITHMS:
        raise BadInput(f"--config {recipe} does not begin with {', '.join(others)} or {last}: give --algorithm.")
    return ALGORITHMS[name]
