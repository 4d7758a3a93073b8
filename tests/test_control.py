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
from trl_klx.control import Controller, make_controller

NAN, INF = math.nan, math.inf

EXAMPLES: dict[str, dict[str, Any]] = {
    "fixed": {"coef": 0.05},
    "adaptive": {"coef": 0.05, "target": 0.1, "horizon": 500},
    "pid": {"coef": 0.05, "target": 0.1, "kd": 0.3},
    "linear": {"coef": 0.05, "coef_end": 0.003, "total": 40},
    "cosine": {"coef": 0.05, "coef_end": 0.003, "total": 40},
}
HEEDING = ("adaptive", "pid")  # the kinds that look at the KL
PLAIN = {"kp": 0.5, "ki": 0.02, "gain_min": 1.0}  # weak and constant gains, for figures by hand
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
    kp, ki, kd, gain_min = (settings[name] for name in ("kp", "ki", "kd", "gain_min"))
    low, high = math.log(settings["coef_min"] / 0.05), math.log(settings["coef_max"] / 0.05)
    smooth: list[float] = []
    sides: list[bool] = []  # of the target, of errors beyond 0.2
    betas, integral, gain, slope, risen, below = [0.05], 0.0, 1.0, 0.0, False, 0
    for t, target in enumerate(targets, start=1):
        weights = [0.8**age for age in range(t)]
        smooth.append(sum(w * kl for w, kl in zip(weights, reversed(readings[:t]), strict=True)) / sum(weights))
        error = min(max(math.log(smooth[-1] / target), -0.3), 2.0) if smooth[-1] > 0 else -0.3
        new_target = t > 1 and target != targets[t - 2]
        if new_target:
            sides, below = [], 0
        if abs(error) > 0.2:
            sides.append(error > 0)
            gain = max(0.7 * gain, gain_min) if sides[-2:] in ([False, True], [True, False]) else min(1.01 * gain, 1.0)
        comparable = t > 1 and min(smooth[-2:]) > 0 and not new_target
        slope = 0.8 * slope + (0.2 * math.log(smooth[-1] / smooth[-2]) if comparable else 0.0)
        risen = risen or smooth[-1] > target / 2
        fast = gain * kp * error + gain * kd * slope
        if risen or t > 30:
            output, below = fast + integral, (below + 1 if error < 0 else 0)
            step = gain * ki * error * 30 / (30 + below)
            integral = min(max(output + step, min(low, output)), max(high, output)) - fast
        before = math.log(betas[-1] / 0.05)
        moved = min(max(fast + integral, before - 0.2), before + 0.2)
        betas.append(0.05 * math.exp(min(max(moved, low), high)))
    return betas[1:]


@pytest.mark.parametrize("seed", range(8))
def test_pid_equals_a_second_implementation(seed: int) -> None:
    rng = random.Random(seed)
    settings = {"kp": 2.0, "ki": 0.1, "kd": rng.choice([0.0, 2.0]), "gain_min": rng.choice([0.15, 0.5, 1.0])}
    settings |= {"coef_min": 0.02, "coef_max": 0.3}
    readings = [0.03 * math.exp(rng.gauss(0, 0.3)) for _ in range(45)]  # a slow rise, longer than the 30 updates
    readings += [0.1 * math.exp(1.5 * math.sin(k / 9) + rng.gauss(0, 0.3)) for k in range(200)]
    readings[140:144] = [-0.5, -0.2, 0.0, 0.01]
    targets = [0.1] * 90 + [0.25] * 155
    controller = make_controller("pid", 0.05, target=0.1, **settings)
    betas = []
    for reading, target in zip(readings, targets, strict=True):
        controller.target = target
        betas.append(controller.update(reading))
    assert betas == pytest.approx(pid_by_the_book(readings, targets, settings), rel=1e-9)
    assert min(betas) == 0.02 and max(betas) == pytest.approx(0.3) and len(set(betas)) > 100
    gain = controller.state_dict()["gain"]
    assert gain == 1.0 if settings["gain_min"] == 1 else gain < 1


def test_pid_defaults() -> None:
    settings = {"kp": 2.0, "ki": 0.1, "kd": 0.0, "gain_min": 0.15, "coef_min": 0.0005, "coef_max": 5.0}
    assert example("pid", kd=None).state_dict() == example("pid", **settings).state_dict()


def gains(controller: Controller, levels: Iterable[float]) -> list[float]:
    """The gain after readings of which each makes the smoothed KL the level, in multiples of the target of 0.1."""
    out, total = [], 0.0
    for t, level in enumerate(levels, start=1):
        reading = (0.1 * level * (1 - 0.8**t) - 0.8 * total) / 0.2
        total = 0.8 * total + 0.2 * reading
        controller.update(reading)
        out.append(controller.state_dict()["gain"])
    return out


