"""Tests of trl_klx.control: the laws, their limits, saving and loading, and the refusals."""

from __future__ import annotations

import ast
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import trl_klx.control
from trl_klx.control import KINDS, Controller, make_controller

NAN, INF = math.nan, math.inf

EXAMPLES: dict[str, dict[str, Any]] = {
    "fixed": {"coef": 0.05},
    "adaptive": {"coef": 0.05, "target": 0.1, "horizon": 500},
    "pid": {"coef": 0.05, "target": 0.1},
    "linear": {"coef": 0.05, "coef_end": 0.003, "total": 40},
    "cosine": {"coef": 0.05, "coef_end": 0.003, "total": 40},
}
HEEDING = ("adaptive", "pid")  # the kinds that look at the KL
SCHEDULES = ("linear", "cosine")


def example(kind: str, **changes: Any) -> Controller:
    return make_controller(kind, **{**EXAMPLES[kind], **changes})


def feed(controller: Controller, readings: Iterable[float], n: float = 1) -> list[float]:
    return [controller.update(kl, n) for kl in readings]


def noisy_readings(seed: int, count: int) -> list[float]:
    """KL readings over some decades, a few of them negative, nan or infinite."""
    rng = random.Random(seed)
    odd = [NAN, INF, -INF, -0.05, 0.0]
    return [rng.choice(odd) if rng.random() < 0.15 else rng.lognormvariate(-2.3, 1.5) for _ in range(count)]


# ---------------------------------------------------------------- the laws


def test_adaptive_anchor() -> None:
    controller = make_controller("adaptive", 0.2, target=6, horizon=1e4)
    assert controller.value == 0.2
    assert controller.update(12, n=64) == pytest.approx(0.200256, abs=1e-12)
    assert controller.update(3, n=64) == pytest.approx(0.19999967232, abs=1e-12)
    assert controller.update(6.6, n=64) == pytest.approx(0.20012767211, abs=5e-12)
    assert controller.value == controller.update(NAN, n=64)


def test_adaptive_default_horizon_is_1e4() -> None:
    assert make_controller("adaptive", 0.2, target=6).update(12, 64) == pytest.approx(0.200256, abs=1e-12)


def test_adaptive_keeps_beta_positive_for_any_batch() -> None:
    controller = make_controller("adaptive", 0.2, target=6, horizon=10)
    assert controller.update(0.0, n=1000) == pytest.approx(0.002)  # the factor is -19
    assert controller.update(60.0, n=1e300) == pytest.approx(20.0)


def pid_by_the_book(readings: list[float], targets: list[float], settings: dict[str, float]) -> list[float]:
    """The betas that the equations in the docstring give for finite readings from beta 0.05, written out anew."""
    kp, ki, gain_min = (settings[name] for name in ("kp", "ki", "gain_min"))
    low, high = settings["coef_min"], settings["coef_max"]
    smoothed: list[float] = []
    sides: list[bool] = []  # of the target, of errors beyond 0.25
    betas, mean, gain, scale, arrival, above, last = [0.05], math.log(0.05), 1.0, 1.0, None, 0, None
    for t, (reading, target) in enumerate(zip(readings, targets, strict=True), start=1):
        if t > 1 and target != targets[t - 2]:
            sides, above = [], 0
        before = smoothed[-1] if smoothed else 0.0
        window = 2 * scale if before != 0 else 1
        smoothed.append((before * (window - 1) + min(reading, 2 * max(before, target))) / window)
        if smoothed[-1] <= 0:
            betas.append(betas[-1])
            last = None
            continue
        error = min(max(math.log(smoothed[-1] / target), -1.0), 1.0)
        if arrival is None:
            gain = scale = min(max(t / 35, 1.0), 2.0)
            arrival = t if error >= -0.25 else None
        elif abs(error) > 0.25:
            sides.append(error > 0)
            if sides[-2:] in ([False, True], [True, False]):
                gain = max(0.7 * gain, gain_min)
            else:
                gain = max(min(1.01 * gain, 1.0), gain)
        above = above + 1 if error > 0 else 0
        mean = 69 / 70 * mean + math.log(betas[-1]) / 70
        pace = min((20 + above) / 20, 3) if error > 0 else math.exp(min(0.0, math.log(betas[-1]) - mean))
        move = kp * (error - (error if last is None else last)) + ki * pace * max(error, -0.5)
        betas.append(min(max(betas[-1] * math.exp(gain * move), low), high))
        last = error
    return betas[1:]


