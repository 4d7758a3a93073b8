"""Which tokens stand out: a robust rule, stated once, with the rate at which it errs on noise."""

import math
from statistics import NormalDist

import numpy as np

SPIKE_Z = 3.5  # Iglewicz and Hoaglin's bound for outliers
SPIKE_FLOOR = 0.01  # nats: less is no spike, however quiet the rest
_UPPER_QUARTILE = NormalDist().inv_cdf(0.75)
FALSE_POSITIVES = 1 - NormalDist().cdf(SPIKE_Z)  # 2.3e-4 of the tokens, where log KL is Gaussian
RULE = (
    f"log KL more than {SPIKE_Z} robust standard deviations above the median of the checkpoint's tokens, and KL at "
    f"least {SPIKE_FLOOR} nats; on log-normal noise this errs on {FALSE_POSITIVES:.1e} of the tokens"
)


def spike_threshold(kl: np.ndarray) -> float:
    """The KL in nats from which on a token is a spike among these; inf where nothing is above 0.

        log KL > m + 3.5 s,  m = median of log KL,  s = (upper quartile - m) / 0.6745

    Tokens of KL 0 are not counted. The spread is taken above the median only: most tokens are nearly certain under both
    models, and their tiny KLs make a long tail below that says nothing about what is large.

    Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993), for 3.5; the one-sided spread is ours.
    """
    positive = np.log(kl[np.isfinite(kl) & (kl > 0)].astype(np.float64))
    if not len(positive):
        return math.inf
    middle, upper = np.quantile(positive, [0.5, 0.75])
    return max(SPIKE_FLOOR, math.exp(middle + SPIKE_Z * (upper - middle) / _UPPER_QUARTILE))
