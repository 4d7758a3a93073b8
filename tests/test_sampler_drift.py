"""KL(policy || sampler): its estimate, and `kl_sampler_target`, which ends the updates of a rollout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ppo_tools
from support.device import PLAIN
from support.launching import Launched, alone, launch
from support.runs import equal, trained
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer

from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig
from trl_klx.kl import kl_to_sampler
from trl_klx.trainers.shared.drift import SamplerDrift

pytestmark = pytest.mark.trl

# The estimate -----------------------------------------------------------------------------------------------------


def test_its_mean_is_the_kl_of_the_policy_to_the_sampler() -> None:
    """By enumeration of what the sampler may choose; never below 0, and accurate where the two are near."""
    generator = torch.Generator().manual_seed(0)
    sampler = torch.randn(6, 9, dtype=torch.float64, generator=generator).log_softmax(-1)
    for distance in (2.0, 0.1, 1e-4):
        shift = distance * torch.randn(6, 9, dtype=torch.float64, generator=generator)
        policy = (sampler + shift).log_softmax(-1)
        found = kl_to_sampler(policy, sampler)
        expected = (policy.exp() * (policy - sampler)).sum(-1)
        assert (found >= 0).all()
        assert torch.allclose((sampler.exp() * found).sum(-1), expected, rtol=1e-10, atol=1e-14)
        assert torch.allclose(kl_to_sampler(policy.float(), sampler.float()).double(), found, rtol=1e-2, atol=1e-6)


def test_its_limits() -> None:
    never = torch.tensor([-torch.inf, -120.0, -90.0, -0.1])
    assert torch.allclose(kl_to_sampler(never, torch.full((4,), -0.1)), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert kl_to_sampler(torch.tensor([-0.1]), torch.tensor([-torch.inf])).isinf().all()
    assert kl_to_sampler(torch.tensor([-0.1]), torch.tensor([-200.0])).isinf().all()  # a weight beyond float32
    assert kl_to_sampler(torch.tensor([torch.nan]), torch.tensor([-1.0])).isnan().all()


# GRPO -------------------------------------------------------------------------------------------------------------

GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "num_iterations": 4,
    "max_steps": 8,
    "logging_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "inverse_sqrt",  # falls with the step, whatever the length of the run
    "lr_scheduler_kwargs": {"timescale": 1},
    "beta": 0.2,
    "kl_report": False,
    **PLAIN,
}


def grpo(folder: Path, **settings: Any) -> KLXGRPOTrainer:
    config = KLXGRPOConfig(str(folder), **{**GRPO, **settings})
    given = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
    return KLXGRPOTrainer(tiny_model(), digit_reward, config, **given)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What GRPO logs where nothing ends its updates: the drift rises from 0 in each rollout."""
    logs, _ = trained(grpo(tmp_path_factory.mktemp("free")))
    drifts = [entry["kl/drift"] for entry in logs]
    assert drifts[0] == drifts[4] == 0 and 0 < drifts[1] < drifts[2] < drifts[3]
    # In the first rollout the sampler is the reference, and the k3 of that is weighted by the same ratios.
    assert drifts[:4] == pytest.approx([entry["kl/k3"] for entry in logs[:4]], rel=1e-6)
    assert [entry.get("kl/drift_last") for entry in logs] == [None] * 3 + drifts[3:4] + [None] * 3 + drifts[7:]
    assert not any("kl/updates" in entry for entry in logs)
    return logs


def between(logs: list[dict], first: int, second: int) -> float:
    """A target that the drift of the second of two steps crosses."""
    return (logs[first]["kl/drift"] + logs[second]["kl/drift"]) / 2