@pytest.mark.parametrize("seed", range(8))
def test_pid_equals_a_second_implementation(seed: int) -> None:
    rng = random.Random(seed)
    settings = {"kp": 2.0, "ki": 0.1, "gain_min": rng.choice([0.15, 0.5, 1.0]), "coef_min": 0.02, "coef_max": 0.3}
    readings = [0.0, 0.0] + [0.03 * math.exp(rng.gauss(0, 0.3)) for _ in range(45)]
    readings += [0.1 * math.exp(1.5 * math.sin(k / 9) + rng.gauss(0, 0.3)) for k in range(200)]
    readings[140:144] = [-0.5, -0.2, 0.0, 0.01]
    targets = [0.1] * 90 + [0.25] * 157
    controller = make_controller("pid", 0.05, target=0.1, **settings)
    betas = []
    for reading, target in zip(readings, targets, strict=True):
        controller.target = target
        betas.append(controller.update(reading))
    assert betas == pytest.approx(pid_by_the_book(readings, targets, settings), rel=1e-9)
    assert min(betas) == 0.02 and max(betas) == pytest.approx(0.3) and len(set(betas)) > 100
    state = controller.state_dict()
    assert 1 < state["scale"] < 2
    assert state["gain"] >= 1.0 if settings["gain_min"] == 1 else state["gain"] < 1


def test_pid_defaults() -> None:
    settings = {"kp": 1.75, "ki": 0.1, "gain_min": 0.2, "coef_min": 0.0005, "coef_max": 5.0}
    assert example("pid", ki=None).state_dict() == example("pid", **settings).state_dict()


def feed_levels(controller: Controller, levels: Iterable[float]) -> list[dict[str, Any]]:
    """The states after readings of which each makes the smoothed KL the level, in multiples of the target of 0.1."""
    out = []
    for level in levels:
        state = controller.state_dict()
        weight = 0.5 / state["scale"] if state["smooth"] else 1.0
        controller.update(state["smooth"] + (0.1 * level - state["smooth"]) / weight)
        out.append(controller.state_dict())
    return out


def gains(controller: Controller, levels: Iterable[float]) -> list[float]:
    return [state["gain"] for state in feed_levels(controller, levels)]


def test_pid_lowers_its_gain_at_each_swing_and_raises_it_where_an_error_stays() -> None:
    """A swing goes from beyond 0.25 in the log on one side of the target to beyond it on the other."""
    levels = [1.3, 1.1, 0.9, 1.3, 0.75, 0.75, 1.0, 0.7, 1.3, 1.15, 1.3]
    expected = [1, 1, 1, 1, 0.7, 0.7 * 1.01, 0.7 * 1.01, 0.7 * 1.01**2, 0.49 * 1.01**2, 0.49 * 1.01**2, 0.49 * 1.01**3]
    assert gains(make_controller("pid", 0.05, target=0.1), levels) == pytest.approx(expected)
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, 0.75] * 20)[-1] == 0.2
    assert gains(make_controller("pid", 0.05, target=0.1, gain_min=0.6), [1.3, 0.75] * 20)[-1] == 0.6
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, 0.75] + [0.75] * 200)[-1] == 1.0
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, -0.1])[-1] == 1.0  # no log, so nothing is known


