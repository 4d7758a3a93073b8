"""The three algorithms by name, and the config class of each, imported when asked for."""

from pathlib import Path

from ..trainers.checks.rows import PAIRS, PROMPTS, PROMPTS_OR_TOKENS
from .arguments import BadInput

ALGORITHMS = ("grpo", "ppo", "dpo")
ROWS = {"grpo": PROMPTS, "ppo": PROMPTS_OR_TOKENS, "dpo": PAIRS}


def algorithm_of(recipe: str | Path, given: str | None = None) -> str:
    """The algorithm of a recipe: as given, or the first word of its file's name.

    Raises:
        BadInput: neither says it.
    """
    name = given or Path(recipe).stem.split("_")[0]
    if name not in ALGORITHMS:
        raise BadInput(
            f"--config {recipe} does not begin with {', '.join(ALGORITHMS[:-1])} or {ALGORITHMS[-1]}: give --algorithm."
        )
    return name


def config_of(algorithm: str) -> type:
    """The trainer's config class.

    Raises:
        ImportError: PPO, where TRL has none.
    """
    if algorithm == "grpo":
        from ..trainers.grpo.config import KLXGRPOConfig

        return KLXGRPOConfig
    if algorithm == "dpo":
        from ..trainers.dpo.config import KLXDPOConfig

        return KLXDPOConfig
    from ..trainers.ppo.config import KLXPPOConfig

    return KLXPPOConfig