def test_updates_end_where_the_drift_crosses_the_target(tmp_path: Path, free: list[dict]) -> None:
    """With update 3 of 4 computed beyond it, the weights are those of a run that makes three updates of the rollout."""
    logs, weights = trained(grpo(tmp_path / "held", max_steps=4, kl_sampler_target=between(free, 1, 2)))
    assert [entry["kl/updates"] for entry in logs] == [1, 1, 1, 0]
    for mine, theirs in zip(logs[:3], free, strict=False):
        assert mine["kl/drift"] == theirs["kl/drift"] and mine["loss"] == theirs["loss"]
    assert logs[2]["kl/drift_last"] == free[2]["kl/drift"]
    assert "kl" not in logs[3] and "kl/drift" not in logs[3] and logs[3]["grad_norm"] == 0

    class Ends(KLXGRPOTrainer):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            if self.state.global_step == 3:
                model.zero_grad()
            return super()._get_grad_norm(model, grad_norm)

    fewer = grpo(tmp_path / "fewer", max_steps=4)
    fewer.__class__ = Ends
    assert equal(weights, trained(fewer)[1])


def test_the_next_rollout_begins_with_all_its_updates(tmp_path: Path, free: list[dict]) -> None:
    """Rollouts, prompts and the learning rate's schedule are those of a run without a target."""
    logs, _ = trained(grpo(tmp_path, kl_sampler_target=1e-9))
    assert [entry["kl/updates"] for entry in logs] == [1, 1, 0, 0, 1, 1, 0, 0]
    assert [entry["learning_rate"] for entry in logs] == [entry["learning_rate"] for entry in free]
    assert [("reward" in entry) for entry in logs] == [("reward" in entry) for entry in free]


def test_a_target_that_is_never_reached_changes_nothing(tmp_path: Path, free: list[dict]) -> None:
    logs, _ = trained(grpo(tmp_path, kl_sampler_target=1e6))
    assert all(entry.pop("kl/updates") == 1 for entry in logs)
    timed = ("step_time", "train_runtime")
    assert [{k: v for k, v in entry.items() if k not in timed} for entry in logs] == [
        {k: v for k, v in entry.items() if k not in timed} for entry in free
    ]


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"kl_placement": "none"}, {"gradient_accumulation_steps": 2}])
def test_without_a_penalty_and_with_micro_batches(tmp_path: Path, options: dict) -> None:
    rows = 8 // options.get("gradient_accumulation_steps", 1)
    settings = {"per_device_train_batch_size": rows, "max_steps": 4, "kl_sampler_target": 1e-9, **options}
    logs, _ = trained(grpo(tmp_path, **settings))
    assert [entry["kl/updates"] for entry in logs] == [1, 1, 0, 0]
    assert logs[0]["kl/drift"] == 0 < logs[1]["kl/drift"] == logs[1]["kl/drift_last"]


