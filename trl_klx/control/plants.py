"""Simulated plants for controllers of beta: what a policy's KL does when beta moves.

A plant is a policy whose distance to the reference, the root of its KL, follows beta with a delay and a lag. Law and
steady state, per update t:

    sqrt(KL)[t+1] = sqrt(KL)[t] + (1 - exp(-1 / lag)) (sqrt(KL_steady) - sqrt(KL)[t]),   sqrt(KL)[0] = 0
    KL_steady = pull free (1 + beta[t - delay] / beta_free)^-gain

The KL starts at 0 and rises as it does in training, at first as the square of the steps taken. `free` is the KL without
a penalty; far above `beta_free`, log KL falls by `gain` per log beta (2 for a small change of the policy, which is
proportional to 1 / beta, and the KL to its square), far below it beta has no effect. With half of the plants (`paced`)
the lag is proportional to sqrt(KL_steady), so that the KL rises at a pace that beta does not change, as in training
whose learning rate sets the pace; with the others it is constant.

Readings are those of k1 or k3, mean over N independent tokens whose log-ratio is Gaussian with this KL,
l ~ N(KL, 2 KL): a k1 reading may be negative, one of k3 is positive with a heavy tail.

Each plant is controlled twice. In the first course it meets, one after the other, for 500 updates each:
  start     from KL 0 and a beta wrong by a factor of 0.1 to 10, at pull 1
  target    a target that doubles or halves
  pull      a pull that doubles or halves, as the target did before
The second course is like a policy that learns, for 600 updates:
  learning  from KL 0 and that beta, with a pull that grows from 1/4 to 4 at a constant rate

A phase is *settled* from the first update on after which the true KL stays within 25 % of the target
for `window` updates; a phase that never settles counts as its length. *Overshoot* is the largest KL over the target,
minus 1, from the first crossing of the target on; a plant that does not cross has none. *Within 25 %* is the mean share
of the updates of a phase, *error* the mean |KL/target - 1| of its last 100 updates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .controllers import Controller

COURSES = {"steps": ("start", "target", "pull"), "learning": ("learning",)}
PHASES = [phase for phases in COURSES.values() for phase in phases]
LENGTH = {"steps": 500, "learning": 600}  # updates of a phase
GAIN, DELAY, LAG, TOKENS = (0.5, 2.0), (0, 5), (3.0, 100.0), (128, 256, 512, 1024)
BAND = 0.25
LAST = 100  # updates whose error counts as that of the steady state
WINDOW = 100  # updates within the band that count as settled
EPISODES = 64  # sequences per update, which only `adaptive` looks at
Array = NDArray[np.float64]
Figures = dict[str, dict[str, float | None]]  # by phase
MakeController = Callable[[float, float], Controller]  # of a starting beta and a target


@dataclass
class Plants:
    """Many plants; every array has one number per plant. KLs are in nats per token."""

    target: Array
    beta: Array  # that a controller starts from
    beta_star: Array  # whose steady state, at pull 1, is the target
    free: Array  # steady KL without a penalty, at pull 1
    gain: Array
    delay: NDArray[np.int64]
    lag: Array  # where the steady state is the first target
    paced: NDArray[np.bool_]
    samples: NDArray[np.int64]
    k3: NDArray[np.bool_]
    factor: Array  # of the phases "target" and "pull"

    def at(self, course: str, update: int) -> tuple[Array, Array]:
        """Target and pull."""
        if course == "learning":
            return self.target, np.full_like(self.target, 4.0 ** (2 * update / LENGTH[course] - 1))
        phase = update // LENGTH[course]
        pull = self.factor if phase >= 2 else np.ones_like(self.factor)
        return self.target * (self.factor if phase >= 1 else 1.0), pull

    def steady(self, beta: Array, pull: Array) -> Array:
        """KL at which a constant beta ends."""
        at_star = (self.free / self.target) ** (1 / self.gain)  # 1 + beta_star / beta_free
        return pull * self.free * (1 + beta / self.beta_star * (at_star - 1)) ** -self.gain

    def step(self, distance: Array, beta: Array, pull: Array) -> Array:
        """sqrt(KL) one update later, under the beta that has got through the delay."""
        end = np.sqrt(self.steady(beta, pull))
        lag = self.lag * np.where(self.paced, end / np.sqrt(self.target), 1.0)
        return distance - np.expm1(-1 / lag) * (end - distance)

    def read(self, kl: Array, rng: np.random.Generator) -> Array:
        """k1 or k3 of the true KL, mean over the plant's number of tokens."""
        readings = kl + np.sqrt(2 * kl / self.samples) * rng.standard_normal(len(kl))
        for count in np.unique(self.samples):
            mine = self.k3 & (self.samples == count)
            ratio = kl[mine, None] + np.sqrt(2 * kl[mine, None]) * rng.standard_normal((mine.sum(), count))
            readings[mine] = (np.expm1(-ratio) + ratio).mean(axis=1)
        return readings


