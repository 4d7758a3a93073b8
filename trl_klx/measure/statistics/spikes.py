"""Which tokens stand out: a robust rule, stated once, with the rate at which it errs on noise."""

import math
from statistics import NormalDist

import numpy as np

SPIKE_Z = 3.5  # Iglewicz and Hoaglin's bound for outliers
SPIKE_FLOOR = 0.01  # nats: a smaller KL is never a spike, however quiet the rest
_UPPER_QUARTILE = NormalDist().inv_cdf(0.75)
# Of tokens that differ by noise alone: where sqrt(KL) is Gaussian (noise in many logits of like tokens), where it is
# half of a Gaussian (noise in one direction), and at most in the softmaxes of the tests, flat and certain mixed.
FALSE_POSITIVES = (2.3e-4, 1.7e-3, 3e-3)
RULE = (
    f"sqrt(KL) more than {SPIKE_Z} robust standard deviations above the median of the checkpoint's tokens, and KL at "
    f"least {SPIKE_FLOOR} nats; by noise alone 0.02 % to {100 * FALSE_POSITIVES[-1]:.1g} % of the tokens would be"
)


def spike_threshold(kl: np.ndarray) -> float:
    """The KL in nats from which on a token is a spike among these; inf where none is above 0.

        sqrt(KL) > m + 3.5 s,  m = median of sqrt(KL),  s = (upper quartile - m) / 0.6745

    The square root, because a KL grows with the square of what moved the logits: noise in these is noise in sqrt(KL).
    (On a real model's log KL the rule never fires: most tokens are certain, and their tiny KLs span decades.)
    The spread is taken above the median only: most tokens are nearly certain under both models, and how much nearer to
    0 than the median they are tells nothing about what is large.

    Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993), for 3.5; square root and one-sided spread
    are ours.
    """
    if not (kl > 0).any():
        return math.inf
    middle, upper = np.quantile(np.sqrt(kl[np.isfinite(kl)].astype(np.float64)), [0.5, 0.75])
    return max(SPIKE_FLOOR, float(middle + SPIKE_Z * (upper - middle) / _UPPER_QUARTILE) ** 2)
