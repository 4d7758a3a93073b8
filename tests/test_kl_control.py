"""KLSession on its own: what it measures, in which unit, and what it hands to the controller."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.tiny import Arguments

from trl_klx.kl.term import KLTerm
from trl_klx.trainers.session.metrics import Metrics
from trl_klx.trainers.session.session import KLSession

# Two prompts, two answers each, of 2, 1, 3 and 2 tokens.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
PROMPTS = torch.tensor([0, 0, 1, 1])
K1 = torch.tensor([[0.1, 0.3, 9.0], [0.2, 9.0, 9.0], [0.5, 0.1, 0.0], [0.2, 0.2, 9.0]])
PER_TOKEN, PER_SEQUENCE = 1.6 / 8, 1.6 / 4


def control(**options: object) -> KLSession:
    return KLSession(Arguments(**{"beta": 0.2, **options}), Accelerator(cpu=True))


def measured(kl: KLSession, mode: str = "train") -> KLSession:
    kl.measure(mode, {"k1": K1, "k3": 2 * K1}, MASK, PROMPTS)
    return kl


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_units(mode: str) -> None:
    kl = measured(control(kl_signal="k1"), mode)
    if mode == "train":
        kl.end_step()
    metrics = kl.metrics(mode)
    assert metrics["kl/k1"] == pytest.approx(PER_TOKEN)
    assert metrics["kl/k3"] == metrics["kl"] == pytest.approx(2 * PER_TOKEN)
    assert metrics["kl/sequence"] == pytest.approx(PER_SEQUENCE)
    assert metrics["kl/sequences"] == 4
    assert kl.metrics(mode) == {}  # starts afresh


@pytest.mark.parametrize(("unit", "reading"), [("token", PER_TOKEN), ("sequence", PER_SEQUENCE)])
def test_the_controller_reads_its_unit_and_the_number_of_sequences(unit: str, reading: float) -> None:
    options = {"kl_controller": "adaptive", "kl_target": 0.35, "kl_horizon": 100.0, "kl_signal": "k1"}
    kl = control(**options, kl_target_unit=unit)
    kl.start(total_steps=10)
    step = measured(kl).end_step()
    assert step["kl/error"] == pytest.approx(reading - 0.35)
    assert step["kl/coef"] == 0.2
    clipped = max(-0.2, min(0.2, reading / 0.35 - 1))
    assert kl.coef == pytest.approx(0.2 * (1 + clipped * 4 / 100))


def test_micro_batches_of_one_step_are_one_reading() -> None:
    whole, split = measured(control()), control()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):  # the answers to a prompt lie in different micro-batches
        split.measure("train", {"k1": K1[rows], "k3": 2 * K1[rows]}, MASK[rows], PROMPTS[rows])
    for kl in (whole, split):
        kl.end_step()
    assert split.metrics("train") == pytest.approx(whole.metrics("train"))


def test_weight_metrics() -> None:
    metrics = Metrics(Accelerator(cpu=True))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    weights = torch.tensor([[0.5, 2.0, 50.0], [1.0, 1.6, 4.0], [9.0, 9.0, 9.0]])

    def found(**term: Any) -> dict[str, float]:
        metrics.defer_weights("train", weights, mask, KLTerm(**term))
        metrics.settle("train")
        return metrics.take("train")

    token = found(weight_cap=1.5)
    assert set(token) == {"kl/ess", "kl/weight_max", "kl/weight_cut"}
    assert token["kl/weight_max"] == 4.0
    assert token["kl/weight_cut"] == pytest.approx(3 / 5)
    assert token["kl/ess"] == pytest.approx(9.1**2 / (5 * 23.81))
    # Products of weights without their bound, and the share of tokens whose own weight is above it.
    prefix = found(weight_level="prefix", weight_cap=1.5)
    assert prefix["kl/weight_max"] == pytest.approx(6.4)
    assert prefix["kl/weight_cut"] == pytest.approx(3 / 5)
    assert found(weight_level="prefix", estimator="exact")["kl/weight_max"] == pytest.approx(1.6)  # of the states
    # An answer without a token that counts is none.
    assert found(answer_cap=1.5)["kl/answers_left_out"] == 0.5
    assert found(veto=0.6, estimator="exact")["kl/answers_left_out"] == 0.5
    assert found(veto=0.6, answer_cap=1.5)["kl/answers_left_out"] == 1.0


def test_state_holds_controller_and_budget(tmp_path: Path) -> None:
    options = {"kl_controller": "pid", "kl_target": 0.01, "kl_budget": 0.7}
    kl = control(**options)
    kl.start(10)
    for _ in range(3):
        measured(kl).end_step()
    state = json.loads(json.dumps(kl.state()))
    again = control(**options)
    again.start(10)
    again.load(state, tmp_path, None)
    assert again.coef == kl.coef > 0.2
    assert measured(again).end_step() == measured(kl).end_step()
    assert again.budget.exceeded is kl.budget.exceeded is True
    assert again.budget.kl == kl.budget.kl
    assert state["controller"]["kind"] == "pid"


def test_another_kind_of_controller_starts_afresh(tmp_path: Path) -> None:
    kl = control(kl_controller="adaptive", kl_target=0.01)
    kl.start(10)
    measured(kl).end_step()
    state = json.loads(json.dumps(kl.state()))
    other = control(kl_controller="pid", kl_target=0.01, beta=0.5)
    other.start(10)
    other.load(state, tmp_path, None)
    assert other.coef == 0.5


def test_without_a_penalty_beta_is_logged_as_zero() -> None:
    assert measured(control(kl_placement="none")).end_step()["kl/coef"] == 0.0