def make_plants(
    count: int = 300,
    *,
    seed: int = 0,
    gain: tuple[float, float] = GAIN,
    delay: tuple[int, int] = DELAY,
    lag: tuple[float, float] = LAG,
    tokens: Sequence[int] = TOKENS,
) -> Plants:
    """Random plants.

    Args:
        count: how many.
        seed: of the draws.
        gain: lowest and highest, of log KL per log beta; uniform between them.
        delay: lowest and highest, in updates; uniform.
        lag: lowest and highest, in updates; uniform in its logarithm.
        tokens: numbers of tokens behind a reading, one of which each plant has.
    """
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> Array:
        return np.exp(rng.uniform(math.log(low), math.log(high), count))

    beta_star, target = between(0.01, 1.0), between(0.02, 0.2)
    return Plants(
        target=target,
        beta_star=beta_star,
        beta=beta_star * between(0.1, 10.0),
        free=target * between(3.0, 100.0),
        gain=rng.uniform(*gain, count),
        delay=rng.integers(delay[0], delay[1] + 1, count),
        lag=between(*lag),
        paced=rng.random(count) < 0.5,
        samples=rng.choice(tokens, count),
        k3=rng.random(count) < 0.5,
        factor=rng.choice([0.5, 2.0], count),
    )


def run_courses(plants: Plants, make: MakeController, *, seed: int, episodes: float = EPISODES) -> dict[str, Array]:
    """The true KL over its target, (updates, plants), in each course.

    Args:
        plants: see `make_plants`.
        make: makes the controller of one plant. Its bounds and ends should be relative to beta.
        seed: of the noise, which is the same for every controller.
        episodes: sequences per update, which only `adaptive` looks at.
    """
    out = {}
    for course in COURSES:
        controllers = [make(beta, target) for beta, target in zip(plants.beta, plants.target, strict=True)]
        out[course] = simulate(plants, controllers, course, seed, episodes)
    return out


def simulate(
    plants: Plants, controllers: Sequence[Controller], course: str, seed: int, episodes: float = EPISODES
) -> Array:
    """The true KL over its target, (updates, plants), with one controller for each plant."""
    rng = np.random.default_rng(seed)  # the same noise for every kind of controller
    distance = np.zeros_like(plants.beta)
    past = np.tile(plants.beta, (int(plants.delay.max()) + 1, 1))  # row i is beta of i updates ago
    everyone = np.arange(len(controllers))
    relative = np.empty((len(COURSES[course]) * LENGTH[course], len(controllers)))
    for update in range(len(relative)):
        target, pull = plants.at(course, update)
        distance = plants.step(distance, past[plants.delay, everyone], pull)
        readings = plants.read(distance**2, rng)
        past = np.roll(past, 1, axis=0)
        for place, controller in enumerate(controllers):
            if update % LENGTH[course] == 0 and controller.target is not None:
                controller.target = target[place]
            past[0, place] = controller.update(readings[place], n=episodes)
        relative[update] = distance**2 / target
    return relative


def phase_figures(courses: Mapping[str, Array], window: int = WINDOW) -> Figures:
    """Medians, 90 % quantiles and shares by phase, of what `run_courses` gives; `window` as in the module's text."""
    parts = [part for course, phases in COURSES.items() for part in np.split(courses[course], len(phases))]
    return {phase: _over_plants(by_plant(part, window)) for phase, part in zip(PHASES, parts, strict=True)}


def by_plant(relative: Array, window: int) -> dict[str, Array]:
    """What one phase was like, one number per plant: `relative` is (updates, plants), the true KL over its target."""
    inside = np.abs(relative - 1) <= BAND
    counts = np.concatenate([np.zeros((1, inside.shape[1])), inside.cumsum(axis=0)])
    held = counts[window:] - counts[:-window] == window  # from this update on, for the whole window
    settling = np.where(held.any(axis=0), held.argmax(axis=0), len(relative))
    above = relative >= 1
    crossed = above != above[0]
    after = crossed.cumsum(axis=0) > 0
    overshoot = np.where(after, relative, -np.inf).max(axis=0) - 1
    return {
        "settling": settling.astype(float),
        "never": ~held.any(axis=0) * 1.0,
        "overshoot": np.where(crossed.any(axis=0), overshoot, np.nan),
        "within": inside.mean(axis=0),
        "error": np.abs(relative[-LAST:] - 1).mean(axis=0),
    }


def _over_plants(found: Mapping[str, Array]) -> dict[str, float | None]:
    numbers = {"never settled": found["never"].mean(), "within": found["within"].mean()}
    for name in ("settling", "overshoot", "error"):
        known = found[name][~np.isnan(found[name])]
        for label, share in (("median", 0.5), ("90 %", 0.9)):
            numbers[f"{name}, {label}"] = np.quantile(known, share) if len(known) else math.nan
    return {name: None if math.isnan(value) else float(value) for name, value in numbers.items()}
