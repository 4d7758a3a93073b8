"""Plants that learn: what the KL of a policy under training does when beta moves, fitted to real runs.

A policy takes a decision over and over; the right choice has probability q = s(c) under the reference and p = s(c + x)
under the policy, with s the logistic function and x = 0 at the start. Per update t, with a penalty beta on the KL:

    KL      = scale (p log(p / q) + (1 - p) log((1 - p) / (1 - q)))
    signal  = clarity sqrt(4 p (1 - p)) (1 - beta x / pull)
    mean    = momentum mean + (1 - momentum) signal / sqrt(1 + signal^2)
    x       = max(x + pace min(t / warmup, 1) mean, 0)
    pull    = pull_0 exp(growth min(t, 150) / 100)

1 - beta x / pull is the derivative of (pull p - beta KL / scale) by x, over pull p (1 - p): reward and KL balance at
x = pull / beta. The derivative is sampled, with a noise that falls as sqrt(p (1 - p)), and Adam divides by its size:
`clarity` is the ratio of the two at p = 1/2, `pace` the largest step and `momentum` Adam's. So the KL does not answer
beta while it is 0; it answers late where p is near 0 or 1 (low entropy), and then at once; it rises with the warm-up
of the learning rate; and the beta that holds it drifts as `pull` does. Readings are Gaussian about the KL.

`FITTED` holds fits to five runs of real models, whose KL each follows from the betas that its controller set:
docs/controllers.md says how well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .controllers import Controller

Array = NDArray[np.float64]
DRIFT_ENDS = 150  # update after which the pull stays


@dataclass
class Learners:
    """Many plants; every array has one number per plant. KLs are in nats per sequence."""

    log_odds: Array  # c
    scale: Array
    pull: Array
    clarity: Array
    pace: Array
    momentum: Array
    growth: Array
    warmup: Array  # updates
    noise: Array  # standard deviation of a reading over the KL
    beta: Array  # that a controller starts from
    target: Array

    def kl(self, x: Array) -> Array:
        p, q = _logistic(self.log_odds + x), _logistic(self.log_odds)
        return self.scale * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))

    def step(self, x: Array, mean: Array, beta: Array, update: int) -> tuple[Array, Array]:
        """x and mean after update number `update`, which counts from 0."""
        p = _logistic(self.log_odds + x)
        pull = self.pull * np.exp(self.growth * min(update, DRIFT_ENDS) / 100)
        signal = self.clarity * np.sqrt(4 * p * (1 - p)) * (1 - beta * x / pull)
        mean = self.momentum * mean + (1 - self.momentum) * signal / np.sqrt(1 + signal**2)
        return np.maximum(x + self.pace * np.minimum(update / self.warmup, 1.0) * mean, 0.0), mean


def follow(learners: Learners, betas: Array) -> Array:
    """The KL before each update, (updates, plants), under these betas, one per update or (updates, plants)."""
    x = mean = np.zeros_like(learners.beta)
    kls = np.empty((len(betas), len(x)))
    for update, beta in enumerate(betas):
        kls[update] = learners.kl(x)
        x, mean = learners.step(x, mean, beta, update)
    return kls


def simulate(learners: Learners, controllers: Sequence[Controller], updates: int, seed: int) -> tuple[Array, Array]:
    """The true KL over its target and beta, (updates, plants) each, with one controller for each plant."""
    rng = np.random.default_rng(seed)  # the same noise for every kind of controller
    x = mean = np.zeros_like(learners.beta)
    relative, betas = np.empty((updates, len(x))), np.empty((updates, len(x)))
    for update in range(updates):
        kl = learners.kl(x)
        relative[update] = kl / learners.target
        readings = kl * (1 + learners.noise * rng.standard_normal(len(x)))
        betas[update] = [controller.update(one) for controller, one in zip(controllers, readings, strict=True)]
        x, mean = learners.step(x, mean, betas[update], update)
    return relative, betas


_COLUMNS = [field.name for field in fields(Learners)]
# task and controller of the run: in the order of the columns
FITTED: dict[str, tuple[float, ...]] = {
    "stories pid of 0.1": (1.36, 182.0, 0.0767, 1.55, 0.127, 0.9, 1.04, 5.0, 0.0941, 0.1, 12.8),
    "stories velocity": (0.451, 35.1, 0.118, 0.632, 0.369, 0.9, 1.93, 5.0, 0.0884, 0.1, 12.8),
    "sums pid of 0.1": (-0.68, 1.33, 0.644, 0.572, 2.24, 0.9, 0.536, 3.0, 0.361, 0.05, 1.0),
    "sums-ppo pid of 0.1": (1.16, 6.27, 0.196, 0.557, 1.79, 0.9, 2.22, 3.0, 0.148, 0.05, 1.0),
}


def make_learners(count: int = 300, *, seed: int = 0, names: Sequence[str] = tuple(FITTED)) -> Learners:
    """Random plants near the fitted ones: each number but the target is off by a fifth or so, beta by a factor up to 3.

    Args:
        count: how many, in turn after each of the names.
        seed: of the draws.
        names: of `FITTED`.
    """
    rng = np.random.default_rng(seed)
    rows = np.array([FITTED[names[place % len(names)]] for place in range(count)])
    columns = dict(zip(_COLUMNS, rows.T, strict=True))
    for name in ("scale", "pull", "clarity", "pace", "growth"):
        columns[name] = columns[name] * np.exp(0.2 * rng.standard_normal(count))
    columns["log_odds"] = columns["log_odds"] + 0.2 * rng.standard_normal(count)
    columns["beta"] = columns["beta"] * 3 ** rng.uniform(-1, 1, count)
    return Learners(**columns)


def fitted(name: str) -> Learners:
    """The plant of one run."""
    return Learners(**{column: np.array([value]) for column, value in zip(_COLUMNS, FITTED[name], strict=True)})


def _logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
