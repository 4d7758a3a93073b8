"""KL(policy after a step || policy before it): its estimate, and `kl_step_limit`, which the learning rate keeps."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ppo_tools
from support.device import PLAIN
from support.launching import Launched, alone, launch
from support.runs import equal, trained
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig
from trl_klx.trainers.shared.step_limit import StepLimit

pytestmark = pytest.mark.trl


# The law ----------------------------------------------------------------------------------------------------------


class Plant:
    """A policy of one token, whose steps go as far as the learning rate takes them."""

    def __init__(self, limit: float, unit: str = "token") -> None:
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 0.1}])
        self.args = SimpleNamespace(kl_step_limit=limit, kl_target_unit=unit)
        self.accelerator = SimpleNamespace(gather=lambda sums: sums)
        self.logged: dict[str, list[float]] = {}
        self.metrics: Any = self
        self.limit = StepLimit(self)

    def add_callback(self, callback: Any) -> None: ...

    def add(self, mode: str, name: str, value: float) -> None:
        self.logged.setdefault(name, []).append(value)

    def step(self, logps: Tensor, mask: Tensor, after: Any) -> list[float]:
        """One step, whose policy `after` is a function of the learning rate; the rates that it had."""
        given: Any = (None, None, None)
        self.limit.on_step_begin(*given, optimizer=self.optimizer)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.limit.before(logps, mask, lambda: after(rates[0]))
        self.limit.on_optimizer_step(*given, optimizer=self.optimizer)
        assert [group["lr"] for group in self.optimizer.param_groups] == [1.0, 0.1]
        self.limit.on_step_end(*given)
        return rates


def every_answer(logits: Tensor) -> Tensor:
    """(A, 2) log-probs of the tokens of all answers of two tokens, one after the other."""
    steps = logits.log_softmax(-1)
    return torch.stack([steps[0][[i for i, _ in PAIRS]], steps[1][[j for _, j in PAIRS]]], dim=1)


PAIRS = list(itertools.product(range(4), repeat=2))


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_its_mean_is_the_kl_of_the_step(unit: str) -> None:
    """All answers as often as the policy before the step gives them: the KL from policy to policy, in the unit."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    after = before + 0.3 * torch.randn(2, 4, dtype=torch.float64, generator=generator)
    counts = (1e6 * every_answer(before).sum(1).exp()).round().long()
    rows = torch.arange(len(PAIRS)).repeat_interleave(counts)
    plant = Plant(1.0, unit)
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    plant.step(every_answer(before)[rows], mask, lambda rate: every_answer(after)[rows])
    p, q = after.log_softmax(-1), before.log_softmax(-1)
    kls = (p.exp() * (p - q)).sum(-1)  # of each of the two tokens, which do not depend on each other
    expected = kls.sum() if unit == "sequence" else kls.mean()
    assert plant.logged["kl/step"] == pytest.approx([expected.item()], rel=1e-4)


