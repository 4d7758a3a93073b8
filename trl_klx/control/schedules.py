"""Beta by the number of updates, whatever the KL is."""

from __future__ import annotations

import math
from numbers import Integral

from .base import Controller, number, refusal


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
        self.coef_end = number("coef_end", coef_end, zero=False)
        if not isinstance(total, Integral) or isinstance(total, bool) or total < 1:
            raise refusal("total", total, "give the number of updates to anneal over, an int >= 1")
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
