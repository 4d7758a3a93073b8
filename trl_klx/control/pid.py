"""The PID controller of beta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .base import TargetController, clip, number, refusal


class PIDController(TargetController):
    """A PI controller of log beta on the log of the smoothed KL, which learns from the run how fast it may move.

    A finite reading does the following, in this order; any other only adds one to `skipped`.

    1. Smooth: s <- s + w (min(kl, 2 max(s, target)) - s), where w = 1 / (2 c), or 1 while s = 0, as at first.
       While s <= 0, as before the first update of the policy, nothing more is done.
    2. Error: e <- clip(log(s / target), -1, 1); e_before is the one of the reading before, or e itself where there is
       none, at the first reading or where s was <= 0.
    3. Scale and gain: until the KL first arrives, e >= -0.25, g <- c <- clip(t / 35, 1, 2), where t counts the finite
       readings, this one too. After that c stays, and where |e| > 0.25: if the last such error since then and for
       this target had the other sign (a swing from one side of the target to the other), g <- max(0.7 g, gain_min),
       else, if g < 1, g <- min(1.01 g, 1).
    4. Pace: where e > 0, r = min(1 + a / 20, 3), where a counts the readings in a row above this target. Elsewhere
       r = min(beta / b, 1), where log b <- log b + (log beta - log b) / 70 at every reading, from the first beta.
    5. Move: log beta <- log beta + g (kp (e - e_before) + ki r max(e, -0.5)), within the bounds of beta.

    Point 5 looks ahead: at r = 1 it is g ki times the error that there will be in kp / ki = 17.5 updates if log KL goes
    on as it does, so beta rises while the KL is still below its target and about to pass it. Below target / e the KL
    has no say in that: how fast it rises from 0 is due to the learning rate.

    Point 3 takes the scale of a run from the run itself. The KL that took 70 updates to come up to its target answers
    beta as slowly, so it needs larger moves, and bears to be smoothed over more readings, than one that was there
    after 10. A swing may be due to a policy that answers late, or to a gain that is too large for one that answers
    at once; a smaller gain is right for the second and does the first little harm.

    Point 4 tells the policy's part from beta's. A KL that stays below its target may be due to a policy that has yet to
    learn; beta is then of little effect, and what it sinks it would have to climb again. So it sinks freely to b, its
    own mean over some 70 updates, and the more slowly the further it is below. A KL that stays above its target is
    due to beta: it rises faster and faster.

    The logs make the loop respond alike at every scale of KL and beta; with the bound of point 1 a reading of any size
    moves beta by a bounded factor.

    Defaults: kp 1.75, ki 0.1, gain_min 0.2, coef_min coef / 100, coef_max 100 coef; with gain_min 1 no swing brings g
    below 1. Raises ValueError as `adaptive` does, and unless kp and ki are finite and >= 0 and 0 < gain_min <= 1.

    Sources: Astrom and Murray, "Feedback Systems", chapter 11 (the velocity form, which needs no anti-windup);
    Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods". Gain, pace and the
    defaults come from simulated and real runs: docs/controllers.md.
    """

    kind = "pid"
    takes = ("target", "kp", "ki", "gain_min", "coef_min", "coef_max")
    memory = ("beta", "smooth", "error", "arrived", "scale", "gain", "side", "above", "log_mean")

    def __init__(
        self, coef: float, *, kp: float = 1.75, ki: float = 0.1, gain_min: float = 0.2, **target_and_bounds: Any
    ) -> None:
        super().__init__(coef, **target_and_bounds)
        self.kp, self.ki = number("kp", kp), number("ki", ki)
        self.gain_min = number("gain_min", gain_min, zero=False)
        if self.gain_min > 1:
            raise refusal("gain_min", gain_min, "give at most 1")
        self.smooth = 0.0  # s of the docstring
        self.error = -1.0  # e
        self.arrived = False
        self.scale = 1.0  # c
        self.gain = 1.0  # g
        self.log_mean = math.log(self.coef)  # log b

    def _new_target(self) -> None:
        self.side = 0  # of the target, where the last error beyond 0.25 was: 1, -1, or 0 before the first
        self.above = 0  # a

    def _observe(self, kl: float, n: float) -> None:
        before = self.error if self.smooth > 0 else None
        weight = 0.5 / self.scale if self.smooth else 1.0
        self.smooth += weight * (min(kl, 2 * max(self.smooth, self._target)) - self.smooth)
        if self.smooth <= 0:
            return
        self.error = clip(math.log(self.smooth / self._target), -1.0, 1.0)
        change = 0.0 if before is None else self.error - before
        self._set_gain()
        move = self.gain * (self.kp * change + self.ki * self._pace() * max(self.error, -0.5))
        self.beta = clip(self.beta * math.exp(move), self.coef_min, self.coef_max)

    def _set_gain(self) -> None:
        if not self.arrived:
            self.gain = self.scale = clip(self.readings / 35, 1.0, 2.0)
            self.arrived = self.error >= -0.25
        elif abs(self.error) > 0.25:
            side = 1 if self.error > 0 else -1
            if side == -self.side:
                self.gain = max(0.7 * self.gain, self.gain_min)
            elif self.gain < 1:
                self.gain = min(1.01 * self.gain, 1.0)
            self.side = side

    def _pace(self) -> float:
        """r of the docstring."""
        self.above = self.above + 1 if self.error > 0 else 0
        self.log_mean += (math.log(self.beta) - self.log_mean) / 70
        return min(1 + self.above / 20, 3.0) if self.error > 0 else min(self.beta / math.exp(self.log_mean), 1.0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "integral" in state:
            remedy = f"start the controller anew from its beta, {state.get('beta')!r}, or resume with trl_klx 0.1"
            raise refusal("state", "of trl_klx 0.1, whose pid was another law", remedy)
        super().load_state_dict(state)
