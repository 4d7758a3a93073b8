"""What controllers share: counting, saving and loading; of some, a target and bounds of beta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar


class Controller:
    """What all kinds share: counting, saving and loading; beta stays at coef.

    `readings` and `skipped` are the numbers of finite readings, and of nan and infinite ones, so far.
    """

    kind: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()  # arguments besides coef; each is an attribute of the same name
    memory: ClassVar[tuple[str, ...]] = ()  # attributes that updates change, besides the two counters
    _target: float | None = None

    def __init__(self, coef: float) -> None:
        self.coef = number("coef", coef, zero=self.kind == "fixed")
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
            raise refusal("target", target, f"kind {self.kind!r} has none, so use kind 'adaptive' or 'pid'")
        remedy = f"kind {self.kind!r} needs the KL to hold, a finite number > 0"
        new = number("target", target, zero=False, remedy=remedy)
        if new != self._target:
            self._target = new
            self._new_target()

    def _new_target(self) -> None:
        """Forget what belongs to the target before."""

    def update(self, kl: float, n: float = 1) -> float:
        """Take a KL reading, in the unit of the target, of `n` episodes (sequences); return the new beta.

        Only `adaptive` uses `n`. A nan or infinite reading is counted in `skipped` and otherwise ignored.
        Raises ValueError if `n` is negative or not finite.
        """
        n = number("n", n, remedy="give the number of episodes in the batch, >= 0")
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
            raise refusal("kind", state.get("kind"), remedy)
        wanted = {"kind", *self._names()}
        for trouble, names in (("missing", wanted - set(state)), ("extra", set(state) - wanted)):
            if names:
                raise refusal(f"{trouble} keys of the state", sorted(names), remedy)
        for name in self._names():
            value, mine = state[name], getattr(self, name)
            positive = name in ("beta", "target", "gain", "scale")
            if type(value) is not type(mine) or not math.isfinite(value) or (positive and value <= 0):
                raise refusal(name, value, remedy)
            if name in ("coef", *self.takes) and name != "target" and value != mine:
                raise refusal(name, value, f"the state must agree with the controller, which has {mine!r}")
        for name in self._names():
            setattr(self, name, state[name])

    def _names(self) -> tuple[str, ...]:
        return ("coef", *self.takes, "readings", "skipped", *self.memory)


class TargetController(Controller):
    """A controller with a target, and with beta held within [coef_min, coef_max]."""

    memory: ClassVar[tuple[str, ...]] = ("beta",)
    _target: float

    def __init__(
        self, coef: float, *, target: Any = None, coef_min: float | None = None, coef_max: float | None = None
    ) -> None:
        super().__init__(coef)
        self.beta = self.coef
        self.target = target
        self.coef_min = number("coef_min", self.coef * 1e-2 if coef_min is None else coef_min, zero=False)
        self.coef_max = number("coef_max", self.coef * 1e2 if coef_max is None else coef_max, zero=False)
        if self.coef_min > self.coef:
            raise refusal("coef_min", self.coef_min, f"give at most coef, which is {self.coef!r}")
        if self.coef_max < self.coef:
            raise refusal("coef_max", self.coef_max, f"give at least coef, which is {self.coef!r}")

    @property
    def value(self) -> float:
        return self.beta


def refusal(name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"{name}={value!r} is refused: {remedy}.")


def number(name: str, value: Any, *, zero: bool = True, remedy: str = "") -> float:
    """Return `value` as a float; refuse all but finite real numbers > 0, and 0 where `zero` allows it."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < 0 or (value == 0 and not zero):
        raise refusal(name, value, remedy or f"give a finite number {'>= 0' if zero else '> 0'}")
    return float(value)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
