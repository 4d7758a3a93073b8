"""Controllers of beta (`controllers`), and simulated plants to try them on (`plants`). Plain Python, no torch."""

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
