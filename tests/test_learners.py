"""Plants that learn, against their equations and the real runs that they were fitted to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.loading import load_part

from trl_klx.control import FixedController, make_controller
from trl_klx.control.learners import FITTED, Learners, fitted, follow, make_learners, simulate

TRACES = Path(__file__).parent.parent / "scripts" / "control_bench" / "traces"


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_reward_and_kl_balance_where_the_docstring_says() -> None:
    """By numerical differentiation of pull p - beta KL / scale, and by letting the plants run."""
    plants = make_learners(40, seed=2)
    x, beta, small = np.linspace(0.1, 3, 40), np.linspace(0.02, 2, 40), 1e-5

    def objective(at: np.ndarray) -> np.ndarray:
        return plants.pull * logistic(plants.log_odds + at) - beta * plants.kl(at) / plants.scale

    p = logistic(plants.log_odds + x)
    slope = (objective(x + small) - objective(x - small)) / (2 * small)
    assert slope == pytest.approx(p * (1 - p) * (plants.pull - beta * x), rel=1e-4, abs=1e-9)
    still = replace(plants, growth=0 * x, pull=x * beta, clarity=1 + 0 * x, log_odds=-x / 2)
    assert follow(still, np.tile(beta, (4000, 1)))[-1] == pytest.approx(plants.scale * _kl(-x / 2, x), rel=1e-3)


def _kl(log_odds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Summed over the two choices."""
    q = np.stack([logistic(log_odds), logistic(-log_odds)])
    p = np.stack([logistic(log_odds + x), logistic(-log_odds - x)])
    return (p * np.log(p / q)).sum(axis=0)


def test_beta_does_nothing_while_the_kl_is_zero_and_little_while_the_learning_rate_warms_up() -> None:
    plants = replace(make_learners(12), warmup=np.full(12, 10.0))
    low, high = (follow(plants, np.full(12, beta)) for beta in (1e-3, 10.0))
    assert (low[:2] == 0).all() and (low[2] == high[2]).all() and (low[2] > 0).all()
    assert (high[-1] < low[-1]).all()
    steady = replace(plants, warmup=np.full(12, 1.0), momentum=np.zeros(12), growth=np.zeros(12))
    q = logistic(steady.log_odds)
    signal = steady.clarity * np.sqrt(4 * q * (1 - q))
    assert follow(steady, np.full(3, 1e-3))[2] == pytest.approx(steady.kl(steady.pace * signal / np.hypot(1, signal)))


def test_a_policy_without_entropy_answers_late_and_then_at_once() -> None:
    """From p = 0.999 a large beta takes longer for the first tenth of the KL than for the next half."""
    one = {field: np.ones(1) for field in Learners.__dataclass_fields__}
    plants = Learners(
        **{**one, "momentum": np.zeros(1), "growth": np.zeros(1), "log_odds": np.zeros(1), "clarity": np.full(1, 0.1)}
    )
    x, mean, kls = np.array([7.0]), np.zeros(1), []
    for _ in range(2000):
        kls.append(plants.kl(x)[0])
        x, mean = plants.step(x, mean, np.array([2.0]), 100)
    falls = [next(place for place, kl in enumerate(kls) if kl < share * kls[0]) for share in (0.9, 0.4)]
    assert falls[0] > 2 * (falls[1] - falls[0]) > 0


def test_a_simulation_is_what_its_betas_give() -> None:
    plants = make_learners(6, seed=1)
    kinds = ("pid", "adaptive", "fixed")
    made = {}
    for kind in kinds:
        targets = [None if kind == "fixed" else target for target in plants.target]
        controllers = [make_controller(kind, b, target=t) for b, t in zip(plants.beta, targets, strict=True)]
        relative, betas = made[kind] = simulate(plants, controllers, 60, seed=3)
        assert relative * plants.target == pytest.approx(follow(plants, betas), rel=1e-12)
    seen: list[list[float]] = [[], []]

    class Listener(FixedController):
        def _observe(self, kl: float, n: float) -> None:
            seen[-1].append(kl)

    quiet = replace(plants, noise=0 * plants.noise)
    simulate(quiet, [Listener(beta) for beta in plants.beta], 30, seed=3)
    assert np.reshape(seen[-1], (30, 6)) == pytest.approx(made["fixed"][0][:30] * plants.target)


@pytest.mark.parametrize("name", list(FITTED))
def test_the_fitted_plants_follow_their_runs(name: str) -> None:
    """Under the betas of the run the KL is off by less than a third, as a root mean square, at 4 to 60 readings."""
    fit, traces = load_part("control_bench.fit"), load_part("control_bench.traces")
    (trace,) = [t for key, t in traces.read_traces(TRACES).items() if f"{key.task} {key.controller}" == name]
    plant = fitted(name)
    assert (plant.target[0], plant.beta[0]) == (trace["level"], trace["start"])
    assert fit.misfit(follow(plant, fit.betas_of(trace)), trace)[0] < 0.3