def test_pid_lowers_its_gain_at_each_swing_and_raises_it_where_an_error_stays() -> None:
    """A swing goes from beyond 0.2 in the log on one side of the target to beyond it on the other."""
    levels = [1.3, 1.1, 0.9, 1.3, 0.8, 0.8, 1.0, 0.75, 1.3, 1.15, 1.3]
    expected = [1, 1, 1, 1, 0.7, 0.7 * 1.01, 0.7 * 1.01, 0.7 * 1.01**2, 0.49 * 1.01**2, 0.49 * 1.01**2, 0.49 * 1.01**3]
    assert gains(make_controller("pid", 0.05, target=0.1), levels) == pytest.approx(expected)
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, 0.8] * 20)[-1] == 0.15
    assert gains(make_controller("pid", 0.05, target=0.1, gain_min=0.6), [1.3, 0.8] * 20)[-1] == 0.6
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, 0.8] + [0.8] * 200)[-1] == 1.0
    assert gains(make_controller("pid", 0.05, target=0.1), [1.3, -0.1])[-1] == 0.7  # no log: far below
    resumed = make_controller("pid", 0.05, target=0.1, gain_min=0.6)
    resumed.load_state_dict({**resumed.state_dict(), "gain": 0.2})  # from a run with a lower gain_min
    assert gains(resumed, [1.3])[-1] == 0.6


def test_pid_takes_no_change_of_target_for_a_swing() -> None:
    controller = make_controller("pid", 0.05, target=0.1)
    feed(controller, [0.15] * 5)
    controller.target = 0.5
    assert feed(controller, [0.15]) and controller.state_dict()["gain"] == 1.0
    feed(controller, [5.0])  # but this is one
    assert controller.state_dict()["gain"] == 0.7


def test_pid_gain_multiplies_all_three_parts() -> None:
    """From the same state, a gain of a half with doubled settings is the same controller."""
    whole = make_controller("pid", 0.05, target=0.1, kp=0.2, ki=0.02, kd=0.4, gain_min=0.5)
    halved = make_controller("pid", 0.05, target=0.1, kp=0.4, ki=0.04, kd=0.8, gain_min=0.5)
    state = {**halved.state_dict(), "gain": 0.5}
    halved.load_state_dict(state)
    readings = [0.09, 0.1, 0.11, 0.1, 0.095]  # errors below 0.2 leave the gain alone
    assert feed(halved, readings) == pytest.approx(feed(whole, readings), rel=1e-12)


def test_pid_waits_at_most_30_updates_for_the_kl_to_rise() -> None:
    betas = feed(make_controller("pid", 0.05, target=0.1, **PLAIN), [0.01] * 33)
    log_ratio = [math.log(beta / 0.05) for beta in betas]
    assert log_ratio[:30] == pytest.approx([-0.15] * 30)  # kp e alone
    steps = [0.02 * 0.3 * 30 / (30 + waited) for waited in (1, 2, 3)]  # and ki e from update 31 on, less each time
    assert log_ratio[30:] == pytest.approx([-0.15 - sum(steps[: count + 1]) for count in range(3)])


def test_pid_waits_no_more_once_the_kl_has_risen() -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=0, ki=0.02)
    feed(controller, [0.06])  # above half the target, once
    log_ratio = [math.log(beta / 0.05) for beta in feed(controller, [-1.0, -1.0, -1.0])]
    steps = [-0.02 * 0.3 * 30 / (30 + below) for below in (1, 2, 3, 4)]  # log(0.06 / 0.1) is clipped
    assert log_ratio == pytest.approx([sum(steps[:2]), sum(steps[:3]), sum(steps)])


def test_pid_patience_starts_anew_above_the_target_and_with_a_new_target() -> None:
    """Under a KL that stays low beta sinks as 1 / time, not exponentially."""
    settings = {"kp": 0.0, "ki": 0.1, "gain_min": 1.0, "coef_min": 1e-9}

    def last_step(controller: Controller) -> float:
        before = controller.value
        return math.log(controller.update(0.04) / before)

    controller = make_controller("pid", 0.05, target=0.1, **settings)
    feed(controller, [0.04] * 1000)
    assert last_step(controller) == pytest.approx(-0.03 * 30 / (30 + 971))
    assert 0.05 / controller.value == pytest.approx((1 + 971 / 30) ** 0.9, rel=0.05)
    controller.target = 0.09
    assert last_step(controller) == pytest.approx(-0.03 * 30 / 31)
    feed(controller, [0.04] * 99)
    feed(controller, [0.5])  # the smoothed KL is above the target
    feed(controller, [-0.5] * 1)
    assert last_step(controller) == pytest.approx(-0.03 * 30 / 32)


def test_pid_error_is_clipped_to_2_upwards() -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=0.01, ki=0)
    assert controller.update(1e6) == pytest.approx(0.05 * math.exp(0.01 * 2))


