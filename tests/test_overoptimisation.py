"""The laws of over-optimisation, their intervals, the turn, best-of-n: against known numbers and simulated truths."""

import itertools
import math
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from support.loading import load

from trl_klx.monitor.overoptimisation.law import fit_law, law_gain, law_peak, mean_and_covariance
from trl_klx.monitor.overoptimisation.turn import find_turn

best_of_n = load("scripts/best_of_n.py").best_of_n
simulate = load("scripts/simulate_overoptimisation.py")
KL = np.linspace(0.0, 8.0, 9) ** 2


def noiseless(alpha: float, beta: float, law: str = "rl", start: float = 0.3, prompts: int = 5) -> NDArray:
    """(E, P) gold rewards on the law exactly, with prompts of different difficulty."""
    difficulty = np.linspace(-1.0, 1.0, prompts)
    return start + law_gain(np.sqrt(KL), alpha, beta, law)[:, None] + difficulty


def test_anchors() -> None:
    """Numbers of Gao, Schulman and Hilton's laws at alpha 1, beta 0.2."""
    assert law_peak(1.0, 0.2, "best_of_n") == pytest.approx(2.5)
    assert law_gain(2.5, 1.0, 0.2, "best_of_n") == pytest.approx(1.25)
    assert law_peak(1.0, 0.2) == pytest.approx(54.59815, rel=1e-6)
    assert law_gain(54.59815, 1.0, 0.2) == pytest.approx(10.91963, rel=1e-6)
    assert law_gain(0.0, 1.0, 0.2) == 0.0
    kl, _, _ = best_of_n(np.zeros((1, 64)), np.zeros((1, 64)), [1, 4, 64])
    assert kl == pytest.approx([0.0, 0.636294, 3.174508], abs=1e-6)


@pytest.mark.parametrize("law", ["rl", "best_of_n"])
def test_the_peak_is_the_largest_gain(law: str) -> None:
    d = np.linspace(0.0, 40.0, 400_001)
    for alpha, beta in ((0.5, 0.2), (0.2, 0.1), (1.0, 0.5)):
        assert law_peak(alpha, beta, law) == pytest.approx(d[np.argmax(law_gain(d, alpha, beta, law))], abs=1e-3)
    assert law_peak(1.0, 0.0, law) == law_peak(1.0, -0.1, law) == math.inf


def test_a_reward_that_only_falls_peaks_at_the_start() -> None:
    assert law_peak(-1.0, 0.2, "best_of_n") == 0.0
    assert law_peak(-1.0, 0.2, "rl") == pytest.approx(0.0, abs=0.01)


def test_half_the_peaks_kl_keeps_most_of_its_gain() -> None:
    """As the safe budget's definition says: 0.95 of the gain under one law, 0.91 under the other."""
    for law, share in (("rl", 0.9522), ("best_of_n", 0.9142)):
        peak = law_peak(0.7, 0.2, law)
        gains = law_gain([peak * math.sqrt(0.5), peak], 0.7, 0.2, law)
        assert gains[0] / gains[1] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("law", ["rl", "best_of_n"])
def test_a_fit_without_noise_is_exact(law: str) -> None:
    fit = fit_law(KL, noiseless(0.5, 0.2, law), law=law)
    assert fit is not None
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((0.3, 0.5, 0.2), rel=1e-6)
    assert fit.misfit == pytest.approx(0.0, abs=1e-6)
    assert fit.peak_kl == pytest.approx(float(law_peak(0.5, 0.2, law)) ** 2, rel=1e-5)
    # All prompts change alike, so that only the start is uncertain; the budget is known at once.
    assert fit.beta_interval == pytest.approx((0.2, 0.2), rel=1e-4)
    assert fit.safe_budget == pytest.approx(fit.peak_kl / 2)
    assert fit.gold(2.0) == pytest.approx(0.3 + law_gain(2.0, 0.5, 0.2, law))


def test_difficult_prompts_do_not_widen_the_curve() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(KL), 100))
    gold = 0.5 + law_gain(np.sqrt(KL), 0.3, 0.12)[:, None] + 0.2 * noise
    plain, mixed = fit_law(KL, gold), fit_law(KL, gold + 10 * rng.normal(size=100))
    assert plain is not None
    assert mixed is not None
    assert mixed.alpha == pytest.approx(plain.alpha, abs=0.01)
    assert np.ptp(mixed.beta_interval) == pytest.approx(np.ptp(plain.beta_interval), rel=0.15)
    low, high = mixed.band([0.0])
    assert float(high[0] - low[0]) > 3.0  # the start's level is a mean over such different prompts


