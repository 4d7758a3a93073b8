"""Controllers of beta (`controllers`), and plants to try them on: simulated (`plants`) and learning (`learners`)."""

from .controllers import (
    KINDS,
    AdaptiveController,
    Controller,
    CosineController,
    FixedController,
    LinearController,
    PIDController,
    make_controller,
)

__all__ = [
    "KINDS",
    "AdaptiveController",
    "Controller",
    "CosineController",
    "FixedController",
    "LinearController",
    "PIDController",
    "make_controller",
]