def test_what_is_masked_counts_nowhere() -> None:
    logps = torch.full((3, 4), -1.0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    spoilt = torch.where(mask, -0.9, torch.nan)
    w = math.exp(0.1)
    each = w * 0.1 - w + 1
    for unit, expected in (("token", each), ("sequence", 3 * each / 2)):
        plant = Plant(1.0, unit)
        plant.step(logps, mask, lambda rate: spoilt)
        assert plant.logged["kl/step"] == pytest.approx([expected], rel=1e-5)


def noisy(rate: float, size: float, generator: torch.Generator) -> Tensor:
    """Log-probs after a step whose KL is about half of (size * rate)^2, of a token that had log-prob -1."""
    return -1.0 + size * rate * (1 + 0.3 * torch.randn(64, 8, generator=generator)) * torch.sign(
        torch.randn(64, 8, generator=generator)
    )


@pytest.mark.parametrize("size", [0.05, 0.3, 3.0])
def test_steps_go_as_far_as_the_limit_and_no_farther(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    plant, mask = Plant(0.004), torch.ones(64, 8, dtype=torch.bool)
    rates = [plant.step(torch.full((64, 8), -1.0), mask, lambda rate: noisy(rate, size, generator)) for _ in range(80)]
    assert all(second == pytest.approx(0.1 * first) for first, second in rates)
    late = sum(plant.logged["kl/step"][40:]) / 40
    if size == 0.05:  # below the limit by itself
        assert late < 0.004 and [first for first, _ in rates] == [1.0] * 80
    else:
        assert late == pytest.approx(0.004, rel=0.1) and rates[-1][0] < 0.5
    assert plant.logged["kl/lr_scale"] == [first for first, _ in rates]


def test_the_scale_follows_its_law() -> None:
    limit, kls = 0.01, [0.02, 0.5, 1e-9, 0.005, 0.0, math.nan, math.inf]
    plant, mask = Plant(limit), torch.ones(1, 1, dtype=torch.bool)
    expected, log_scale = [], 0.0
    for kl in kls:
        expected.append(math.exp(log_scale))
        # log-probs whose w log w - w + 1 is the KL wanted
        after = torch.tensor([[_log_weight(kl)]], dtype=torch.float64)
        plant.step(torch.zeros(1, 1, dtype=torch.float64), mask, lambda rate, after=after: after)
        if kl == kl and kl > 0:
            log_scale = min(0.0, log_scale + 0.15 * max(-2.0, min(2.0, math.log(limit / kl) if kl < math.inf else -2)))
    assert plant.logged["kl/lr_scale"] == pytest.approx(expected)
    assert plant.logged["kl/step"] == pytest.approx(kls, rel=1e-3, nan_ok=True)


def _log_weight(kl: float) -> float:
    if not 0 < kl < math.inf:
        return kl
    low, high = 0.0, 2.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.exp(middle) * middle - math.expm1(middle) < kl else (low, middle)
    return low


def test_a_schedule_that_moves_within_the_step_keeps_its_move() -> None:
    """DeepSpeed's moves in the backward pass: what it wrote is not written over."""
    plant = Plant(0.01)
    given: Any = (None, None, None)
    for limited in (False, True):
        plant.limit.load({"lr_log_scale": -1.0 if limited else 0.0}, Path(), None)
        plant.optimizer.param_groups[:] = [{"lr": 1.0}]
        plant.limit.on_step_begin(*given, optimizer=plant.optimizer)
        plant.optimizer.param_groups[0]["lr"] = 0.9
        plant.limit.on_optimizer_step(*given, optimizer=plant.optimizer)
        assert plant.optimizer.param_groups[0]["lr"] == 0.9


# Trainers ---------------------------------------------------------------------------------------------------------

GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "inverse_sqrt",  # falls with the step, whatever the length of the run
    "lr_scheduler_kwargs": {"timescale": 4},
    "beta": 0.2,
    "kl_report": False,
    **PLAIN,
}
TIMED = ("step_time", "train_runtime")


def grpo(folder: Path, *, cls: type = KLXGRPOTrainer, **settings: Any) -> KLXGRPOTrainer:
    config = KLXGRPOConfig(str(folder), **{**GRPO, **settings})
    given = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
    return cls(tiny_model(), digit_reward, config, **given)


def ppo(folder: Path, **settings: Any) -> Any:
    own = {"learning_rate": 1.0, "max_steps": 5, "given": False, "kl_report": False}
    return ppo_tools.trainer(folder, **{**own, **settings})


def column(logs: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in logs]


MADE: dict[str, Any] = {"grpo": grpo, "ppo": ppo}


@pytest.mark.parametrize(
    "options",
    [{}, {"kl_estimator": "exact", "kl_placement": "both"}, {"beta": 0.0}, {"kl_placement": "none"}],
    ids=str,
)
def test_grpo_measures_what_the_next_update_of_the_answers_begins_with(tmp_path: Path, options: dict) -> None:
    """Of a rollout that is used twice, update 2 begins where step 1 ended: kl/drift is measured there, too."""
    logs, _ = trained(grpo(tmp_path, num_iterations=2, kl_step_limit=1e6, **options))
    moved, drifted = column(logs, "kl/step"), column(logs, "kl/drift")
    assert min(moved) > 1e-6
    assert moved[0::2] == pytest.approx(drifted[1::2], rel=1e-4)


def test_ppo_measures_all_updates_of_its_rollout(tmp_path: Path) -> None:
    """One epoch ends where the second begins."""
    one, _ = trained(ppo(tmp_path / "1", max_steps=1, num_ppo_epochs=1, kl_step_limit=1e6))
    two, _ = trained(ppo(tmp_path / "2", max_steps=1, num_ppo_epochs=2))
    assert one[0]["kl/step"] == pytest.approx(two[0]["kl/drift_last"], rel=1e-4)
    assert one[0]["kl/step"] > 1e-6


@pytest.mark.parametrize("made", MADE)
def test_a_limit_that_is_never_reached_changes_nothing(tmp_path: Path, made: str) -> None:
    free, weights = trained(MADE[made](tmp_path / "free"))
    logs, same = trained(MADE[made](tmp_path / "limited", kl_step_limit=1e6))
    assert all(entry.pop("kl/lr_scale") == 1 and entry.pop("kl/step") > 0 for entry in logs)
    assert equal(weights, same)
    assert [{k: v for k, v in entry.items() if k not in TIMED} for entry in logs] == [
        {k: v for k, v in entry.items() if k not in TIMED} for entry in free
    ]


@pytest.mark.parametrize("made", MADE)
def test_the_run_is_one_with_the_lower_learning_rates(tmp_path: Path, made: str) -> None:
    """To the bit: a run whose schedule is the one of the limited run times its scale."""
    free, _ = trained(MADE[made](tmp_path / "free"))
    limit = 0.2 * max(column(trained(MADE[made](tmp_path / "seen", kl_step_limit=1e6))[0], "kl/step"))
    logs, weights = trained(MADE[made](tmp_path / "limited", kl_step_limit=limit))
    scales = column(logs, "kl/lr_scale")
    assert scales[0] == 1 and min(scales) < 0.8
    assert column(logs, "learning_rate") == column(free, "learning_rate")  # the schedule's
    by_hand = MADE[made](tmp_path / "hand")
    by_hand.create_optimizer()
    own = by_hand.create_scheduler(6, by_hand.optimizer).lr_lambdas[0]
    by_hand.lr_scheduler = LambdaLR(by_hand.optimizer, lambda step: own(step) * [*scales, 1.0][step])
    by_hand._created_lr_scheduler = False  # or else `train` makes another
    _, same = trained(by_hand)
    assert equal(weights, same)


@pytest.mark.parametrize("made", MADE)
def test_steps_of_a_policy_are_held_at_the_limit(tmp_path: Path, made: str) -> None:
    """On the mean of the logs, which is what the law moves by."""
    settings = {"max_steps": 45, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "kl_step_limit": 1e-3}
    logs, _ = trained(MADE[made](tmp_path, **settings))
    late = column(logs, "kl/step")[30:]
    assert column(logs, "kl/step")[0] > 2e-2 and max(column(logs, "kl/lr_scale")[30:]) < 0.5
    assert 0.5e-3 < math.exp(sum(map(math.log, late)) / 15) < 2e-3


def test_a_schedule_of_the_users_that_goes_on_from_its_last_value(tmp_path: Path) -> None:
    made = grpo(tmp_path, kl_step_limit=1e-9)
    made.create_optimizer()
    made.lr_scheduler = ExponentialLR(made.optimizer, 0.5)
    logs, _ = trained(made)
    assert column(logs, "learning_rate") == pytest.approx([2e-2 * 0.5**step for step in range(6)])
    assert logs[-1]["kl/lr_scale"] == pytest.approx(math.exp(-0.3 * 5))


def test_updates_that_are_left_out_are_no_steps(tmp_path: Path) -> None:
    """Nothing is scored for them, and they say nothing about the learning rate."""
    logs, _ = trained(grpo(tmp_path, num_iterations=3, kl_sampler_target=1e-12, kl_step_limit=1e-9))
    assert column(logs, "kl/updates") == [1, 1, 0, 1, 1, 0]
    assert ["kl/step" in entry for entry in logs] == [True, True, False] * 2


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_resumed_bit_for_bit(tmp_path: Path, made: str, unit: str) -> None:
    options = {"kl_step_limit": 1e-4, "kl_target_unit": unit, "save_strategy": "steps", "save_steps": 3}
    logs, weights = trained(MADE[made](tmp_path, **options))
    assert logs[2]["kl/lr_scale"] < 1
    again, same = trained(MADE[made](tmp_path, **options), str(tmp_path / "checkpoint-3"))
    assert equal(weights, same)
    assert column(again, "kl/lr_scale") == column(logs, "kl/lr_scale")


@pytest.mark.parametrize("made", MADE)
def test_a_second_run_begins_with_the_whole_learning_rate(tmp_path: Path, made: str) -> None:
    trainer = MADE[made](tmp_path, kl_step_limit=1e-9, max_steps=2)
    assert [column(trained(trainer)[0], "kl/lr_scale")[0] for _ in range(2)] == [1.0, 1.0]


# Processes --------------------------------------------------------------------------------------------------------

SHARED = {"learning_rate": 3e-3, "kl_step_limit": 1e-5, "kl_controller": "pid", "kl_target": 0.05}
LIMITED: dict[str, dict] = {
    "grpo-step-limit": SHARED,
    "ppo-step-limit": {**SHARED, "algorithm": "ppo", "num_ppo_epochs": 2},
}
SHARED_OUT = [launch(strategy, *case) for strategy in ("ddp", "fsdp2", "zero2", "zero3") for case in LIMITED.items()]


@pytest.mark.parametrize("launched", SHARED_OUT, indirect=True)
def test_processes_take_the_steps_of_one(launched: Launched) -> None:
    expected = [entry for entry in alone(LIMITED[launched.name])["logs"] if "loss" in entry]
    assert min(column(expected, "kl/lr_scale")) < 0.9
    for rank in launched.ranks:
        found = [entry for entry in rank["logs"] if "loss" in entry]
        for name in ("kl/step", "kl/lr_scale"):
            assert column(found, name) == pytest.approx(column(expected, name), rel=1e-2, abs=1e-9)
    assert launched.ranks[0]["weights"] == launched.ranks[1]["weights"]


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (KLXGRPOConfig, {"kl_step_limit": 0}, "kl_step_limit=0 "),
        (KLXPPOConfig, {"kl_step_limit": "much"}, "kl_step_limit='much'"),
        (KLXDPOConfig, {}, "has no meaning for DPO .its answers are not the policy's"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, config: type, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(str(tmp_path), use_cpu=True, **{"kl_step_limit": 0.01, **options})


def test_a_limit_that_bfloat16_rounds_away_is_told(tmp_path: Path) -> None:
    options = {"bf16": True, "use_cpu": True, "kl_step_limit": 0.03, "kl_target_unit": "sequence"}
    with pytest.warns(UserWarning, match="kl_step_limit is 0.00012 per token: add exact to kl_monitor"):
        KLXGRPOConfig(str(tmp_path), max_completion_length=256, **options)


def test_dropout_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    config = KLXGRPOConfig(str(tmp_path), **{**GRPO, "kl_step_limit": 0.01})
    made = KLXGRPOTrainer(model, digit_reward, config, train_dataset=tiny_dataset(), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"kl_step_limit=0\.01 .*\(attention_dropout 0\.1\): set disable_dropout"):
        made.train()