@pytest.mark.parametrize(("prompts", "kl_error"), [(128, 0.0), (2048, 0.1)])
def test_intervals_hold_the_truth(prompts: int, kl_error: float) -> None:
    """Also where the rewards are so precise that the error of the KL is what counts."""
    held = simulate.coverage(prompts, evaluations=13, runs=400, kl_error=kl_error)
    assert set(held) == {"alpha", "beta", "peak", "band"}
    assert all(0.92 <= share <= 0.98 for share in held.values()), held


def test_what_no_law_explains_widens_the_band() -> None:
    """Training wanders off any law; the intervals have to hold the law all the same."""
    rng = np.random.default_rng(0)
    d, held, misfits = np.sqrt(KL), [], []
    for run in range(200):
        wandering = 0.1 * rng.normal(size=(len(KL), 1))
        difficulty = 3 * rng.normal(size=400)  # which is no reason to believe the evaluations less
        gold = law_gain(d, 0.3, 0.12)[:, None] + difficulty + wandering + 0.1 * rng.normal(size=(len(KL), 400))
        fit = fit_law(KL, gold, seed=run)
        assert fit is not None
        held.append(fit.beta_interval[0] <= 0.12 <= fit.beta_interval[1])
        misfits.append(fit.misfit)
    assert np.mean(held) > 0.85  # six degrees of freedom know the misfit only roughly
    assert float(np.median(misfits)) == pytest.approx(0.1, rel=0.2)


def test_no_fit_and_no_budget_without_enough_data() -> None:
    gold = noiseless(0.5, 0.2)
    assert fit_law(KL[:3], gold[:3]) is None
    assert fit_law(np.zeros(6), gold[:6]) is None  # the policy has not moved
    rising = fit_law(KL, 0.3 + 0.1 * np.sqrt(KL)[:, None] + np.random.default_rng(0).normal(size=(9, 50)))
    assert rising is not None
    assert rising.safe_budget is None
    assert rising.peak_kl_interval[1] == math.inf
    with pytest.raises(ValueError, match="law='ppo' does not exist"):
        fit_law(KL, gold, law="ppo")
    with pytest.raises(ValueError, match=r"must be \(E,\) and \(E, P\)"):
        fit_law(KL, gold.T)


