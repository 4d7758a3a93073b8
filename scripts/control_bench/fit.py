"""Fits plants to traces of real runs: under the betas of the run, does the plant's KL become the run's?

python scripts/control_bench/fit.py

For each trace and each kind of plant, simulated (`trl_klx/control/plants.py`) and learning (`learners.py` there), it
prints the root mean square of log(KL of the plant / KL of the run) over means of five steps from 2 % of the target on,
and what the plant that was fitted to one run says of each other run of the task. `--rows` prints `FITTED` of
`learners.py`. The search is random, from wide ranges to ever smaller changes of the best plants.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from control_bench.traces import Key, Trace, read_traces
from trl_klx.control.learners import Array, Learners, follow
from trl_klx.control.plants import DELAY, GAIN, LAG, Plants

WARMUP = {"sums": 3, "sums-k1": 3, "sums-ppo": 3, "stories": 5, "grpo": 10, "ppo": 10}  # of the recipes, in steps
SPREADS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
FROM = 0.02  # of the target: a smaller KL is noise
Candidates = Any  # Learners or Plants, a number per candidate in every array


def betas_of(trace: Trace) -> Array:
    """Of each step. A value of several steps is their mean, and so that of the middle one."""
    every, known = trace["every"], np.log(trace["coef"])
    steps = np.arange(len(known) * every)
    return np.exp(np.interp(steps, steps[::every] + (every - 1) / 2, known))


def size_of(trace: Trace) -> float:
    """The KL that the run was about: its target, or of a fixed beta the median."""
    return float(np.median(trace["kl"])) if trace["controller"] == "fixed" else trace["level"]


def noise_of(trace: Trace) -> float:
    """Standard error of one step's reading over the KL, the median of the run's second half."""
    half = len(trace["kl"]) // 2
    return float(np.median(np.array(trace["kl_se"][half:]) / trace["kl"][half:]) * np.sqrt(trace["every"]))


def misfit(kls: Array, trace: Trace) -> Array:
    """Root mean square of the log ratio, one number per candidate; `kls` is (steps, candidates)."""
    of_trace = 5 // trace["every"]
    count = len(trace["kl"]) // of_trace
    seen = np.array(trace["kl"][: count * of_trace]).reshape(count, of_trace).mean(axis=1)
    made = kls[: count * 5].reshape(count, 5, -1).mean(axis=1)
    size = size_of(trace)
    kept = seen > FROM * size
    ratios = np.log(np.maximum(made[kept], 1e-3 * size) / seen[kept, None])
    return np.sqrt(np.mean(ratios**2, axis=0))


# --- the two kinds ---------------------------------------------------------------------------------------------------


def some_learners(count: int, trace: Trace, rng: np.random.Generator) -> Learners:
    between, size = _between(rng, count), size_of(trace)
    same = np.ones(count)
    return Learners(
        log_odds=rng.uniform(-6, 3, count),
        scale=size * between(0.2, 20),
        pull=between(0.02, 20),
        clarity=between(0.1, 10),
        pace=between(0.01, 2),
        momentum=rng.choice([0.0, 0.9], count),
        growth=rng.uniform(-1, 3, count),
        warmup=WARMUP[trace["task"]] * same,
        noise=noise_of(trace) * same,
        beta=trace["start"] * same,
        target=size * same,
    )


def some_plants(count: int, trace: Trace, rng: np.random.Generator) -> Plants:
    """Within the ranges of `make_plants`, at a constant pull."""
    between, size = _between(rng, count), size_of(trace)
    return Plants(
        target=np.full(count, size),
        beta_star=between(1e-3, 10),
        beta=np.full(count, trace["start"]),
        free=size * between(3, 100),
        gain=rng.uniform(*GAIN, count),
        delay=rng.integers(DELAY[0], DELAY[1] + 1, count),
        lag=between(*LAG),
        paced=rng.random(count) < 0.5,
        samples=np.ones(count, dtype=np.int64),
        k3=np.zeros(count, dtype=np.bool_),
        factor=np.ones(count),
    )


def follow_plants(plants: Plants, betas: Array) -> Array:
    past = np.concatenate([np.full(DELAY[1], betas[0]), betas])
    distance = np.zeros_like(plants.beta)
    kls = np.empty((len(betas), len(distance)))
    for update in range(len(betas)):
        kls[update] = distance**2
        distance = plants.step(distance, past[update + DELAY[1] - plants.delay], np.ones_like(distance))
    return kls


KINDS: dict[str, tuple[Callable[..., Candidates], Callable[[Candidates, Array], Array]]] = {
    "simulated": (some_plants, follow_plants),
    "learning": (some_learners, follow),
}
LIMITS = {"gain": GAIN, "lag": LAG}  # that a change may not leave
SHIFTED = ("log_odds", "growth")  # by an amount; the others by a factor
KEPT = ("target", "beta", "momentum", "warmup", "noise", "delay", "paced", "samples", "k3", "factor")


# --- the search ------------------------------------------------------------------------------------------------------


def fit(kind: str, trace: Trace, seed: int = 0, *, count: int = 3000, tops: int = 3) -> Candidates:
    """The best plant that was found, as one candidate."""
    make, trajectory = KINDS[kind]
    rng, betas = np.random.default_rng(seed), betas_of(trace)
    first = make(count, trace, rng)
    found = []
    for place in np.argsort(misfit(trajectory(first, betas), trace))[:tops]:
        best = _one(first, place)
        for spread in SPREADS:
            near = _near(best, count // 10, spread, size_of(trace), rng)
            best = _one(near, int(np.argmin(misfit(trajectory(near, betas), trace))))
        found.append((misfit(trajectory(best, betas), trace)[0], best))
    return min(found, key=lambda pair: pair[0])[1]


def _near(best: Candidates, count: int, spread: float, target: float, rng: np.random.Generator) -> Candidates:
    """The candidate and others near it."""
    columns = {}
    for field in fields(best):
        column = np.repeat(getattr(best, field.name), count)
        if field.name not in KEPT:
            change = spread * rng.standard_normal(count) * (np.arange(count) > 0)
            column = column + change if field.name in SHIFTED else column * np.exp(change)
            low, high = LIMITS.get(field.name, (-np.inf, np.inf))
            column = np.clip(column, low, high)
            if isinstance(best, Plants) and field.name == "free":
                column = np.clip(column, 3 * target, 100 * target)
        columns[field.name] = column
    return replace(best, **columns)


def _one(candidates: Candidates, place: int) -> Candidates:
    return replace(candidates, **{f.name: getattr(candidates, f.name)[place : place + 1] for f in fields(candidates)})


def _between(rng: np.random.Generator, count: int) -> Callable[[float, float], Array]:
    return lambda low, high: np.exp(rng.uniform(np.log(low), np.log(high), count))


def main(arguments: list[str] | None = None) -> dict[tuple[str, Key], Candidates]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parent / "traces")
    parser.add_argument("--tasks", nargs="+", default=list(WARMUP))
    parser.add_argument("--count", type=int, default=3000, help="plants that a search begins with")
    parser.add_argument("--rows", action="store_true", help="print the rows of learners.py")
    args = parser.parse_args(arguments)
    traces = {key: trace for key, trace in read_traces(args.traces).items() if key.task in args.tasks}
    best = {}
    for kind, (_, trajectory) in KINDS.items():
        for key, trace in traces.items():
            best[kind, key] = found = fit(kind, trace, count=args.count)
            others = [other for other in traces if other.task == key.task]
            told = {o: misfit(trajectory(found, betas_of(traces[o])), traces[o])[0] for o in others}
            rest = ", ".join(f"{o.controller} {o.level:g}: {told[o]:.2f}" for o in others if o != key)
            print(f"{kind}, {key.task}, {key.controller} {key.level:g}: {told[key]:.2f}; says of {rest or 'no other'}")
            if args.rows and kind == "learning":
                print("   ", tuple(float(f"{getattr(found, field.name)[0]:.3g}") for field in fields(found)))
    return best


if __name__ == "__main__":
    main()
