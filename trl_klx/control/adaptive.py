"""Ziegler's controller."""

from __future__ import annotations

from typing import Any

from .base import TargetController, clip, number


class AdaptiveController(TargetController):
    """Multiply beta by a factor near 1 at each reading, which is above 1 where the KL is above its target.

    beta <- clip(beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon), coef_min, coef_max)

    A pure integrator of log beta. `horizon` counts episodes, as `n` does. From n = 5 horizon the factor may
    be <= 0, and the bounds keep beta positive. Defaults: horizon 1e4, coef_min coef / 100, coef_max 100 coef.
    Raises ValueError unless target and settings are finite and > 0 and coef_min <= coef <= coef_max.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    kind = "adaptive"
    takes = ("target", "horizon", "coef_min", "coef_max")

    def __init__(self, coef: float, *, horizon: float = 1e4, **target_and_bounds: Any) -> None:
        super().__init__(coef, **target_and_bounds)
        self.horizon = number("horizon", horizon, zero=False)

    def _observe(self, kl: float, n: float) -> None:
        factor = 1 + clip(kl / self._target - 1, -0.2, 0.2) * n / self.horizon
        self.beta = clip(self.beta * factor, self.coef_min, self.coef_max)