@pytest.mark.parametrize(("rise", "gain"), [(10, 1.0), (35, 1.0), (49, 1.4), (70, 2.0), (300, 2.0)])
def test_pid_takes_its_gain_from_the_time_of_the_first_rise(rise: int, gain: float) -> None:
    """It stays at a later target too. Swings lower it, and a lasting error raises it to 1 again, but not above."""
    controller = make_controller("pid", 0.05, target=0.1)
    states = feed_levels(controller, [0.7] * (rise - 1) + [0.78])
    assert [state["arrived"] for state in states] == [False] * (rise - 1) + [True]
    assert states[-1]["gain"] == states[-1]["scale"] == pytest.approx(gain)
    controller.target = 0.4
    feed(controller, [0.08] * 100)
    assert controller.state_dict()["gain"] == pytest.approx(gain)
    feed(controller, ([0.8] * 12 + [0.2] * 12) * 20)
    assert controller.state_dict()["gain"] < 0.3
    feed(controller, [0.2] * 500)
    assert controller.state_dict()["gain"] == 1.0


def test_pid_smooths_over_more_readings_where_the_rise_was_slow() -> None:
    controller = make_controller("pid", 0.05, target=0.1)
    feed_levels(controller, [0.7] * 69 + [0.8])
    controller.update(0.12)
    assert controller.state_dict()["smooth"] == pytest.approx(0.08 + 0.04 / 4)


def test_pid_takes_no_change_of_target_for_a_swing() -> None:
    controller = make_controller("pid", 0.05, target=0.1)
    feed(controller, [0.15] * 5)
    controller.target = 0.5
    assert feed(controller, [0.15]) and controller.state_dict()["gain"] == 1.0
    feed(controller, [1.4] * 2)  # but this is one, at the second
    assert controller.state_dict()["gain"] == 0.7


def test_pid_gain_multiplies_both_parts() -> None:
    """From the same state, a gain of a half with doubled settings is the same controller."""
    whole = make_controller("pid", 0.05, target=0.1, kp=0.2, ki=0.02, gain_min=0.5)
    halved = make_controller("pid", 0.05, target=0.1, kp=0.4, ki=0.04, gain_min=0.5)
    for controller in (whole, halved):
        controller.load_state_dict({**controller.state_dict(), "arrived": True})
    halved.load_state_dict({**halved.state_dict(), "gain": 0.5})
    readings = [0.09, 0.1, 0.11, 0.1, 0.095]  # errors below 0.25 leave the gain alone
    assert feed(halved, readings) == pytest.approx(feed(whole, readings), rel=1e-12)


def test_pid_is_ki_times_the_error_expected_after_kp_over_ki_updates() -> None:
    """A KL that rises by 4 % an update, 17.5 updates ahead: beta turns where the KL will be at the target then."""
    levels = [0.4 * 1.04**k for k in range(24)]
    betas = [0.05, *(state["beta"] for state in feed_levels(make_controller("pid", 0.05, target=0.1), levels))]
    moves = [math.log(later / earlier) for earlier, later in pairwise(betas)]
    ahead = [math.log(level) + 17.5 * math.log(1.04) for level in levels]
    inside = [k for k, level in enumerate(levels) if k > 0 and math.exp(-0.5) < level < 1]
    assert len(inside) > 10
    for k in inside:  # beta is above its mean, so that nothing holds it back
        assert moves[k] == pytest.approx(0.1 * ahead[k], rel=1e-9)


def test_pid_does_nothing_while_there_is_no_kl_and_little_while_it_is_far_below() -> None:
    controller = make_controller("pid", 0.05, target=0.1)
    assert set(feed(controller, [0.0, 0.0, -0.1, 0.0])) == {0.05}
    rising = [1e-7 * 3**k for k in range(10)]  # to a fiftieth of the target
    betas = [0.05, *feed(make_controller("pid", 0.05, target=0.1), rising)]
    moves = [math.log(later / earlier) for earlier, later in pairwise(betas)]
    assert moves[0] == pytest.approx(-0.05)  # no more for the rise than for a KL that stays
    assert all(-0.05 < earlier < later < -0.03 for earlier, later in pairwise(moves[1:]))


