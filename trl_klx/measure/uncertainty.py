"""Means with standard errors that count groups (prompts), not responses or tokens, as independent."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A mean, its standard error, and what each group added to it."""

    mean: float
    se: float
    influence: np.ndarray  # (C,) (S_c - mean * x_c) / sum x, 0 for a group without any
    present: np.ndarray  # (C,) bool: the groups that have any


def ratio(totals: np.ndarray, sizes: np.ndarray, groups: np.ndarray, count: int) -> Estimate:
    r"""The ratio r = sum_c S_c / sum_c x_c over groups c, and its linearised standard error,

        se(r)^2 = C / (C - 1) * sum_c ((S_c - r x_c) / sum_c x_c)^2

    as `trl_klx.monitor.moments` has it for training; here the groups' own parts are kept, for differences need them.

    Args:
        totals: (B,) S of each response, a sum over its tokens.
        sizes: (B,) x of each response: its tokens for a mean per token, 1 for a mean per response.
        groups: (B,) integers below `count`, equal for responses that are not independent.
        count: how many groups there are.

    Returns:
        NaN where there is nothing; a standard error needs 2 groups.

    Source: Cochran, "Sampling Techniques" (1977), chapters 6 and 9.
    """
    sums, weights = (np.bincount(groups, weights=values, minlength=count) for values in (totals, sizes))
    whole = weights.sum()
    if whole == 0:
        return Estimate(math.nan, math.nan, np.zeros(count), weights > 0)
    mean = sums.sum() / whole
    with np.errstate(invalid="ignore"):  # an infinite KL has a mean and no error
        influence = (sums - mean * weights) / whole
    return Estimate(float(mean), _error(influence, weights > 0), influence, weights > 0)


def difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """first - second and its standard error. Groups that are in both are not counted as independent."""
    influence = first.influence - second.influence
    return first.mean - second.mean, _error(influence, first.present | second.present)


def _error(influence: np.ndarray, present: np.ndarray) -> float:
    groups = int(present.sum())
    return math.sqrt(groups / (groups - 1) * float(np.square(influence).sum())) if groups > 1 else math.nan