def test_a_budget_waits_for_a_narrow_peak() -> None:
    """Beta above zero is not enough: the ends of the peak's interval must lie within a factor of four."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(len(KL), 2000))
    seen = set()
    for size in (2.0, 5.0, 8.0):
        fit = fit_law(KL, noiseless(0.3, 0.12, prompts=2000) + size * noise)
        assert fit is not None
        low, high = fit.peak_kl_interval
        expected = fit.beta_interval[0] > 0 and high <= 4 * low
        assert (fit.safe_budget is not None) == expected
        seen.add((fit.beta_interval[0] > 0, expected))
    assert seen == {(True, True), (True, False), (False, False)}


def test_an_estimated_kl_below_zero_is_zero() -> None:
    kl = KL.copy()
    kl[0] = -0.01
    fit = fit_law(kl, noiseless(0.5, 0.2), np.full(len(kl), np.nan))
    assert fit is not None
    assert fit.alpha == pytest.approx(0.5)


def test_means_over_the_prompts_that_have_a_reward() -> None:
    gold = np.random.default_rng(0).normal(size=(4, 30))
    mean, covariance = mean_and_covariance(gold)
    assert mean == pytest.approx(gold.mean(1))
    assert covariance == pytest.approx(np.cov(gold) / 30)
    holed = gold.copy()
    holed[1, :10] = np.nan
    mean, covariance = mean_and_covariance(holed)
    assert mean[1] == pytest.approx(gold[1, 10:].mean())
    assert covariance[1, 1] == pytest.approx(gold[1, 10:].var(ddof=1) / 20, rel=0.05)


# The turn


@pytest.mark.parametrize("noise", ["gaussian", "binary", "skewed"])
@pytest.mark.parametrize("shape", ["flat", "rising", "levels off"])
def test_false_alarms_are_as_rare_as_stated(noise: str, shape: str) -> None:
    """At most 5 % of runs of 13 evaluations; the bound leaves room for the noise of 400 runs."""
    rate = simulate.false_alarm_rate(shape, noise, evaluations=13, prompts=64, runs=400)
    assert rate <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 400)


def test_false_alarms_of_flat_runs_are_not_far_rarer_than_stated() -> None:
    """A detector that never fires would pass the test above."""
    assert simulate.false_alarm_rate("flat", "gaussian", evaluations=13, prompts=256, runs=1000) > 0.01


def test_a_turn_is_found() -> None:
    found, left = simulate.detection(prompts=1024, evaluations=13, runs=100)
    assert found > 0.97
    assert left > 0.5


def test_a_turn_is_measured_prompt_by_prompt() -> None:
    """A fall that the difference between prompts would hide."""
    rng = np.random.default_rng(0)
    difficulty = 10 * rng.normal(size=200)
    gold = np.array([0.0, 0.5, 0.3])[:, None] + difficulty + 0.1 * rng.normal(size=(3, 200))
    assert find_turn(gold[:2], 10) is None
    turn = find_turn(gold, 10)
    assert turn is not None
    assert turn.best == 1
    assert turn.fall == pytest.approx(0.2, abs=0.03)
    assert turn.fall_se == pytest.approx(0.1 * math.sqrt(2 / 200), rel=0.2)


def test_a_fall_is_counted_from_the_best() -> None:
    """Not from the first or the last of the evaluations that were better."""
    turn = find_turn(np.array([[0.6], [1.0], [0.9], [0.2]]) + np.random.default_rng(0).normal(size=30) / 100, 4)
    assert turn is not None
    assert turn.best == 1
    assert turn.fall == pytest.approx(0.8)


def test_more_evaluations_need_more_evidence() -> None:
    rng = np.random.default_rng(1)
    gold = np.array([0.4, 0.0])[:, None] + rng.normal(size=(2, 200))
    assert find_turn(gold, 2) is not None
    assert find_turn(gold, 1000) is None
    assert find_turn(gold, 2, false_alarm_rate=1e-6) is None


def test_few_prompts_that_agree_prove_little() -> None:
    """Eight prompts that all fall by the same amount have no variance, but one in 256 flat runs looks like that."""
    for prompts, found in ((8, False), (12, True)):
        gold = np.repeat([[1.0], [0.5]], prompts, axis=1)
        assert (find_turn(gold, 10) is not None) == found
    assert find_turn(np.ones((2, 50)), 10) is None
    assert find_turn(np.repeat([[1.0], [2.0]], 50, axis=1), 10) is None


def test_prompts_without_a_reward_do_not_count() -> None:
    gold = np.repeat([[1.0], [0.5]], 30, axis=1)
    gold[0, :25] = np.nan
    assert find_turn(gold, 10) is None
    assert find_turn(gold[:, 20:], 10) is None
    assert find_turn(gold[:, :1], 10) is None
    gold[0, 10:25] = 1.0
    assert find_turn(gold, 10) is not None


# Best of n


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 7)).round(), rng.normal(size=(3, 7))  # rounded, so that some are equal
    _, chosen_proxy, chosen_gold = best_of_n(proxy, gold, [1, 2, 4, 7])
    assert any(len(set(row)) < 7 for row in proxy.tolist())
    for index, size in enumerate((1, 2, 4, 7)):
        for prompt in range(3):
            subsets = [list(subset) for subset in itertools.combinations(range(7), size)]
            best = [max(proxy[prompt, subset]) for subset in subsets]
            assert chosen_proxy[index, prompt] == pytest.approx(np.mean(best))
            # Equal proxy rewards are chosen among at random.
            golds = [
                gold[prompt, [i for i in subset if proxy[prompt, i] == most]].mean()
                for subset, most in zip(subsets, best, strict=True)
            ]
            assert chosen_gold[index, prompt] == pytest.approx(np.mean(golds))


def test_best_of_n_can_be_fitted() -> None:
    """Independent proxy and gold: choosing by the one leaves the other alone, whatever n."""
    rng = np.random.default_rng(0)
    kl, _, gold = best_of_n(rng.normal(size=(500, 32)), rng.normal(size=(500, 32)), [1, 2, 4, 8, 16, 32])
    fit = fit_law(kl, gold, law="best_of_n")
    assert fit is not None
    assert fit.alpha_interval[0] < 0 < fit.alpha_interval[1]


@pytest.mark.parametrize(
    ("proxy", "gold", "sizes", "sentence"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), [1], "one shape"),
        (np.ones(3), np.ones(3), [1], "one shape"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), [1], "finite"),
        (np.ones((2, 3)), np.ones((2, 3)), [0], "between 1 and the 3"),
        (np.ones((2, 3)), np.ones((2, 3)), [4], "between 1 and the 3"),
    ],
)
def test_best_of_n_refuses(proxy: NDArray, gold: NDArray, sizes: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        best_of_n(proxy, gold, sizes)


def test_nothing_warns_on_hopeless_data() -> None:
    """Curves that hardly turn have peaks beyond what a float holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_law(KL, 0.1 * np.sqrt(KL)[:, None] + 1e-4 * np.random.default_rng(0).normal(size=(9, 50)))
        assert fit is not None
        assert fit.peak_kl_interval[1] == math.inf
        assert fit.safe_budget is None