def test_pid_takes_a_first_kl_far_above_the_target_for_no_rise() -> None:
    assert make_controller("pid", 0.05, target=0.1).update(0.2) == pytest.approx(0.05 * 2 ** (0.1 * 1.05))


INTEGRAL = {"kp": 0.0, "ki": 0.1, "gain_min": 1.0, "coef_min": 1e-12, "coef_max": 1e12}


def last_move(controller: Controller, kl: float) -> float:
    before = controller.value
    return math.log(controller.update(kl) / before)


def test_pid_sinks_freely_to_its_mean_and_slowly_below() -> None:
    """Far below the target for good, r settles where beta sinks with its mean: r = exp(-70 g ki 0.5 r), at g = 2."""
    controller = make_controller("pid", 0.05, target=0.1, **INTEGRAL)
    feed(controller, [0.01] * 400)
    pace = -last_move(controller, 0.01) / 0.1
    assert pace == pytest.approx(math.exp(-70 * 0.1 * pace), rel=0.03)
    assert 0.1 < pace < 0.3
    feed(controller, [1.0] * 40)  # up again, by far more than the mean follows
    feed(controller, [0.01] * 30)
    assert last_move(controller, 0.01) == pytest.approx(-0.05 * controller.state_dict()["gain"])


def test_pid_rises_the_faster_the_longer_the_kl_is_above_up_to_three_times() -> None:
    controller = make_controller("pid", 0.05, target=0.1, **INTEGRAL)
    moves = [last_move(controller, 0.2) / (0.1 * math.log(2)) for _ in range(60)]
    assert moves == pytest.approx([min(1 + k / 20, 3) for k in range(1, 61)])
    controller.target = 0.09
    assert last_move(controller, 0.2) == pytest.approx(0.1 * math.log(0.2 / 0.09) * 1.05)
    controller.target = 0.09  # no other one
    assert last_move(controller, 0.2) == pytest.approx(0.1 * math.log(0.2 / 0.09) * 1.1)


def test_an_outlier_of_any_size_counts_as_twice_the_smoothed_kl_or_the_target() -> None:
    betas = []
    for outlier in (0.2, 10.0, 1e7):
        controller = make_controller("pid", 0.05, target=0.1)
        before = feed(controller, [0.1] * 20)[-1]
        betas.append(feed(controller, [outlier] + [0.1] * 30))
        assert max(betas[-1]) / before < 3
        assert 1 < betas[-1][-1] / before < 1.3
    assert betas[0] == pytest.approx(betas[1], rel=1e-9)
    assert betas[1] == pytest.approx(betas[2], rel=1e-9)


@pytest.mark.parametrize("kind", HEEDING)
def test_kl_above_target_raises_beta_and_below_lowers_it(kind: str) -> None:
    for factor, sign in ((3.0, 1), (1 / 3, -1)):
        controller = example(kind)
        feed(controller, [0.1 * factor] * 5)
        assert math.copysign(1, controller.value - 0.05) == sign


@pytest.mark.parametrize("kind", HEEDING)
def test_new_target_takes_effect_at_the_next_update(kind: str) -> None:
    controller = example(kind)
    before = feed(controller, [0.1] * 10)[-1]
    controller.target = 0.02
    assert controller.target == 0.02
    assert controller.update(0.1) > before


def test_fixed_is_constant_and_may_be_zero() -> None:
    assert set(feed(make_controller("fixed", 0.05), [0.0, 5.0, NAN, -1.0])) == {0.05}
    assert make_controller("fixed", 0).update(3.0) == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.2, 0.155, 0.11, 0.065, 0.02]),
        ("cosine", [0.2, 0.11 + 0.09 * math.sqrt(0.5), 0.11, 0.11 - 0.09 * math.sqrt(0.5), 0.02]),
    ],
)
def test_schedules(kind: str, expected: list[float]) -> None:
    controller = make_controller(kind, 0.2, coef_end=0.02, total=4)
    assert controller.value == 0.2
    betas = feed(controller, [0.0, 1e9, NAN, -3.0, 0.0, 0.0])  # whatever the KL is
    assert [0.2, *betas] == pytest.approx([*expected, 0.02, 0.02], rel=1e-12)
    assert betas[3:] == [0.02] * 3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedule_may_rise(kind: str) -> None:
    betas = feed(make_controller(kind, 0.01, coef_end=1, total=20), [0.1] * 25)
    assert betas == sorted(betas)
    assert betas[-1] == 1.0


