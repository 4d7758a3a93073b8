"""Counts how often the over-optimisation monitor is wrong, on simulated runs whose truth is known.

python scripts/simulate_overoptimisation.py --runs 2000

Prints the false-alarm rate of the turn detector on gold rewards that are flat, rise or level off; how soon it finds a
gold reward that turns; and how often the 95 % intervals of the fitted law hold the truth.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trl_klx.monitor.overoptimisation.law import fit_law, law_gain, law_peak
from trl_klx.monitor.overoptimisation.turn import find_turn

# A law that is over its peak before the middle of a run, and back at its start in the end. The gain at the peak is 0.36
# standard deviations of a prompt's answers.
ALPHA, BETA, START = 0.2, 0.08, 0.5
FARTHEST = 12.0  # the largest d; the peak is at 4.5

Noise = Callable[[np.random.Generator, NDArray, int], NDArray]


def gaussian(rng: np.random.Generator, mean: NDArray, prompts: int) -> NDArray:
    """(E, P) rewards: mean, difficulty of the prompt (as large as the noise), and noise of one standard deviation."""
    return mean[:, None] + rng.normal(size=prompts) + rng.normal(size=(len(mean), prompts))


def binary(rng: np.random.Generator, mean: NDArray, prompts: int) -> NDArray:
    """(E, P) rewards of 0 and 1, about one in five of them 1, with prompts of different difficulty."""
    chance = rng.beta(0.5, 2.0, size=prompts) + 0.2 * (mean - mean[0])[:, None]
    return (rng.random((len(mean), prompts)) < chance).astype(float)


def skewed(rng: np.random.Generator, mean: NDArray, prompts: int) -> NDArray:
    """(E, P) rewards of which most are small and a few very large: squared exponentials."""
    return mean[:, None] + rng.exponential(size=(len(mean), prompts)) ** 2


NOISES: dict[str, Noise] = {"gaussian": gaussian, "binary": binary, "skewed": skewed}


def curve(shape: str, evaluations: int) -> NDArray:
    """(E,) true gold rewards of a run's evaluations."""
    d = np.linspace(0.0, FARTHEST, evaluations)
    peak = float(law_peak(ALPHA, BETA))
    if shape == "flat":
        return np.full(evaluations, START)
    if shape == "rising":
        return START + 0.1 * d
    gain = law_gain(np.minimum(d, peak) if shape == "levels off" else d, ALPHA, BETA)
    return START + gain


def first_alarm(gold: NDArray) -> int | None:
    """The evaluation at which a run's detector first finds a turn; None where it never does."""
    return next((e for e in range(2, len(gold) + 1) if find_turn(gold[:e], len(gold)) is not None), None)


def alarms(shape: str, noise: str, evaluations: int, prompts: int, runs: int, seed: int = 0) -> list[int | None]:
    """The first alarm of each of many simulated runs."""
    rng, mean = np.random.default_rng(seed), curve(shape, evaluations)
    return [first_alarm(NOISES[noise](rng, mean, prompts)) for _ in range(runs)]


def false_alarm_rate(shape: str, noise: str, evaluations: int, prompts: int, runs: int) -> float:
    """Share of runs with an alarm; the truth never falls."""
    return float(np.mean([alarm is not None for alarm in alarms(shape, noise, evaluations, prompts, runs)]))


def detection(prompts: int, evaluations: int, runs: int) -> tuple[float, float]:
    """Share of runs over the peak in which the turn is found, and the share of the peak's gain left when it is."""
    gain = curve("turns", evaluations) - START
    found = [e for e in alarms("turns", "gaussian", evaluations, prompts, runs) if e is not None]
    left = [gain[e - 1] / gain.max() for e in found]
    return len(found) / runs, float(np.mean(left)) if left else float("nan")


def coverage(prompts: int, evaluations: int, runs: int, kl_error: float, seed: int = 0) -> dict[str, float]:
    """How often the 95 % intervals hold the truth; `kl_error` is the relative standard error of the measured KL."""
    rng, mean = np.random.default_rng(seed), curve("turns", evaluations)
    kl = np.linspace(0.0, FARTHEST, evaluations) ** 2
    held: dict[str, list[float]] = {"alpha": [], "beta": [], "peak": [], "band": []}
    for run in range(runs):
        measured = kl * (1 + kl_error * rng.normal(size=evaluations))
        fit = fit_law(measured, gaussian(rng, mean, prompts), kl_error * kl, seed=run)
        assert fit is not None
        truths = {"alpha": ALPHA, "beta": BETA, "peak": float(law_peak(ALPHA, BETA)) ** 2}
        intervals = (fit.alpha_interval, fit.beta_interval, fit.peak_kl_interval)
        for (name, truth), (low, high) in zip(truths.items(), intervals, strict=True):
            held[name].append(low <= truth <= high)
        low, high = fit.band(np.sqrt(kl))
        held["band"].append(float(np.mean((low <= mean) & (mean <= high))))
    return {name: float(np.mean(values)) for name, values in held.items()}


def main(argv: list[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs per figure (default: %(default)s)")
    runs = parser.parse_args(argv).runs
    print(f"False alarms, share of {runs} runs (stated: at most 0.05)")
    print("| gold reward | noise | evaluations | 16 prompts | 64 prompts | 256 prompts |\n|---|---|---|---|---|---|")
    for shape, noise, evaluations in [
        *(("flat", noise, e) for noise in NOISES for e in (5, 13, 40)),
        ("levels off", "gaussian", 13),
        ("rising", "gaussian", 13),
    ]:
        rates = [f"{false_alarm_rate(shape, noise, evaluations, p, runs):.3f}" for p in (16, 64, 256)]
        print(f"| {shape} | {noise} | {evaluations} | {' | '.join(rates)} |")
    print("\nA gold reward that turns: found in a run, and the share of the peak's gain that is left when it is")
    print("| prompts | 7 evaluations | 13 evaluations | 40 evaluations |\n|---|---|---|---|")
    for prompts in (64, 256, 1024):
        cells = [detection(prompts, evaluations, runs) for evaluations in (7, 13, 40)]
        print(f"| {prompts} | {' | '.join(f'{found:.2f}, {left:.2f}' for found, left in cells)} |")
    print("\nCoverage of the 95 % intervals")
    print("| prompts | evaluations | KL error | alpha | beta | peak's KL | band |\n|---|---|---|---|---|---|---|")
    for prompts, evaluations, kl_error in ((64, 13, 0.0), (256, 6, 0.0), (256, 13, 0.0), (256, 13, 0.05)):
        held = coverage(prompts, evaluations, runs, kl_error)
        numbers = " | ".join(f"{value:.3f}" for value in held.values())
        print(f"| {prompts} | {evaluations} | {100 * kl_error:g} % | {numbers} |")


if __name__ == "__main__":
    main()
