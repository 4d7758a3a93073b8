"""How a run held its target, from its trace.

A single step's KL has a standard error of 10 to 30 %, so that no controller could keep single steps within 25 %. The
figures are of means over five steps in a row; `single` is the share of single steps, and `possible` what that share
would be if the true KL were the target at every step, given the standard errors that were logged.
All begin at the first mean that is at least 75 % of the target.
"""

import itertools
import math
import statistics
from typing import NamedTuple

from .traces import Trace

BAND = 0.25
STEPS = 5  # behind a mean
LAST = 0.2  # share of a run's steps whose reward and KL count as those of its end


class Figures(NamedTuple):
    """KLs are relative to the target; None where the KL never came to 75 % of it."""

    crossed: int | None  # step
    within: float | None  # share of the means within the band
    single: float | None
    possible: float | None
    overshoot: float | None  # the largest mean
    undershoot: float | None  # the smallest
    stays: int | None  # steps from the crossing to the first mean from which on all are within the band; None: it left


def figures(trace: Trace) -> Figures:
    relative = [kl / trace["level"] for kl in trace["kl"]]
    count = max(1, STEPS // trace["every"])
    means = [statistics.fmean(relative[end - count : end]) for end in range(count, len(relative) + 1)]
    first = next((place for place, mean in enumerate(means) if mean >= 1 - BAND), None)
    if first is None:
        return Figures(*[None] * len(Figures._fields))
    after, single = means[first:], relative[first + count - 1 :]
    errors = [error / trace["level"] for error in trace["kl_se"][first + count - 1 :]]
    inside = [abs(mean - 1) <= BAND for mean in after]
    outside = [place for place, within in enumerate(inside) if not within]
    stays = outside[-1] + 1 if outside else 0
    return Figures(
        crossed=(first + count) * trace["every"],
        within=statistics.fmean(inside),
        single=statistics.fmean(abs(value - 1) <= BAND for value in single),
        possible=statistics.fmean(math.erf(BAND / error / math.sqrt(2)) if error > 0 else 1.0 for error in errors),
        overshoot=max(after),
        undershoot=min(after),
        stays=stays * trace["every"] if stays < len(after) else None,
    )


def end_of(trace: Trace) -> tuple[float, float]:
    """KL and reward at the end of the run, means over its last steps."""
    count = max(1, round(LAST * len(trace["kl"])))
    return statistics.fmean(trace["kl"][-count:]), statistics.fmean(trace["reward"][-count:])


def over_frontier(trace: Trace, fixed: list[Trace]) -> float | None:
    """The reward at the end, less that of fixed betas at the same KL, which lies between those of two neighbours.

    The reward is taken to be straight in log KL there. None beyond the fixed betas' range.
    """
    kl, reward = end_of(trace)
    points = sorted(end_of(one) for one in fixed)
    for (low, reward_low), (high, reward_high) in itertools.pairwise(points):
        if low <= kl <= high:
            share = math.log(kl / low) / math.log(high / low) if high > low else 0.0
            return reward - (reward_low + share * (reward_high - reward_low))
    return None