@pytest.mark.parametrize("kind", EXAMPLES)
def test_non_finite_readings_are_skipped_and_counted(kind: str) -> None:
    readings = [0.2, NAN, 0.4, INF, -INF, 0.03]
    controller = example(kind)
    betas = feed(controller, readings)
    assert (controller.readings, controller.skipped) == (3, 3)
    assert controller.state_dict()["skipped"] == 3
    if kind not in SCHEDULES:
        clean = example(kind)
        expected = feed(clean, [kl for kl in readings if math.isfinite(kl)])
        assert [betas[0], betas[2], betas[5]] == expected
        assert betas[1] == betas[0] and betas[3] == betas[4] == betas[2]


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("seed", range(5))
def test_pid_respects_bounds(seed: int) -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=3, ki=0.3, coef_min=0.03, coef_max=0.13)
    betas = [0.05]
    for level in (50.0, 1e-3, 50.0, 1e-3):
        betas += feed(controller, [level * abs(kl) for kl in noisy_readings(seed, 100)])
    assert min(betas) == 0.03 and max(betas) == 0.13  # reached, and not passed


@pytest.mark.parametrize("kind", HEEDING)
def test_default_bounds_are_two_decades_to_either_side(kind: str) -> None:
    settings = {"horizon": 1.0} if kind == "adaptive" else {"kp": 10, "ki": 1}
    assert feed(example(kind, **settings), [1e3] * 500)[-1] == 5.0
    assert feed(example(kind, **settings), [1e-6] * 500)[-1] == pytest.approx(0.0005, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_respects_bounds(seed: int) -> None:
    controller = make_controller("adaptive", 0.05, target=0.1, horizon=50, coef_min=0.03, coef_max=0.13)
    betas = []
    for level in (50.0, 1e-3, 50.0, 1e-3):
        betas += feed(controller, [level * kl for kl in noisy_readings(seed, 100)], n=16)
    assert min(betas) == 0.03 and max(betas) == 0.13


@pytest.mark.parametrize(("saturating", "back"), [(10.0, 0.01), (0.001, 0.5)])
def test_pid_leaves_a_bound_as_soon_after_a_long_time_there_as_after_a_short_one(
    saturating: float, back: float
) -> None:
    counts = []
    for long in (200, 5000):
        controller = make_controller("pid", 0.05, target=0.1, coef_min=0.03, coef_max=0.2)
        bound = feed(controller, [saturating] * long)[-1]
        assert bound in (0.03, 0.2)
        count = 1
        while controller.update(back) == bound:
            count += 1
        counts.append(count)
    assert counts[0] == counts[1] < 15


# ---------------------------------------------------------------- closed loop


def simulate(controller: Controller, steps: int, seed: int, start: float = 0.0) -> list[float]:
    """Return the true log(kl / 0.1) of a plant that beta drives: first order, lag of 5 updates, noise.

    The steady state is log(kl / 0.1) = 1.2 - 0.8 log(beta / 0.05), so that a fixed 0.05 misses 0.1 widely.
    """
    rng = random.Random(seed)
    state, states = start, []
    for _ in range(steps):
        steady = 1.2 - 0.8 * math.log(controller.value / 0.05)
        state += (steady - state) / 5 + rng.gauss(0, 0.01)
        controller.update(0.1 * math.exp(state + rng.gauss(0, 0.15)))
        states.append(state)
    return states


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [-5.0, 0.0, 2.0])
def test_pid_settles_within_a_quarter_of_the_target(seed: int, start: float) -> None:
    states = simulate(make_controller("pid", 0.05, target=0.1), 1000, seed, start)
    assert all(0.75 < math.exp(state) < 1.25 for state in states[250:])
    unsteered = simulate(make_controller("fixed", 0.05), 1000, seed, start)
    assert not any(0.75 < math.exp(state) < 1.25 for state in unsteered[250:])


