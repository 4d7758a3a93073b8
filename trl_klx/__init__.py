"""KL control for TRL's trainers: how the KL is estimated, where it enters, and what holds it at its target.

`trl_klx.kl` is the maths (torch only), `trl_klx.control` the controllers of beta (plain Python), `trl_klx.trainers` the
trainers, and `compare_runs` draws runs beside each other. What is here is imported on first use, so that `import
trl_klx` does not load TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"
__all__ = [
    "KLXDPOConfig",
    "KLXDPOTrainer",
    "KLXGRPOConfig",
    "KLXGRPOTrainer",
    "KLXPPOConfig",
    "KLXPPOTrainer",
    "__version__",
    "compare_runs",
]

if TYPE_CHECKING:
    from .monitor.comparison import compare_runs
    from .trainers.dpo.config import KLXDPOConfig
    from .trainers.dpo.trainer import KLXDPOTrainer
    from .trainers.grpo.config import KLXGRPOConfig
    from .trainers.grpo.trainer import KLXGRPOTrainer
    from .trainers.ppo.config import KLXPPOConfig
    from .trainers.ppo.trainer import KLXPPOTrainer

_HOME = {
    "KLXDPOConfig": "trainers.dpo.config",
    "KLXDPOTrainer": "trainers.dpo.trainer",
    "KLXGRPOConfig": "trainers.grpo.config",
    "KLXGRPOTrainer": "trainers.grpo.trainer",
    "KLXPPOConfig": "trainers.ppo.config",
    "KLXPPOTrainer": "trainers.ppo.trainer",
    "compare_runs": "monitor.comparison",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
