"""Readings of a run, and what all detectors of health alarms share. KL is in nats."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# One batch is noise, and a controller may overshoot once: what lasts for so many logged readings is neither.
SEVERAL = 3


class Reading(NamedTuple):
    """One logged number."""

    step: int
    value: float


class Finding(NamedTuple):
    """One alarm, in sentences without their full stops."""

    evidence: str
    cause: str
    remedy: str


Readings = Sequence[Reading]


def values_of(readings: Readings) -> list[float]:
    """The numbers without their steps."""
    return [reading.value for reading in readings]


def lasts(values: Sequence[float], is_bad: Callable[[float], bool]) -> bool:
    """Whether the last `SEVERAL` values are all bad."""
    return len(values) >= SEVERAL and all(map(is_bad, values[-SEVERAL:]))


def over(readings: Readings, count: int = SEVERAL) -> str:
    """The steps of the last `count` readings, in words."""
    recent = readings[-count:]
    return f"at the readings of steps {recent[0].step} to {recent[-1].step}"