def test_pid_follows_a_target_changed_on_the_way() -> None:
    controller = make_controller("pid", 0.05, target=0.1)
    simulate(controller, 300, seed=7)
    controller.target = 0.2
    states = simulate(controller, 700, seed=8)
    assert all(0.75 < math.exp(state) / 2 < 1.25 for state in states[350:])


def test_adaptive_settles_too() -> None:
    controller = make_controller("adaptive", 0.05, target=0.1, horizon=20)
    states = simulate(controller, 1500, seed=3)
    assert 0.75 < math.exp(sum(states[500:]) / 1000) < 1.25


# ---------------------------------------------------------------- saving and loading


RUNS = [(kind, None) for kind in EXAMPLES] + [(kind, change_at) for kind in HEEDING for change_at in (5, 45)]


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 7, 29, 30, 31, 60])
@pytest.mark.parametrize(("kind", "change_at"), RUNS)
def test_resumed_run_is_bit_identical(kind: str, change_at: int | None, cut: int) -> None:
    readings = [0.01 * kl for kl in noisy_readings(1, 20)] + noisy_readings(2, 60)

    def run(controller: Controller, first: int, last: int) -> list[float]:
        betas = []
        for k in range(first, last):
            if k == change_at:
                controller.target = 0.25
            betas.append(controller.update(readings[k], n=16))
        return betas

    whole, head, tail = example(kind), example(kind), example(kind)
    expected = run(whole, 0, 80)
    first = run(head, 0, cut)
    tail.load_state_dict(json.loads(json.dumps(head.state_dict(), allow_nan=False)))
    assert tail.value == head.value and tail.target == head.target
    assert first + run(tail, cut, 80) == expected
    assert tail.state_dict() == whole.state_dict()
    assert len(set(expected)) > 30 or kind == "fixed"


def test_state_carries_a_target_set_between_two_updates() -> None:
    head = make_controller("pid", 0.05, target=0.1)
    feed(head, [0.05, 0.1])
    head.target = 0.3
    tail = make_controller("pid", 0.05, target=0.1)
    tail.load_state_dict(head.state_dict())
    assert feed(tail, [0.5, 0.6]) == feed(head, [0.5, 0.6])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("pid", {"kind": "adaptive"}, ["kind='adaptive'", "kind 'pid'"]),
        ("fixed", {"kind": None}, ["kind=None", "kind 'fixed'"]),
        ("pid", {"error": None}, ["missing keys", "['error']", "unaltered"]),
        ("cosine", {"total": None}, ["missing keys", "['total']", "unaltered"]),
        ("linear", {"colour": 3}, ["extra keys", "['colour']", "unaltered"]),
        ("pid", {"error": NAN}, ["error=nan", "unaltered"]),
        ("pid", {"error": "0"}, ["error='0'", "unaltered"]),
        ("pid", {"above": 1.0}, ["above=1.0", "unaltered"]),
        ("adaptive", {"beta": INF}, ["beta=inf", "unaltered"]),
        ("adaptive", {"beta": -0.1}, ["beta=-0.1", "unaltered"]),
        ("adaptive", {"target": -1.0}, ["target=-1.0", "unaltered"]),
        ("fixed", {"skipped": 0.5}, ["skipped=0.5", "unaltered"]),
        ("pid", {"kp": 0.75}, ["kp=0.75", "agree", "1.75"]),
        ("pid", {"gain": 0.0}, ["gain=0.0", "unaltered"]),
        ("pid", {"scale": 0.0}, ["scale=0.0", "unaltered"]),
        # A state of the law of 0.1.
        ("pid", {"integral": -0.3, "beta": 0.07}, ["trl_klx 0.1", "another law", "its beta, 0.07"]),
        ("fixed", {"coef": 0.06}, ["coef=0.06", "agree", "0.05"]),
        ("linear", {"total": 41}, ["total=41", "agree", "40"]),
    ],
)
def test_bad_state_is_refused(kind: str, change: dict[str, Any], words: list[str]) -> None:
    donor, controller = example(kind), example(kind)
    feed(donor, [0.5, 0.2, NAN])
    state = {key: value for key, value in {**donor.state_dict(), **change}.items() if value is not None}
    before = controller.state_dict()
    check_refusal(lambda: controller.load_state_dict(state), words)
    assert controller.state_dict() == before


