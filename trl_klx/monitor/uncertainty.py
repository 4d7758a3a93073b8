"""Means with standard errors that count groups (prompts), not responses or tokens, as independent.

Tokens of one answer share their prefix, and the answers to one prompt share the prompt: counting either as independent
makes error bars too small.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z95 = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A mean, its standard error, and what each group added to it."""

    mean: float
    se: float
    influence: NDArray  # (C,) (S_c - mean * x_c) / sum x, 0 for a group without any
    present: NDArray  # (C,) bool: the groups that have any


def ratio(totals: NDArray, sizes: NDArray) -> Estimate:
    r"""The ratio r = sum_c S_c / sum_c x_c over C groups, and its linearised standard error,

        se(r)^2 = C / (C - 1) * sum_c ((S_c - r x_c) / sum_c x_c)^2

    Args:
        totals: (C,) S of each group: the sum over all of its tokens.
        sizes: (C,) x of each group: its tokens for a mean per token, its responses for a mean per response. A group of
            size 0 does not count.

    Returns:
        NaN where there is nothing; a standard error needs 2 groups.

    Source: Cochran, "Sampling Techniques" (1977), chapters 6 and 9.
    """
    present, whole = sizes > 0, sizes.sum()
    if whole == 0:
        return Estimate(math.nan, math.nan, np.zeros(len(sizes)), present)
    mean = totals.sum() / whole
    with np.errstate(invalid="ignore"):  # an infinite KL has a mean and no error
        influence = (totals - mean * sizes) / whole
    return Estimate(float(mean), _error(influence, present), influence, present)


def difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """first - second and its standard error. Groups that are in both are not counted as independent."""
    influence = first.influence - second.influence
    return first.mean - second.mean, _error(influence, first.present | second.present)


def _error(influence: NDArray, present: NDArray) -> float:
    groups = int(present.sum())
    return math.sqrt(groups / (groups - 1) * float(np.square(influence).sum())) if groups > 1 else math.nan
