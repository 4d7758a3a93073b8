"""Controllers of beta, the weight of the KL penalty.

A controller is given one KL reading per rollout or optimizer step and answers with the beta to use next:
`controller = make_controller("pid", 0.05, target=0.1)`, then `beta = controller.update(kl)`.

Units: readings and target are in nats, both per token or both per sequence.
Sign: a KL above the target raises beta, a KL below it lowers beta.
In distributed training give every process the same (reduced) reading, or their betas drift apart.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, ClassVar


def make_controller(kind: str, coef: float, *, target: float | None = None, **settings: Any) -> Controller:
    """Return the controller called `kind`, at beta = `coef`; None for a setting means its default.

    fixed takes no target and no settings; adaptive a target, horizon, coef_min and coef_max; pid a target,
    kp, ki, kd, gain_min, coef_min and coef_max; linear and cosine coef_end and total (see the class of each kind).

    Raises ValueError for an unknown kind, a setting that is missing or not taken, and a value out of range.
    """
    if kind not in KINDS:
        nearest = difflib.get_close_matches(str(kind).lower(), KINDS, n=1, cutoff=0.0)[0]
        raise _refusal("kind", kind, f"use {nearest!r} or another of {', '.join(KINDS)}")
    cls = KINDS[kind]
    given = {name: value for name, value in {"target": target, **settings}.items() if value is not None}
    for name, value in given.items():
        if name not in cls.takes:
            takers = " or ".join(repr(other) for other in KINDS if name in KINDS[other].takes)
            remedy = f"drop it or use kind {takers}" if takers else "drop it"
            raise _refusal(name, value, f"{remedy}; kind {kind!r} takes {', '.join(cls.takes) or 'none'}")
    return cls(coef, **given)


class Controller:
    """What all kinds share: counting, saving and loading; beta stays at coef.

    `readings` and `skipped` are the numbers of finite readings, and of nan and infinite ones, so far.
    """

    kind: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()  # arguments besides coef; each is an attribute of the same name
    memory: ClassVar[tuple[str, ...]] = ()  # attributes that updates change, besides the two counters
    _target: float | None = None

    def __init__(self, coef: float) -> None:
        self.coef = _number("coef", coef, zero=self.kind == "fixed")
        self.readings = 0
        self.skipped = 0

    @property
    def value(self) -> float:
        """Beta after the last update."""
        return self.coef

    @property
    def target(self) -> float | None:
        """The KL to hold, in the unit of the readings; may be set in training. None for kinds without one."""
        return self._target

    @target.setter
    def target(self, target: float | None) -> None:
        if "target" not in self.takes:
            raise _refusal("target", target, f"kind {self.kind!r} has none, so use kind 'adaptive' or 'pid'")
        remedy = f"kind {self.kind!r} needs the KL to hold, a finite number > 0"
        self._target = _number("target", target, zero=False, remedy=remedy)

    def update(self, kl: float, n: float = 1) -> float:
        """Take a KL reading, in the unit of the target, of `n` episodes (sequences); return the new beta.

        Only `adaptive` uses `n`. A nan or infinite reading is counted in `skipped` and otherwise ignored.
        Raises ValueError if `n` is negative or not finite.
        """
        n = _number("n", n, remedy="give the number of episodes in the batch, >= 0")
        if math.isfinite(kl):
            self.readings += 1
            self._observe(float(kl), n)
        else:
            self.skipped += 1
        return self.value

    def _observe(self, kl: float, n: float) -> None:
        """Move beta after a finite reading."""

    def state_dict(self) -> dict[str, Any]:
        """Return, JSON-serialisable, all that `load_state_dict` needs to continue bit for bit."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self._names()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, its target included.

        Raises ValueError for a state of another kind or of other settings, missing or extra keys, and values
        that are not finite numbers of the right type; the controller then stays as it was.
        """
        remedy = f"load the unaltered state_dict() of a controller of kind {self.kind!r}"
        if state.get("kind") != self.kind:
            raise _refusal("kind", state.get("kind"), remedy)
        wanted = {"kind", *self._names()}
        for trouble, names in (("missing", wanted - set(state)), ("extra", set(state) - wanted)):
            if names:
                raise _refusal(f"{trouble} keys of the state", sorted(names), remedy)
        for name in self._names():
            value, mine = state[name], getattr(self, name)
            positive = name in ("beta", "target", "gain")
            if type(value) is not type(mine) or not math.isfinite(value) or (positive and value <= 0):
                raise _refusal(name, value, remedy)
            if name in ("coef", *self.takes) and name != "target" and value != mine:
                raise _refusal(name, value, f"the state must agree with the controller, which has {mine!r}")
        for name in self._names():
            setattr(self, name, state[name])

    def _names(self) -> tuple[str, ...]:
        return ("coef", *self.takes, "readings", "skipped", *self.memory)


class FixedController(Controller):
    """Leave beta at coef, which is >= 0; 0 turns the penalty off."""

    kind = "fixed"


class LinearController(Controller):
    """Move beta from coef to coef_end on a straight line, whatever the KL is, over `total` updates.

    beta_k = (1 - w_k) coef + w_k coef_end, with w_k = min(k / total, 1) after k updates.
    An update with a reading that is not finite counts too, because the law does not look at the KL. Both settings
    must be given; coef_end may be above coef, but not 0, which would switch the KL penalty off.
    Raises ValueError unless coef and coef_end are finite and > 0 and total is an int >= 1.
    """

    kind = "linear"
    takes = ("coef_end", "total")

    def __init__(self, coef: float, coef_end: float | None = None, total: int | None = None) -> None:
        super().__init__(coef)
        self.coef_end = _number("coef_end", coef_end, zero=False)
        if not isinstance(total, Integral) or isinstance(total, bool) or total < 1:
            raise _refusal("total", total, "give the number of updates to anneal over, an int >= 1")
        self.total: int = int(total)

    @property
    def value(self) -> float:
        weight = self._weight(min((self.readings + self.skipped) / self.total, 1.0))
        return (1 - weight) * self.coef + weight * self.coef_end

    def _weight(self, progress: float) -> float:
        return progress


class CosineController(LinearController):
    """Move beta from coef to coef_end on a cosine, flat at both ends, whatever the KL is, over `total` updates.

    As `linear`, with w_k = (1 - cos(pi min(k / total, 1))) / 2.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5.
    """

    kind = "cosine"

    def _weight(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


class _TargetController(Controller):
    """A controller with a target, and with beta held within [coef_min, coef_max]."""

    memory: ClassVar[tuple[str, ...]] = ("beta",)
    _target: float

    def __init__(
        self, coef: float, *, target: Any = None, coef_min: float | None = None, coef_max: float | None = None
    ) -> None:
        super().__init__(coef)
        self.beta = self.coef
        self.target = target
        self.coef_min = _number("coef_min", self.coef * 1e-2 if coef_min is None else coef_min, zero=False)
        self.coef_max = _number("coef_max", self.coef * 1e2 if coef_max is None else coef_max, zero=False)
        if self.coef_min > self.coef:
            raise _refusal("coef_min", self.coef_min, f"give at most coef, which is {self.coef!r}")
        if self.coef_max < self.coef:
            raise _refusal("coef_max", self.coef_max, f"give at least coef, which is {self.coef!r}")

    @property
    def value(self) -> float:
        return self.beta


class AdaptiveController(_TargetController):
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
        self.horizon = _number("horizon", horizon, zero=False)

    def _observe(self, kl: float, n: float) -> None:
        factor = 1 + _clip(kl / self._target - 1, -0.2, 0.2) * n / self.horizon
        self.beta = _clip(self.beta * factor, self.coef_min, self.coef_max)


class PIDController(_TargetController):
    """A PID controller of log beta on the log of the smoothed KL, which fits its gains to how the KL answers.

    A finite reading does the following, in this order; any other only adds one to `skipped`.

    1. Smooth: m <- 0.8 m + 0.2 kl and s = m / (1 - 0.8^t), where t counts the finite readings, this one too.
    2. Error: e = clip(log(s / target), -0.3, 2), and e = -0.3 where s <= 0.
    3. Gain: where |e| > 0.2, g <- clip(0.7 g, gain_min, 1) if the last such error for this target had the other sign
       (a swing from one side of the target to the other), else g <- clip(1.01 g, gain_min, 1); from g = 1.
    4. Slope: d <- 0.8 d + 0.2 (log s - log s_before), from d = 0. The difference counts as 0 at the first
       reading, where either s is <= 0, and at the first reading after a change of the target.
    5. Wait: points 6 and 7 do nothing while t <= 30 and s was not above target / 2 at this or an earlier reading:
       as the KL starts at 0, beta must not sink before the KL has had time to rise.
    6. Patience: b <- b + 1 where e < 0, else b <- 0: the number of readings in a row below this target.
    7. Integral: I <- I + clip(g ki e / (1 + b / 30), min(lo - u, 0), max(hi - u, 0)), where u = g kp e + I + g kd d
       and lo, hi = log(coef_min / coef), log(coef_max / coef): a step that would carry the output past a bound
       ends at the bound. The slew limit of point 8 does not stop the integral.
    8. Output: beta <- clip(coef exp(clip(g kp e + I + g kd d, x - 0.2, x + 0.2)), coef_min, coef_max), where
       x = log(beta / coef) is the log ratio that the last update left.

    The logs make the loop respond alike at every scale of KL and beta. The gain stays 1 with a policy that answers beta
    slowly or weakly, and sinks with one that answers at once or whose readings are noisy. A KL that stays low for
    long is ever less due to beta (the policy has yet to learn), so beta sinks as 1 / b and not exponentially.
    The error may be larger upwards, as a runaway KL does more harm than a low one. With kd > 0 a rising KL
    raises beta, however low the KL is.
    Defaults: kp 2, ki 0.1, kd 0, gain_min 0.15, coef_min coef / 100, coef_max 100 coef; gain_min 1 keeps g at 1.
    Raises ValueError as `adaptive` does, and unless kp, ki and kd are finite and >= 0 and 0 < gain_min <= 1.

    Sources: Astrom and Murray, "Feedback Systems", chapter 11 (anti-windup, derivative of the measurement);
    Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods". Gain, patience and the
    defaults come from simulated and real runs: docs/controllers.md.
    """

    kind = "pid"
    takes = ("target", "kp", "ki", "kd", "gain_min", "coef_min", "coef_max")
    memory = ("beta", "smooth_sum", "gain", "side", "below", "integral", "slope", "last_kl", "last_target", "risen")
    lowest_error: ClassVar[float] = -0.3
    patience: ClassVar[float] = 30.0

    def __init__(
        self,
        coef: float,
        *,
        kp: float = 2.0,
        ki: float = 0.1,
        kd: float = 0.0,
        gain_min: float = 0.15,
        **target_and_bounds: Any,
    ) -> None:
        super().__init__(coef, **target_and_bounds)
        self.kp, self.ki, self.kd = _number("kp", kp), _number("ki", ki), _number("kd", kd)
        self.gain_min = _number("gain_min", gain_min, zero=False)
        if self.gain_min > 1:
            raise _refusal("gain_min", gain_min, "give at most 1, which keeps the gains as they are")
        self.smooth_sum = 0.0  # m of the docstring
        self.gain = 1.0  # g
        self.side = 0  # of the target, where the last error beyond 0.2 was: 1, -1, or 0 before the first
        self.below = 0  # b
        self.integral = 0.0  # I
        self.slope = 0.0  # d
        self.last_kl = 0.0  # s of the reading before; 0 before the first
        self.last_target = self._target
        self.risen = False  # whether s has been above target / 2

    def _observe(self, kl: float, n: float) -> None:
        self.smooth_sum = 0.8 * self.smooth_sum + 0.2 * kl
        smooth = self.smooth_sum / (1 - 0.8**self.readings)
        error = math.log(smooth) - math.log(self._target) if smooth > 0 else self.lowest_error
        error = _clip(error, self.lowest_error, 2.0)
        self.risen = self.risen or smooth > self._target / 2
        same_target = self._target == self.last_target
        if not same_target:
            self.side = self.below = 0
        self._adapt_gain(error)

        # The slope of the KL, not of the error, so that a new target gives no kick by itself.
        comparable = smooth > 0 and self.last_kl > 0 and same_target
        rise = math.log(smooth) - math.log(self.last_kl) if comparable else 0.0
        self.slope = 0.8 * self.slope + 0.2 * rise
        self.last_kl, self.last_target = smooth, self._target

        output = self.gain * (self.kp * error + self.kd * self.slope) + self.integral
        if self.risen or self.readings > 30:
            self.below = self.below + 1 if error < 0 else 0
            low, high = math.log(self.coef_min / self.coef), math.log(self.coef_max / self.coef)
            step = self.gain * self.ki * error / (1 + self.below / self.patience)
            step = _clip(step, min(low - output, 0.0), max(high - output, 0.0))
            self.integral += step
            output += step
        last = math.log(self.beta / self.coef)
        beta = self.coef * math.exp(_clip(output, last - 0.2, last + 0.2))
        self.beta = _clip(beta, self.coef_min, self.coef_max)

    def _adapt_gain(self, error: float) -> None:
        """Lower the gain where the KL swings about the target, and raise it where an error stays."""
        if abs(error) > 0.2:
            side = 1 if error > 0 else -1
            self.gain = _clip(self.gain * (0.7 if side == -self.side else 1.01), self.gain_min, 1.0)
            self.side = side


KINDS: dict[str, type[Controller]] = {
    cls.kind: cls for cls in (FixedController, AdaptiveController, PIDController, LinearController, CosineController)
}


def _refusal(name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"{name}={value!r} is refused: {remedy}.")


def _number(name: str, value: Any, *, zero: bool = True, remedy: str = "") -> float:
    """Return `value` as a float; refuse all but finite real numbers > 0, and 0 where `zero` allows it."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < 0 or (value == 0 and not zero):
        raise _refusal(name, value, remedy or f"give a finite number {'>= 0' if zero else '> 0'}")
    return float(value)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
