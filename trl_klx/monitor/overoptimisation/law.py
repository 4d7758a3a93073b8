r"""The laws of over-optimisation: gold reward against d = sqrt(KL(policy || reference)), fitted with confidence bands.

With the KL in nats per sequence, and R the gold reward counted from the start's,

    rl          R(d) = d (alpha - beta log d)     peak at d = exp(alpha / beta - 1), where R = beta d
    best_of_n   R(d) = d (alpha - beta d)         peak at d = alpha / (2 beta),      where R = alpha d / 2

Source: Gao, Schulman, Hilton, "Scaling Laws for Reward Model Overoptimization" (2023). With beta <= 0 a curve
never turns. Shape legend: E evaluations, P prompts, D draws.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import xlogy

LAWS = ("rl", "best_of_n")
LEVEL = 0.95  # of every interval and band
# The safe budget is half the peak's KL. There the rl law has 0.95 of the gain at the peak, the best_of_n law 0.91.
BUDGET_SHARE = 0.5
MAX_PEAK_RATIO = 4.0  # upper over lower end of the peak's interval, in KL, beyond which there is no budget
_PARAMETERS = 3  # start, alpha, beta


def law_gain(d: ArrayLike, alpha: ArrayLike, beta: ArrayLike, law: str = "rl") -> NDArray:
    """Gold reward counted from the start's, at d = sqrt(KL in nats per sequence); broadcasts.

    Raises:
        ValueError: the law does not exist.
    """
    slope, curve = _columns(np.asarray(d, float), law)
    return slope * np.asarray(alpha) + curve * np.asarray(beta)


def law_peak(alpha: ArrayLike, beta: ArrayLike, law: str = "rl") -> NDArray:
    """The d at which the gold reward is largest: infinite where it never turns, 0 where it only falls; broadcasts."""
    _check_law(law)
    slope, curve = np.asarray(alpha, float), np.asarray(beta, float)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        peak = np.exp(slope / curve - 1) if law == "rl" else np.maximum(slope / (2 * curve), 0.0)
    return np.where(curve > 0, peak, np.inf)


@dataclass(frozen=True)
class LawFit:
    """A fitted law, with what it would be on other prompts and answers.

    Attributes:
        law: rl or best_of_n.
        start: gold reward at d = 0.
        alpha, beta: of the law.
        misfit: standard deviation of the evaluations about the law beyond their own errors, in gold reward.
        draws: (D, 3) start, alpha and beta on simulated data.
    """

    law: str
    start: float
    alpha: float
    beta: float
    misfit: float
    draws: NDArray

    def gold(self, d: ArrayLike) -> NDArray:
        """Fitted gold reward at d."""
        return self.start + law_gain(d, self.alpha, self.beta, self.law)

    def band(self, d: ArrayLike) -> tuple[NDArray, NDArray]:
        """Lower and upper end of the 95 % band of the gold reward at each of (E,) d."""
        start, alpha, beta = self.draws.T[:, :, None]
        return _interval(start + law_gain(np.asarray(d, float)[None], alpha, beta, self.law))

    @property
    def alpha_interval(self) -> tuple[float, float]:
        """95 % interval of alpha."""
        return _pair(_interval(self.draws[:, 1]))

    @property
    def beta_interval(self) -> tuple[float, float]:
        """95 % interval of beta."""
        return _pair(_interval(self.draws[:, 2]))

    @property
    def peak_kl(self) -> float:
        """KL at the peak, nats per sequence; infinite where the law never turns."""
        return float(_peak_kl(self.alpha, self.beta, self.law))

    @property
    def peak_kl_interval(self) -> tuple[float, float]:
        """95 % interval of the KL at the peak; its ends may be infinite."""
        return _pair(_interval(_peak_kl(self.draws[:, 1], self.draws[:, 2], self.law)))

    @property
    def safe_budget(self) -> float | None:
        """Half the KL at the peak, nats per sequence. None while the data do not determine where the peak is.

        They do when the interval of beta lies above zero and the peak's upper end is at most four times its lower.
        """
        low, high = self.peak_kl_interval
        if self.beta_interval[0] <= 0 or not high <= MAX_PEAK_RATIO * low:
            return None
        return BUDGET_SHARE * self.peak_kl


def fit_law(
    kl: ArrayLike,
    gold: ArrayLike,
    kl_se: ArrayLike | None = None,
    *,
    law: str = "rl",
    draws: int = 1000,
    seed: int = 0,
) -> LawFit | None:
    r"""Fit a law by weighted least squares; None with fewer than four evaluations, or without different KLs.

        gold_e = start + alpha d_e + beta f(d_e) + misfit_e + noise_e        f(d) = -d log d, or -d^2

    The noise of the means is estimated over the prompts: rows of one prompt go together, so that what makes a prompt
    hard at every evaluation does not count against the curve. The variance of the misfit is chosen such that the
    weighted squares of the residuals sum up to their degrees of freedom (Paule and Mandel, 1982), or 0. The band comes
    from a parametric bootstrap: simulated gold rewards (noise and misfit) at simulated KLs, fitted in the same way.

    Args:
        kl: (E,) KL in nats per sequence; below 0, an estimate's noise, counts as 0.
        gold: (E, P) gold reward by prompt, the mean over its answers; NaN where there is none.
        kl_se: (E,) standard errors of the KL. None: it is known.
        law: rl, for training; best_of_n.
        draws: simulated data sets.
        seed: of the simulation.

    Raises:
        ValueError: the law does not exist, or the shapes do not fit.
    """
    _check_law(law)
    kls, by_prompt = np.maximum(np.asarray(kl, float), 0.0), np.asarray(gold, float)
    if kls.ndim != 1 or by_prompt.ndim != 2 or len(kls) != len(by_prompt):
        raise ValueError(f"kl of shape {kls.shape} and gold of shape {by_prompt.shape} must be (E,) and (E, P).")
    mean, covariance = mean_and_covariance(by_prompt)
    design = _design(np.sqrt(kls), law)
    if len(kls) <= _PARAMETERS or np.linalg.matrix_rank(design) < _PARAMETERS or not np.isfinite(mean).all():
        return None
    misfit, weights = _misfit(design, mean, _noise(covariance, mean))
    fitted = _least_squares(design, mean, weights)
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(draws, len(kls))) @ _root(covariance + misfit * np.eye(len(kls)))
    errors = np.zeros_like(kls) if kl_se is None else np.nan_to_num(np.asarray(kl_se, float))
    simulated_d = np.sqrt(np.maximum(kls + errors * rng.normal(size=(draws, len(kls))), 0.0))
    simulated = _least_squares(_design(simulated_d, law), design @ fitted + noise, weights)
    start, alpha, beta = fitted.tolist()
    return LawFit(law, start, alpha, beta, math.sqrt(misfit), simulated)


def mean_and_covariance(gold: NDArray) -> tuple[NDArray, NDArray]:
    """(E,) means over prompts of an (E, P) gold reward, and their (E, E) covariance; NaN entries do not count."""
    counted = np.isfinite(gold)
    counts = counted.sum(1)
    with np.errstate(invalid="ignore"):
        mean = np.where(counted, gold, 0.0).sum(1) / counts
    centred = np.where(counted, gold - mean[:, None], 0.0) / np.maximum(counts, 1)[:, None]
    prompts = gold.shape[1]
    return mean, centred @ centred.T * (prompts / max(prompts - 1, 1))


def _check_law(law: str) -> None:
    if law not in LAWS:
        raise ValueError(f"law={law!r} does not exist: choose one of {', '.join(LAWS)}.")


def _peak_kl(alpha: ArrayLike, beta: ArrayLike, law: str) -> NDArray:
    with np.errstate(over="ignore"):  # where the law hardly turns
        return np.square(law_peak(alpha, beta, law))


def _columns(d: NDArray, law: str) -> tuple[NDArray, NDArray]:
    """What alpha and beta are multiplied by."""
    _check_law(law)
    return d, -xlogy(d, d) if law == "rl" else -np.square(d)


def _design(d: NDArray, law: str) -> NDArray:
    return np.stack([np.ones_like(d), *_columns(d, law)], axis=-1)


def _noise(covariance: NDArray, mean: NDArray) -> NDArray:
    """(E,) variances about the curve, without what all evaluations share, which only moves the start."""
    shared = covariance.mean(0)
    own = np.diag(covariance) - 2 * shared + covariance.mean()
    return np.maximum(own, 0.0) + 1e-12 * max(float(np.ptp(mean)) ** 2, 1e-12)  # never 0: weights are its inverse


def _misfit(design: NDArray, mean: NDArray, noise: NDArray) -> tuple[float, NDArray]:
    """The variance of the misfit, and the weights that come of it."""
    freedom = len(mean) - _PARAMETERS

    def excess(variance: float) -> float:
        weights = 1 / (noise + variance)
        residual = mean - design @ _least_squares(design, mean, weights)
        return float((weights * residual**2).sum()) - freedom

    variance = 0.0
    if excess(0.0) > 0:
        residual = mean - design @ _least_squares(design, mean, np.ones_like(mean))
        variance = float(brentq(excess, 0.0, 1.01 * (residual**2).sum() / freedom))
    return variance, 1 / (noise + variance)


def _least_squares(design: NDArray, values: NDArray, weights: NDArray) -> NDArray:
    """(…, 3) parameters for (…, E, 3) designs and (…, E) values."""
    scale = np.abs(design).max(-2, keepdims=True)
    scaled = design / np.where(scale > 0, scale, 1.0)
    weighted = scaled * (weights / weights.max())[:, None]
    right = np.einsum("...ep,...e->...p", weighted, values)
    # By the pseudo-inverse: simulated KLs may coincide.
    normal = np.linalg.pinv(np.swapaxes(scaled, -1, -2) @ weighted, hermitian=True)
    return np.einsum("...pq,...q->...p", normal, right) / np.squeeze(np.where(scale > 0, scale, 1.0), -2)


def _root(covariance: NDArray) -> NDArray:
    """A symmetric root; the covariance of few prompts is singular."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _interval(draws: NDArray) -> tuple[NDArray, NDArray]:
    """The ends of the 95 % interval of each column; draws that are infinite are drawn, not averaged."""
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low, high = np.quantile(draws, tails, axis=0, method="inverted_cdf")
    return low, high


def _pair(interval: tuple[NDArray, NDArray]) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