# ---------------------------------------------------------------- refusals


def check_refusal(call: Callable[[], object], words: list[str]) -> None:
    """Assert that `call` raises a ValueError of one sentence that holds all `words`."""
    with pytest.raises(ValueError, match="refused") as caught:
        call()
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and ". " not in sentence and sentence.endswith(".")


PID = {"target": 0.1}
ANNEAL = {"coef_end": 0.01, "total": 10}
BAD_INPUT: list[tuple[str, Any, dict[str, Any], list[str]]] = [
    ("pdi", 0.1, {}, ["kind='pdi'", "use 'pid'", "cosine"]),
    ("Adaptiv", 0.1, {}, ["kind='Adaptiv'", "use 'adaptive'"]),
    ("FIXED", 0.1, {}, ["kind='FIXED'", "use 'fixed'"]),
    ("fixed", -0.1, {}, ["coef=-0.1", ">= 0"]),
    ("fixed", NAN, {}, ["coef=nan", "finite"]),
    ("fixed", "0.1", {}, ["coef='0.1'", "number"]),
    ("fixed", True, {}, ["coef=True", "number"]),
    ("pid", 0, PID, ["coef=0", "> 0"]),
    ("adaptive", 0.0, PID, ["coef=0.0", "> 0"]),
    ("linear", 0.0, ANNEAL, ["coef=0.0", "> 0"]),
    ("cosine", INF, ANNEAL, ["coef=inf", "finite"]),
    ("pid", 0.1, {}, ["target=None", "'pid' needs", "> 0"]),
    ("adaptive", 0.1, {"target": 0}, ["target=0", "'adaptive' needs", "> 0"]),
    ("pid", 0.1, {"target": INF}, ["target=inf", "finite"]),
    ("pid", 0.1, {"target": -2}, ["target=-2", "> 0"]),
    ("fixed", 0.1, {"target": 0.5}, ["target=0.5", "drop it", "'adaptive'", "'pid'"]),
    ("linear", 0.1, {"target": 0.5, **ANNEAL}, ["target=0.5", "drop it", "'adaptive'", "'pid'"]),
    ("cosine", 0.1, {"target": 0.5, **ANNEAL}, ["target=0.5", "drop it", "'adaptive'", "'pid'"]),
    ("pid", 0.1, {"horizon": 100, **PID}, ["horizon=100", "drop it", "use kind 'adaptive'", "kp, ki, gain_min"]),
    ("adaptive", 0.1, {"kp": 0.5, **PID}, ["kp=0.5", "drop it", "use kind 'pid'"]),
    ("fixed", 0.1, {"coef_min": 0.01}, ["coef_min=0.01", "use kind 'adaptive' or 'pid'", "takes none"]),
    ("pid", 0.1, {"total": 5, **PID}, ["total=5", "use kind 'linear' or 'cosine'"]),
    ("pid", 0.1, {"kq": 1, **PID}, ["kq=1", "drop it", "kp, ki, gain_min"]),
    ("adaptive", 0.1, {"horizon": 0, **PID}, ["horizon=0", "> 0"]),
    ("adaptive", 0.1, {"horizon": INF, **PID}, ["horizon=inf", "finite"]),
    ("pid", 0.1, {"kp": -1, **PID}, ["kp=-1", ">= 0"]),
    ("pid", 0.1, {"ki": NAN, **PID}, ["ki=nan", "finite"]),
    ("pid", 0.1, {"gain_min": 0, **PID}, ["gain_min=0", "> 0"]),
    ("pid", 0.1, {"gain_min": 1.5, **PID}, ["gain_min=1.5", "at most 1"]),
    ("adaptive", 0.1, {"gain_min": 0.5, **PID}, ["gain_min=0.5", "use kind 'pid'"]),
    ("pid", 0.1, {"kd": 1, **PID}, ["kd=1", "drop it", "kp, ki, gain_min"]),
    ("pid", 0.1, {"kp": "1", **PID}, ["kp='1'", "number"]),
    ("pid", 0.1, {"coef_min": 0, **PID}, ["coef_min=0", "> 0"]),
    ("pid", 0.1, {"coef_min": 0.2, **PID}, ["coef_min=0.2", "at most coef", "0.1"]),
    ("adaptive", 0.1, {"coef_max": 0.05, **PID}, ["coef_max=0.05", "at least coef", "0.1"]),
    ("adaptive", 0.1, {"coef_max": INF, **PID}, ["coef_max=inf", "finite"]),
    ("linear", 0.1, {"total": 5}, ["coef_end=None", "> 0"]),
    ("linear", 0.1, {"total": 5, "coef_end": 0.0}, ["coef_end=0.0", "> 0"]),
    ("cosine", 0.1, {"coef_end": 0.01}, ["total=None", "int >= 1"]),
    ("cosine", 0.1, {"coef_end": 0.01, "total": 0}, ["total=0", "int >= 1"]),
    ("linear", 0.1, {"coef_end": 0.01, "total": 2.0}, ["total=2.0", "int >= 1"]),
    ("linear", 0.1, {"coef_end": 0.01, "total": True}, ["total=True", "int >= 1"]),
]