def test_pid_slope_by_hand() -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=0, ki=0, kd=0.5, gain_min=1)
    assert controller.update(0.1) == pytest.approx(0.05, rel=1e-12)  # nothing to compare with
    smooth = (0.8 * 0.2 * 0.1 + 0.2 * 0.2) / (1 - 0.8**2)
    slope = 0.2 * math.log(smooth / 0.1)
    assert controller.update(0.2) == pytest.approx(0.05 * math.exp(0.5 * slope), rel=1e-12)
    # No difference is taken where the smoothed KL has no log; the slope just fades.
    assert controller.update(-10.0) == pytest.approx(0.05 * math.exp(0.5 * 0.8 * slope), rel=1e-12)
    assert controller.update(9.0) == pytest.approx(0.05 * math.exp(0.5 * 0.64 * slope), rel=1e-12)


@pytest.mark.parametrize("level", [1e-4, 0.1, 100.0])
def test_pid_rising_kl_raises_beta_through_kd(level: float) -> None:
    rising = [level * 1.1**k for k in range(10)]
    controller = make_controller("pid", 0.05, target=0.1, kp=0, ki=0, kd=0.2)
    betas = feed(controller, rising)
    assert all(later > earlier for earlier, later in pairwise(betas))
    assert all(later < betas[-1] for later in feed(controller, [level / 2] * 10)[5:])


def test_pid_new_target_gives_no_derivative_kick() -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=0, ki=0, kd=1)
    feed(controller, [0.1] * 5)
    controller.target = 0.01
    assert controller.update(0.1) == pytest.approx(0.05, rel=1e-9)
    controller.target = 0.4
    assert controller.update(0.9) == pytest.approx(0.05, rel=1e-9)  # the rise across the change is left out
    assert controller.update(0.9) > 0.0501  # the one after it is not


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
def test_pid_respects_bounds_and_slew(seed: int) -> None:
    controller = make_controller("pid", 0.05, target=0.1, kp=3, ki=0.3, kd=5, coef_min=0.03, coef_max=0.13)
    betas = [0.05]
    for level in (50.0, 1e-3, 50.0, 1e-3):
        betas += feed(controller, [level * abs(kl) for kl in noisy_readings(seed, 100)])
    moves = [abs(math.log(later / earlier)) for earlier, later in pairwise(betas)]
    assert min(betas) == 0.03 and max(betas) == 0.13  # reached, and not passed
    assert max(moves) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("kind", HEEDING)
