"""What is logged of a real engine, and the alarms when it drifts from the trainer: each provoked."""

import json
from pathlib import Path

import pytest
import torch
import vllm_engine

from trl_klx import KLXGRPOTrainer

PROMPTS = [first + second for first in "abcd" for second in "abcd"]
LOGGED = ("kl/sampler", "kl/sampler_se", "kl/weight_mean", "kl/weight_mean_se", "kl/ess", "kl/weight_max")


@pytest.fixture
def made(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> KLXGRPOTrainer:
    batch = {"per_device_train_batch_size": 64, "num_generations": 4, "max_steps": 10, "learning_rate": 1e-4}
    return vllm_engine.make_trainer(model, tmp_path, PROMPTS * 4, **(batch | request.param))


def alarms(trainer: KLXGRPOTrainer) -> dict[str, dict]:
    path = Path(trainer.args.output_dir) / "health.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {event["alarm"]: event for event in reversed([*map(json.loads, lines)]) if "ends" not in event}


def logs(trainer: KLXGRPOTrainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "made", [{"bf16": True}, {"bf16": True, "kl_placement": "reward", "kl_estimator": "k1"}], ids=str, indirect=True
)
def test_a_healthy_engine_is_measured_and_silent(made: KLXGRPOTrainer) -> None:
    made.train()
    assert not alarms(made)
    assert all(name in row for row in logs(made) for name in (*LOGGED, "kl/ratio_cut"))
    for row in logs(made):
        assert 0 < row["kl/sampler"] < 5e-3 and row["kl/ess"] > 0.95 and row["kl/ratio_cut"] == 0
        assert abs(row["kl/weight_mean"] - 1) < 0.03


@pytest.mark.parametrize("made", [{"temperature": 0.7}], ids=str, indirect=True)
def test_raw_log_probs(made: KLXGRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a server that was started without `--logprobs-mode processed_logprobs`."""
    executor = made.vllm_generation.llm.llm_engine.model_executor
    sampler = executor.driver_worker.model_runner.sampler
    for part in (sampler, sampler.topk_topp_sampler):
        assert part.logprobs_mode == "processed_logprobs"
        monkeypatch.setattr(part, "logprobs_mode", "raw_logprobs")
    made.train()
    found = alarms(made)
    for name in ("stale_sampler", "wrong_weights"):
        assert "not those it sampled by" in found[name]["cause"] and "processed_logprobs" in found[name]["remedy"]


@pytest.mark.parametrize(
    "made", [{"learning_rate": 3e-4, "beta": 0.01, "bf16": True, "max_steps": 20}], ids=str, indirect=True
)
def test_weights_that_are_not_sent(made: KLXGRPOTrainer) -> None:
    made.vllm_generation.sync_weights()  # the engine may have those of another test
    made.vllm_generation.sync_weights = lambda: None
    made.train()
    found = alarms(made)
    assert "old weights" in found["stale_sampler"]["cause"] and "sync_weights" in found["stale_sampler"]["remedy"]
    assert "cut_ratios" in found


@pytest.mark.parametrize("made", [{}], ids=str, indirect=True)
def test_an_engine_of_another_dtype(made: KLXGRPOTrainer) -> None:
    """A float32 trainer, whose checkpoint vLLM turns into bfloat16. Larger logits are rounded more."""
    with torch.no_grad():
        for model in (made.model, made.ref_model):
            model.lm_head.weight.mul_(4)
    made.train()
    found = alarms(made)
    assert "another dtype" in found["coarse_sampler"]["cause"] and "bf16: true" in found["coarse_sampler"]["remedy"]