def test_a_sampler_that_is_far_at_first_leaves_one_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with an engine that is behind: each rollout has its first update, and the run goes on."""
    add = SamplerDrift.add
    monkeypatch.setattr(SamplerDrift, "add", lambda self, policy, sampler, mask: add(self, policy, sampler - 1, mask))
    logs, _ = trained(grpo(tmp_path, kl_sampler_target=0.5))
    assert [entry["kl/updates"] for entry in logs] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert caplog.text.count("is 1 nats per token before a rollout's first update, above kl_sampler_target=0.5") == 1


def test_what_is_not_a_number_ends_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = SamplerDrift.add
    monkeypatch.setattr(SamplerDrift, "add", lambda self, *given: add(self, given[0] * torch.nan, *given[1:]))
    logs, _ = trained(grpo(tmp_path, max_steps=4, kl_sampler_target=0.5))
    assert [entry["kl/updates"] for entry in logs] == [1, 0, 0, 0]


@pytest.mark.parametrize("step", [3, 4])
def test_resumed_among_updates_that_are_left_out(tmp_path: Path, step: int) -> None:
    """Bit for bit: nothing is sampled again for updates that are not made."""
    options = {"kl_sampler_target": 1e-9, "save_strategy": "steps", "save_steps": 1}
    _, whole = trained(grpo(tmp_path, **options))
    logs, resumed = trained(grpo(tmp_path, **options), str(tmp_path / f"checkpoint-{step}"))
    assert [entry["kl/updates"] for entry in logs] == [1, 1, 0, 0, 1, 1, 0, 0]
    assert equal(whole, resumed)


# PPO --------------------------------------------------------------------------------------------------------------

PPO: dict[str, Any] = {"num_ppo_epochs": 4, "learning_rate": 1.0, "kl_report": False}


def ppo(folder: Path, **settings: Any) -> Any:
    return ppo_tools.trainer(folder, **{**PPO, **settings})


def test_ppo_ends_its_epochs_where_the_drift_crosses_the_target(tmp_path: Path) -> None:
    """With update 3 of 4 computed beyond the target, the run is one of three epochs, bit for bit."""
    means = [trained(ppo(tmp_path / str(n), num_ppo_epochs=n)) for n in (1, 2, 3, 4)]
    last = [logs[0]["kl/drift_last"] for logs, _ in means]
    assert last[0] == pytest.approx(0, abs=1e-12) and last[0] < last[1] < last[2] < last[3]
    held, weights = trained(ppo(tmp_path / "held", kl_sampler_target=(last[1] + last[2]) / 2))
    assert held[0]["kl/updates"] == 0.75
    for name in ("loss", "kl/drift", "kl/drift_last", "policy/approxkl_avg", "val/ratio"):
        assert held[0][name] == means[2][0][0][name], name
    assert equal(weights, means[2][1]) and not equal(weights, means[3][1])
    off, unchanged = trained(ppo(tmp_path / "off", kl_sampler_target=1e6))
    assert off[0].pop("kl/updates") == 1 and equal(unchanged, means[3][1])


# Processes --------------------------------------------------------------------------------------------------------

SHARED = {"learning_rate": 3e-3, "kl_controller": "pid", "kl_target": 0.05}
HELD: dict[str, dict] = {
    "grpo-held": {**SHARED, "num_iterations": 4, "kl_sampler_target": 0.18},
    "ppo-held": {**SHARED, "algorithm": "ppo", "num_ppo_epochs": 4, "kl_sampler_target": 0.16},
}


SHARED_OUT = [launch(strategy, *case) for strategy in ("ddp", "fsdp2", "zero3") for case in HELD.items()]


def drifts(logs: list[dict]) -> list[float]:
    return [entry.get("kl/drift", -1.0) for entry in logs]


@pytest.mark.parametrize("launched", SHARED_OUT, indirect=True)
def test_processes_end_their_updates_together(launched: Launched) -> None:
    """At the drift of all answers, where one process's own is above the target and the other's below."""
    expected = [entry for entry in alone(HELD[launched.name])["logs"] if "loss" in entry]
    made = [entry["kl/updates"] for entry in expected]
    assert 0 < sum(made) < len(made)
    for rank in launched.ranks:
        found = [entry for entry in rank["logs"] if "loss" in entry]
        assert [entry["kl/updates"] for entry in found] == made
        assert drifts(found) == pytest.approx(drifts(expected), rel=1e-3, abs=1e-7)
    assert launched.ranks[0]["weights"] == launched.ranks[1]["weights"]


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (KLXGRPOConfig, {}, "has one .num_iterations=1 and steps_per_generation=1, .*: remove it, or raise num_iter"),
        (KLXGRPOConfig, {"generation_batch_size": 8}, "has one .num_iterations=1 and steps_per_generation=1"),
        (KLXGRPOConfig, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "one of them would use two"),
        (KLXGRPOConfig, {"num_iterations": 2, "fp16": True}, "fp16=true fails: use bf16 or float32"),
        (KLXGRPOConfig, {"num_iterations": 2, "kl_sampler_target": 0}, "kl_sampler_target=0 "),
        (KLXGRPOConfig, {"num_iterations": 2, "kl_sampler_target": "much"}, "kl_sampler_target='much'"),
        (KLXPPOConfig, {"num_ppo_epochs": 1}, "num_ppo_epochs=1 with num_mini_batches=1 has one"),
        (KLXDPOConfig, {}, "has no meaning for DPO .its answers come from a dataset"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, config: type, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(str(tmp_path), use_cpu=True, **{"kl_sampler_target": 0.01, **options})


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"generation_batch_size": 32}, {"steps_per_generation": 4}])
def test_answers_that_are_reused_in_whatever_way(tmp_path: Path, options: dict) -> None:
    made = KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, kl_sampler_target=0.01, **options)
    assert "above 0.01 nats per token" in made.kl_sampler_limit