def test_default_bounds_are_two_decades_to_either_side(kind: str) -> None:
    settings = {"horizon": 1.0} if kind == "adaptive" else {"kp": 10, "ki": 1}
    assert feed(example(kind, **settings), [1e3] * 500)[-1] == 5.0
    assert feed(example(kind, **settings), [0.0] * 500)[-1] == pytest.approx(0.0005, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_respects_bounds(seed: int) -> None:
    controller = make_controller("adaptive", 0.05, target=0.1, horizon=50, coef_min=0.03, coef_max=0.13)
    betas = []
    for level in (50.0, 1e-3, 50.0, 1e-3):
        betas += feed(controller, [level * kl for kl in noisy_readings(seed, 100)], n=16)
    assert min(betas) == 0.03 and max(betas) == 0.13


def plain_pi(readings: Iterable[float], ki: float, coef_max: float) -> list[float]:
    """Return the betas of the pid law with kd = 0 and no anti-windup, after `readings` that start high."""
    betas, integral, log_ratio, smooth_sum = [], 0.0, 0.0, 0.0
    for t, kl in enumerate(readings, start=1):
        smooth_sum = 0.8 * smooth_sum + 0.2 * kl
        error = min(max(math.log(smooth_sum / (1 - 0.8**t) / 0.1), -0.5), 2.0)
        integral += ki * error
        log_ratio = min(max(0.5 * error + integral, log_ratio - 0.2), log_ratio + 0.2, math.log(coef_max / 0.05))
        betas.append(0.05 * math.exp(log_ratio))
    return betas


@pytest.mark.parametrize("ki", [0.02, 2.0])
def test_pid_long_saturation_does_not_delay_recovery(ki: float) -> None:
    delays, plain_delays = [], []
    for saturated in (100, 500):
        readings = [10.0] * saturated + [0.01] * 500
        betas = feed(make_controller("pid", 0.05, target=0.1, **{**PLAIN, "ki": ki}, coef_max=0.2), readings)
        plain = plain_pi(readings, ki, coef_max=0.2)
        assert betas[: saturated + 1] == pytest.approx(plain[: saturated + 1], rel=1e-12)  # alike so far
        assert betas[saturated - 1] == 0.2
        delays.append(sum(beta > 0.19 for beta in betas[saturated:]))
        plain_delays.append(sum(beta > 0.19 for beta in plain[saturated:]))
    assert delays[0] == delays[1] < 30
    assert plain_delays[1] > 10 * delays[1]


def test_pid_long_floor_does_not_delay_recovery() -> None:
    counts = []
    for saturated in (500, 5000):
        controller = make_controller("pid", 0.05, target=0.1, coef_min=0.03)
        assert feed(controller, [0.001] * saturated)[-1] == 0.03
        count = 1
        while controller.update(0.5) <= 0.031:
            count += 1
        counts.append(count)
    assert counts[0] == counts[1] < 15


@pytest.mark.parametrize(("bounds", "kl"), [({"coef_min": 0.045}, 0.06), ({"coef_max": 0.055}, 0.3)])
def test_pid_proportional_part_past_a_bound_leaves_the_integral_alone(bounds: dict[str, float], kl: float) -> None:
    controller = make_controller("pid", 0.05, target=0.1, **bounds)
    assert feed(controller, [kl] * 50)[-1] in bounds.values()
    assert controller.state_dict()["integral"] == 0.0


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
    head = make_controller("pid", 0.05, target=0.1, kd=1)
    feed(head, [0.05, 0.1])
    head.target = 0.3
    tail = make_controller("pid", 0.05, target=0.1, kd=1)
    tail.load_state_dict(head.state_dict())
    assert feed(tail, [0.5, 0.6]) == feed(head, [0.5, 0.6])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("pid", {"kind": "adaptive"}, ["kind='adaptive'", "kind 'pid'"]),
        ("fixed", {"kind": None}, ["kind=None", "kind 'fixed'"]),
        ("pid", {"integral": None}, ["missing keys", "['integral']", "unaltered"]),
        ("cosine", {"total": None}, ["missing keys", "['total']", "unaltered"]),
        ("linear", {"colour": 3}, ["extra keys", "['colour']", "unaltered"]),
        ("pid", {"integral": NAN}, ["integral=nan", "unaltered"]),
        ("pid", {"integral": "0"}, ["integral='0'", "unaltered"]),
        ("pid", {"risen": 1}, ["risen=1", "unaltered"]),
        ("adaptive", {"beta": INF}, ["beta=inf", "unaltered"]),
        ("adaptive", {"beta": -0.1}, ["beta=-0.1", "unaltered"]),
        ("adaptive", {"target": -1.0}, ["target=-1.0", "unaltered"]),
        ("fixed", {"skipped": 0.5}, ["skipped=0.5", "unaltered"]),
        ("pid", {"kp": 0.75}, ["kp=0.75", "agree", "2.0"]),
        ("pid", {"gain": 0.0}, ["gain=0.0", "unaltered"]),
        # A state of the law of before.
        ("pid", {"gain": None, "side": None, "below": None}, ["missing keys", "['below', 'gain', 'side']"]),
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
    ("pid", 0.1, {"horizon": 100, **PID}, ["horizon=100", "drop it", "use kind 'adaptive'", "kp, ki, kd"]),
    ("adaptive", 0.1, {"kp": 0.5, **PID}, ["kp=0.5", "drop it", "use kind 'pid'"]),
    ("fixed", 0.1, {"coef_min": 0.01}, ["coef_min=0.01", "use kind 'adaptive' or 'pid'", "takes none"]),
    ("pid", 0.1, {"total": 5, **PID}, ["total=5", "use kind 'linear' or 'cosine'"]),
    ("pid", 0.1, {"kq": 1, **PID}, ["kq=1", "drop it", "kp, ki, kd"]),
    ("adaptive", 0.1, {"horizon": 0, **PID}, ["horizon=0", "> 0"]),
    ("adaptive", 0.1, {"horizon": INF, **PID}, ["horizon=inf", "finite"]),
    ("pid", 0.1, {"kp": -1, **PID}, ["kp=-1", ">= 0"]),
    ("pid", 0.1, {"ki": NAN, **PID}, ["ki=nan", "finite"]),
    ("pid", 0.1, {"gain_min": 0, **PID}, ["gain_min=0", "> 0"]),
    ("pid", 0.1, {"gain_min": 1.5, **PID}, ["gain_min=1.5", "at most 1"]),
    ("adaptive", 0.1, {"gain_min": 0.5, **PID}, ["gain_min=0.5", "use kind 'pid'"]),
    ("pid", 0.1, {"kd": "1", **PID}, ["kd='1'", "number"]),
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
    names = ["target", "horizon", "kp", "ki", "kd", "gain_min", "coef_min", "coef_max", "coef_end", "total"]
    all_none = dict.fromkeys(names)
    for kind, settings in EXAMPLES.items():
        assert make_controller(kind, **{**all_none, **settings}).state_dict() == example(kind).state_dict()


def test_module_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(trl_klx.control.controllers.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
