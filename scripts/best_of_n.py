"""What choosing the best of n answers would do, from answers of the reference alone: before any training.

The law is fitted to the result by `trl_klx.monitor.overoptimisation.law.fit_law(kl, gold, law="best_of_n")`; see
judge_stories.py. Shape legend: E sizes, P prompts, N answers per prompt.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln


def best_of_n(proxy: ArrayLike, gold: ArrayLike, sizes: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    r"""What choosing the best of n answers by the proxy would do to proxy and gold reward, from N sampled answers.

    The mean over all subsets of n of the N answers, so unbiased: with the answers to a prompt in ascending order of
    their proxy reward, the k-th is the best of a subset with probability C(k - 1, n - 1) / C(N, n). Equal proxy rewards
    share theirs.

    Args:
        proxy, gold: (P, N) rewards of the reference's answers.
        sizes: (E,) values of n, from 1 to N.

    Returns:
        (E,) KL(best of n || reference) = log n - (n - 1) / n in nats per sequence (Stiennon et al., 2020; an upper
        bound where answers repeat), (E, P) expected proxy reward and (E, P) expected gold reward.

    Raises:
        ValueError: the shapes do not fit, a reward is not finite, or a size is out of range.
    """
    by_proxy, by_gold, n = np.asarray(proxy, float), np.asarray(gold, float), np.asarray(sizes, int)
    if by_proxy.shape != by_gold.shape or by_proxy.ndim != 2 or not np.isfinite([by_proxy, by_gold]).all():
        raise ValueError(f"proxy {by_proxy.shape} and gold {by_gold.shape} must be finite and of one shape (P, N).")
    answers = by_proxy.shape[1]
    if n.ndim != 1 or not ((n >= 1) & (n <= answers)).all():
        raise ValueError(f"sizes={n.tolist()} must lie between 1 and the {answers} answers per prompt.")
    # Each answer takes the mean rank probability of its ties, between the ranks of the first and last of them.
    below = (by_proxy[:, None] < by_proxy[:, :, None]).sum(-1)
    ties = (by_proxy[:, None] == by_proxy[:, :, None]).sum(-1)
    reached = _best_at_most(np.arange(answers + 1), n, answers)
    weights = (reached[:, below + ties] - reached[:, below]) / ties
    return np.log(n) - (n - 1) / n, (weights * by_proxy).sum(-1), (weights * by_gold).sum(-1)


def _best_at_most(rank: NDArray, sizes: NDArray, answers: int) -> NDArray:
    """(E, ranks) probability that the best of n lies among the lowest `rank` answers: C(rank, n) / C(N, n)."""
    n, k = sizes[:, None], rank[None]
    with np.errstate(invalid="ignore"):
        log = gammaln(k + 1) - gammaln(np.maximum(k - n, 0) + 1) - gammaln(answers + 1) + gammaln(answers - n + 1)
    return np.where(k >= n, np.exp(log), 0.0)