@pytest.mark.parametrize(("kind", "coef", "settings", "words"), BAD_INPUT)
def test_bad_input_is_refused(kind: str, coef: Any, settings: dict[str, Any], words: list[str]) -> None:
    check_refusal(lambda: make_controller(kind, coef, **settings), words)


@pytest.mark.parametrize("bad", [0, -1.0, NAN, INF, None, "0.1"])
@pytest.mark.parametrize("kind", HEEDING)
def test_bad_new_target_is_refused(kind: str, bad: Any) -> None:
    controller = example(kind)
    check_refusal(lambda: setattr(controller, "target", bad), [f"target={bad!r}", kind, "> 0"])
    assert controller.target == 0.1


@pytest.mark.parametrize("kind", ["fixed", *SCHEDULES])
def test_target_cannot_be_set_where_there_is_none(kind: str) -> None:
    controller = example(kind)
    check_refusal(lambda: setattr(controller, "target", 0.1), ["target=0.1", kind, "'adaptive' or 'pid'"])
    assert controller.target is None


@pytest.mark.parametrize("bad", [-1, NAN, INF, None])
def test_bad_batch_size_is_refused(bad: Any) -> None:
    check_refusal(lambda: example("adaptive").update(0.1, n=bad), [f"n={bad!r}", "episodes", ">= 0"])


def test_none_means_not_given() -> None:
    names = ["target", "horizon", "kp", "ki", "gain_min", "coef_min", "coef_max", "coef_end", "total"]
    all_none = dict.fromkeys(names)
    for kind, settings in EXAMPLES.items():
        assert make_controller(kind, **{**all_none, **settings}).state_dict() == example(kind).state_dict()


def test_module_needs_the_standard_library_only() -> None:
    folder = Path(trl_klx.control.__file__).parent
    trees = [
        ast.parse((folder / f"{cls.__module__.split('.')[-1]}.py").read_text()) for cls in (*KINDS.values(), Controller)
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert len(set(map(ast.dump, trees))) == 4
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
