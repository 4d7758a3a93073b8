"""TRL's trainers with a chosen KL."""

from .grpo import KLXGRPOTrainer
from .grpo_config import KLXGRPOConfig

__all__ = ["KLXGRPOConfig", "KLXGRPOTrainer"]
