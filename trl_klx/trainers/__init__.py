"""TRL's trainers with a chosen KL."""

from .grpo import KLXGRPOConfig, KLXGRPOTrainer

__all__ = ["KLXGRPOConfig", "KLXGRPOTrainer"]
