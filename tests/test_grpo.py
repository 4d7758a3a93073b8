"""KLXGRPOTrainer in real, tiny training runs: placements, exact KL, PEFT, monitoring, controllers, checkpoints."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from support.device import DEVICE, PLAIN
from support.tiny import digit_reward, drift, save_tiny, tiny_dataset, tiny_family, tiny_model, tiny_tokenizer
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import exact_kl, kl_credit, kl_estimate, leave_one_out_baseline
from trl_klx.trainers.seams import TRL_VERSION
from trl_klx.trainers.session.session import STATE_FILE

pytestmark = pytest.mark.trl

SETTINGS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.2,
    **PLAIN,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def make_trainer(model, folder: Path, *, peft_config: LoraConfig | None = None, **settings) -> KLXGRPOTrainer:
    return KLXGRPOTrainer(
        model,
        digit_reward,
        KLXGRPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=tiny_dataset(),
        eval_dataset=tiny_dataset(8),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def uniform(shape: torch.Size, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rollout(trainer: KLXGRPOTrainer) -> dict[str, Tensor]:
    """One generation batch, as training would make it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in tiny_dataset(2).to_list() for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def dense_logits(model: torch.nn.Module, inputs: dict, temperature: float = 1.0) -> Tensor:
    """(B, C, V) logits that predict the completion, by a plain forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, inputs["prompt_ids"].size(1) - 1 : -1] / temperature


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k2"},
        {"kl_estimator": "k1", "kl_placement": "reward"},
        {"kl_estimator": "k1", "kl_placement": "reward", "kl_credit": "immediate"},
        {"kl_estimator": "k3", "kl_placement": "both"},
        {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix", "num_iterations": 2},
        {"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix", "kl_is_veto": 0.5},
        {"kl_estimator": "exact"},
        {"kl_estimator": "exact", "kl_direction": "forward", "kl_value_cap": 0.1},
        {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.02},
        {"kl_estimator": "k3", "kl_importance_sampling": "prefix", "kl_is_cap": 2.0, "kl_is_mode": "mask"},
        {"kl_estimator": "k2", "kl_importance_sampling": "sequence", "num_iterations": 2, "kl_aggregation": "token"},
        {"kl_placement": "none", "beta": 0.0, "kl_monitor": ["k1", "k2", "k3", "exact"]},
        {"kl_estimator": "exact", "kl_placement": "both", "gradient_checkpointing": True, "bf16": True},
        {"kl_controller": "linear", "kl_coef_end": 0.01},
        {"kl_controller": "adaptive", "kl_target": 0.5, "kl_target_unit": "sequence", "kl_horizon": 100.0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_kind_of_configuration_trains(model_path: str, tmp_path: Path, options: dict) -> None:
    trainer = make_trainer(model_path, tmp_path, **options)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(logs) == 3
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy starts as its reference
    assert logs[-1]["kl/sequence"] > 0
    assert all(value is not None and abs(value) < 1e6 for entry in logs for value in entry.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_names(model_path: str, tmp_path: Path, accumulation: int) -> None:
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(model_path, tmp_path, kl_estimator="exact", kl_controller="pid", kl_target=0.02, **options)
    trainer.train()
    entry = trainer.state.log_history[1]
    names = {"kl", "kl/k1", "kl/k1_se", "kl/k3", "kl/k3_se", "kl/exact", "kl/exact_se", "kl/sequence", "kl/sequence_se"}
    names |= {"kl/coef", "kl/target", "kl/error", "kl/loss"}
    assert names <= set(entry)
    assert entry["kl"] == entry["kl/exact"]
    assert entry["kl/error"] == pytest.approx(entry["kl"] - 0.02)
    assert entry["kl/loss"] == pytest.approx(entry["kl/coef"] * entry["kl"], rel=1e-4)  # dapo: the token mean


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tied", [False, True])
def test_exact_kl_in_forward_equals_dense(tmp_path: Path, direction: str, tied: bool) -> None:
    """The KL loss's value and every gradient equal a dense computation outside the trainer, temperature included."""
    path = save_tiny(tmp_path / "model", tied=tied)
    options = {"kl_estimator": "exact", "kl_direction": direction, "temperature": 0.7, "loss_type": "bnpo"}
    trainer = make_trainer(path, tmp_path / "run", **options)
    drift(trainer.model)
    inputs = rollout(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])  # leaves the KL alone in the loss
    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    with torch.no_grad():
        ref_logits = dense_logits(trainer.ref_model, inputs, 0.7)
    kl = exact_kl(dense_logits(trainer.model, inputs, 0.7), ref_logits, direction)
    wanted = 0.2 * kl[inputs["completion_mask"].bool()].mean()
    assert float(wanted.detach()) > 1e-3
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    for found, expected in zip(gradients, torch.autograd.grad(wanted, list(trainer.model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "placement", "credit", "used"),
    [
        ("k1", "reward", "return_to_go", "return_to_go"),
        ("k1", "reward", "sequence", "sequence"),
        ("k1", "reward", "immediate", "immediate"),
        ("k3", "both", "return_to_go", "future"),
        ("exact", "both", "return_to_go", "future"),
    ],
)
def test_reward_moves_advantages_after_normalisation(
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    estimator: str,
    placement: str,
    credit: str,
    used: str,
) -> None:
    """TRL's loss sees its own normalised advantages less exactly beta * (credit - leave-one-out baseline)."""
    options = {"kl_estimator": estimator, "kl_placement": placement, "kl_credit": credit, "scale_rewards": "group"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # scored in two forwards
    trainer = make_trainer(model_path, tmp_path, **options)
    drift(trainer.model)
    inputs = rollout(trainer)
    seen = {}
    stock_loss = GRPOTrainer._compute_loss

    def spy(self: GRPOTrainer, model: torch.nn.Module, given: dict) -> Tensor:
        seen["advantages"] = given["advantages"]
        return stock_loss(self, model, given)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", spy)
    trainer._compute_loss(trainer.model, inputs)

    with torch.no_grad():
        logits, ref_logits = (dense_logits(model, inputs) for model in (trainer.model, trainer.ref_model))
    ids, mask = inputs["completion_ids"].unsqueeze(-1), inputs["completion_mask"]
    logps, ref_logps = (x.log_softmax(-1).gather(-1, ids).squeeze(-1) for x in (logits, ref_logits))
    values = exact_kl(logits, ref_logits) if estimator == "exact" else kl_estimate(logps, ref_logps, estimator)
    credits = kl_credit(values, mask, credit=used)
    moved = 0.2 * (credits - leave_one_out_baseline(credits, mask, 4))
    assert moved.abs().max() > 1e-3
    assert inputs["advantages"].shape == (8,)  # TRL's own: normalised, untouched
    torch.testing.assert_close(seen["advantages"], inputs["advantages"][:, None] - moved, rtol=1e-4, atol=1e-5)


def test_reward_kl_is_not_amplified_when_all_rewards_are_equal(model_path: str, tmp_path: Path) -> None:
    """The trap: a KL inside a reward divided by its group's standard deviation gives advantages near 1 at any beta."""
    trainer = make_trainer(model_path, tmp_path, kl_estimator="k1", kl_placement="reward", beta=0.001)
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    drift(trainer.model)
    inputs = rollout(trainer)
    assert inputs["advantages"].abs().max() < 1e-3
    moved = trainer._with_kl_advantages(inputs)["advantages"]
    assert 0 < moved.abs().max() < 0.02


def test_beta_of_today_scales_the_buffered_credit(model_path: str, tmp_path: Path) -> None:
    """A controller moves beta while a rollout is still being used: the penalty follows."""
    trainer = make_trainer(model_path, tmp_path, kl_estimator="k1", kl_placement="reward")
    drift(trainer.model)
    inputs = rollout(trainer)
    trainer.beta = 0.4
    moved = trainer._with_kl_advantages(inputs)["advantages"]
    torch.testing.assert_close(moved, inputs["advantages"][:, None] - 0.4 * inputs["kl_credit"])


def test_peft_reference_is_the_model_without_its_adapter(model_path: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"kl_estimator": "exact", "kl_placement": "both", "loss_type": "bnpo"}
    trainer = make_trainer(model_path, tmp_path, peft_config=lora, **options)
    assert trainer.ref_model is None
    inputs = rollout(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    del inputs["kl_credit"]
    loss = trainer._compute_loss(trainer.model, inputs)
    with torch.no_grad(), trainer.model.disable_adapter():
        ref_logits = dense_logits(trainer.model, inputs)
    kl = exact_kl(dense_logits(trainer.model, inputs), ref_logits)
    wanted = 0.2 * kl[inputs["completion_mask"].bool()].mean()
    assert float(wanted.detach()) > 1e-3
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert trainer.state.global_step == 3


def test_exact_refuses_an_adapted_output_head(model_path: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"'lm_head'.*target_modules"):
        make_trainer(model_path, tmp_path, peft_config=lora, kl_estimator="exact")


def test_reference_of_an_in_memory_policy_is_that_policy(tmp_path: Path) -> None:
    """TRL would reload the path in its config: here another model. The KL at step 0 must be 0."""
    save_tiny(tmp_path / "other", seed=5)
    model = tiny_model(seed=0)
    model.config._name_or_path = str(tmp_path / "other")
    trainer = make_trainer(model, tmp_path / "run", kl_estimator="exact")
    for mine, ref in zip(model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(mine, ref)
        assert mine.data_ptr() != ref.data_ptr()
        assert not ref.requires_grad
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.state.log_history[2]["kl"] > 1e-4


def test_none_measures_without_a_penalty(model_path: str, tmp_path: Path) -> None:
    """placement none trains exactly as stock at beta 0, and logs the KL all the same."""
    measured = make_trainer(model_path, tmp_path / "a", kl_placement="none", beta=0.0, kl_monitor=["exact", "k1"])
    measured.train()
    stock = GRPOTrainer(
        model_path,
        digit_reward,
        GRPOConfig(str(tmp_path / "b"), **{**SETTINGS, "beta": 0.0}),
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
    )
    stock.train()
    for a, b in zip(measured.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert {"kl/exact", "kl/k1", "kl/exact_se"} <= set(measured.state.log_history[2])


def test_beta_zero_without_monitor_builds_no_reference(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, beta=0.0)
    assert trainer.ref_model is None
    trainer.train()
    assert not any(name.startswith("kl") for name in trainer.state.log_history[0])


def test_evaluation_reports_the_held_out_kl(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_estimator="exact", kl_placement="both")
    drift(trainer.model)
    metrics = trainer.evaluate()
    trainer_log = trainer.state.log_history[-1]
    assert trainer_log["eval_kl/exact"] > 0
    assert trainer_log["eval_kl/sequence_se"] > 0
    assert "eval_reward" in trainer_log
    assert "eval_loss" in metrics


def test_exact_kl_agrees_with_sampled_kl_within_its_error(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_placement="none", beta=0.0, kl_monitor=["k1", "k3", "exact"])
    drift(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(20):
        inputs = rollout(trainer)
        with torch.no_grad():
            trainer._compute_loss(trainer.model, inputs)
    trainer.kl.end_step()
    metrics = trainer.kl.metrics("train")
    for name in ("k1", "k3"):
        assert abs(metrics[f"kl/{name}"] - metrics["kl/exact"]) < 4 * metrics[f"kl/{name}_se"]


def test_the_samplers_own_log_probs_weight_the_kl(model_path: str, tmp_path: Path) -> None:
    """mu is the inference engine where TRL has its log-probs; a NaN there falls back to the trainer's."""
    trainer = make_trainer(model_path, tmp_path, loss_type="bnpo")
    drift(trainer.model)
    inputs = rollout(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    with torch.no_grad():
        logps = dense_logits(trainer.model, inputs).log_softmax(-1)
        logps = logps.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    trained = logps + 0.2 * uniform(logps.shape, seed=1)
    inputs["old_per_token_logps"] = trained  # the trainer's own scores of the sampler
    engine = logps - 0.3 * uniform(logps.shape, seed=0)
    engine[0, 0] = torch.nan
    loss = trainer._compute_loss(trainer.model, {**inputs, "sampling_per_token_logps": engine})
    weights = (logps - torch.where(engine.isnan(), trained, engine)).exp()
    mask = inputs["completion_mask"].bool()
    k3 = kl_estimate(logps, inputs["ref_per_token_logps"], "k3")
    torch.testing.assert_close(loss, 0.2 * (weights * k3)[mask].mean(), rtol=1e-4, atol=1e-6)
    trainer.metrics.settle("train")
    assert trainer._metrics["train"]["kl/weight_max"][-1] == pytest.approx(float(weights[mask].max()), rel=1e-4)
    assert 0.5 < trainer._metrics["train"]["kl/ess"][-1] < 1.0


def keep_scorings(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    """Count TRL's scoring passes."""
    stock = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self: GRPOTrainer, model: torch.nn.Module, *args, **kwargs):
        calls.append(model)
        return stock(self, model, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("exact", "both")])
def test_kl_in_the_reward_shares_trls_own_scoring(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, placement: str
) -> None:
    """Where TRL scores the policy itself, no third pass; the credit is the one of a pass of our own."""
    options = {"kl_estimator": estimator, "kl_placement": placement}
    credits, passes = [], []
    for number, iterations in enumerate((1, 2)):  # TRL keeps old log-probs where a rollout feeds two steps
        trainer = make_trainer(model_path, tmp_path / str(number), num_iterations=iterations, **options)
        drift(trainer.model)
        calls: list = []
        keep_scorings(monkeypatch, calls)
        torch.manual_seed(0)
        inputs = rollout(trainer)
        monkeypatch.undo()
        assert ("old_per_token_logps" in inputs) == (iterations == 2)
        credits.append(inputs["kl_credit"])
        passes.append(len(calls))
    assert passes == [2, 2]
    assert credits[0].abs().max() > 1e-3
    torch.testing.assert_close(*credits, rtol=1e-4, atol=1e-6)


def test_logged_weights_are_untruncated_and_those_of_the_loss_capped(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, loss_type="bnpo", kl_is_cap=1.05)
    drift(trainer.model)
    inputs = rollout(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    with torch.no_grad():
        logps = dense_logits(trainer.model, inputs).log_softmax(-1)
        logps = logps.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    noise = uniform(logps.shape, seed=1) - 0.5
    inputs["old_per_token_logps"] = logps + noise
    mask = inputs["completion_mask"].bool()
    loss = trainer._compute_loss(trainer.model, inputs)
    weights = (-noise).exp()
    k3 = kl_estimate(logps, inputs["ref_per_token_logps"], "k3")
    torch.testing.assert_close(loss, 0.2 * (weights.clamp(max=1.05) * k3)[mask].mean(), rtol=1e-4, atol=1e-6)
    trainer.metrics.settle("train")
    assert trainer._metrics["train"]["kl/weight_max"][-1] == pytest.approx(float(weights[mask].max()), rel=1e-4)


def test_controller_moves_beta_and_beta_moves_the_loss(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_controller="pid", kl_target=1e-4, max_steps=6)
    trainer.train()
    betas = [entry["kl/coef"] for entry in trainer.state.log_history if "kl/coef" in entry]
    assert betas[0] == 0.2
    assert betas[-1] > betas[1]  # far above its target, the KL raises beta
    assert trainer.beta == trainer.kl.coef > betas[-1]


def test_resume_continues_beta_controller_and_metrics(model_path: str, tmp_path: Path) -> None:
    """Six steps in one go, and three, a checkpoint, three more: the same betas, KL and weights."""
    options = {
        "kl_estimator": "exact",
        "kl_placement": "both",
        "kl_controller": "pid",
        "kl_target": 0.01,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_trainer(model_path, tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    half = make_trainer(model_path, tmp_path / "half", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert half.kl.controller.state_dict() == whole.kl.controller.state_dict()
    assert half.beta == whole.beta
    for name in ("kl", "kl/coef", "kl/sequence", "loss"):
        mine = [entry[name] for entry in half.state.log_history if name in entry]
        assert mine == [entry[name] for entry in whole.state.log_history if name in entry], name
    for a, b in zip(whole.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_without_a_token_that_counts(model_path: str, tmp_path: Path) -> None:
    """Every answer cut short and masked: no KL is logged, no controller moves, no gradient is NaN."""
    options = {"mask_truncated_completions": True, "max_completion_length": 1, "kl_estimator": "exact"}
    options |= {"kl_placement": "both", "kl_controller": "pid", "kl_target": 0.1}
    trainer = make_trainer(model_path, tmp_path, **options, generation_kwargs={"suppress_tokens": [0, 1]})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert all(value is not None and value == value for entry in logs for value in entry.values())
    assert not any(name.startswith("kl/k") or name == "kl" for entry in logs for name in entry)
    assert trainer.beta == 0.2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_spoilt_state_file_is_named_and_refused(model_path: str, tmp_path: Path) -> None:
    options = {"kl_controller": "pid", "kl_target": 0.01, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(model_path, tmp_path, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    assert state["controller"]["kind"] == "pid"
    reason = "not a readable controller state"
    for content in ("{", "[]", json.dumps({**state, "controller": {"kind": "pid"}}), json.dumps({"budget": [0, 0]})):
        (checkpoint / STATE_FILE).write_text(content)
        with pytest.raises(ValueError, match=reason) as error:
            make_trainer(model_path, tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))
        assert str(checkpoint / STATE_FILE) in str(error.value)


def test_resume_takes_settings_from_the_recipe(model_path: str, tmp_path: Path) -> None:
    """Gains, target and the length of a schedule may change; what the controller had learnt stays."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    pid = {**options, "kl_controller": "pid", "kl_target": 0.01, "kl_ki": 0.0}
    first = make_trainer(model_path, tmp_path / "pid", **pid)
    first.train()
    checkpoint = str(tmp_path / "pid" / "checkpoint-2")
    resumed = make_trainer(model_path, tmp_path / "pid", **{**pid, "kl_target": 5.0, "kl_kp": 0.1, "max_steps": 3})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.kl.controller.target == 5.0
    assert resumed.kl.controller.kp == 0.1
    assert resumed.kl.controller.readings == 3
    assert resumed.beta < first.beta  # the KL is now far below its target
    fixed = make_trainer(model_path, tmp_path / "pid", **{**options, "beta": 0.7, "max_steps": 3})
    fixed.train(resume_from_checkpoint=checkpoint)
    assert fixed.beta == 0.7
    linear = {**options, "kl_controller": "linear", "kl_coef_end": 0.1}
    make_trainer(model_path, tmp_path / "linear", **linear).train()
    longer = make_trainer(model_path, tmp_path / "linear", **{**linear, "max_steps": 4})
    longer.train(resume_from_checkpoint=str(tmp_path / "linear" / "checkpoint-2"))
    assert longer.beta == pytest.approx(0.1)
    assert longer.kl.controller.total == 4


def test_train_again_starts_the_schedule_again(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_controller="linear", kl_coef_end=0.01)
    trainer.train()
    trainer.train()
    betas = [entry["kl/coef"] for entry in trainer.state.log_history if "kl/coef" in entry]
    assert betas == pytest.approx([0.2, 0.2 - 0.19 / 3, 0.2 - 0.38 / 3])


def test_two_trainers_on_one_model_have_references_of_their_own(tmp_path: Path) -> None:
    """A reference copied from a model that an exact-KL trainer has used does not follow that model."""
    model = tiny_model(seed=0)
    make_trainer(model, tmp_path / "first", kl_estimator="exact").train()
    second = make_trainer(model, tmp_path / "second")
    second.train()
    logs = [entry["kl"] for entry in second.state.log_history if "kl" in entry]
    assert logs[0] == pytest.approx(0.0, abs=1e-6)
    assert logs[2] > 1e-3


@pytest.mark.xfail(
    TRL_VERSION >= Version("1.16"), strict=True, reason="TRL's own add_fused_lm_head binds its forward to the original"
)
def test_a_snapshot_of_the_policy_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(seed=0)
    trainer = make_trainer(model, tmp_path, kl_estimator="exact")
    snapshot = copy.deepcopy(model)
    ids = torch.arange(3, 9, device=DEVICE).unsqueeze(0)
    before = snapshot(input_ids=ids).logits
    trainer.train()
    torch.testing.assert_close(snapshot(input_ids=ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_exact_kl_knows_how_architectures_transform_logits(family: str, tmp_path: Path) -> None:
    """Gemma's softcap and Cohere's logit scale: value equals the dense one from the model's own logits."""
    model = tiny_family(family)
    trainer = make_trainer(model, tmp_path, kl_estimator="exact", temperature=0.8, loss_type="bnpo")
    drift(trainer.model)
    inputs = rollout(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, inputs)
        logits, ref_logits = (dense_logits(model, inputs, 0.8) for model in (trainer.model, trainer.ref_model))
    wanted = 0.2 * exact_kl(logits, ref_logits)[inputs["completion_mask"].bool()].mean()
    assert float(wanted) > 1e-4
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-7)


def test_forward_direction_is_named_and_steered_by_the_reverse_kl(model_path: str, tmp_path: Path) -> None:
    options = {"kl_estimator": "exact", "kl_direction": "forward", "kl_controller": "pid", "kl_target": 0.1}
    trainer = make_trainer(model_path, tmp_path, **options)
    trainer.train()
    entry = trainer.state.log_history[2]
    assert entry["kl"] == entry["kl/exact_forward"] != entry["kl/k3"]
    assert "kl/exact" not in entry
    assert entry["kl/error"] == pytest.approx(entry["kl/k3"] - 0.1)


def test_budget_stops_with_a_checkpoint(model_path: str, tmp_path: Path) -> None:
    options = {"beta": 1e-4, "kl_budget": 0.05, "max_steps": 50, "save_strategy": "steps", "save_steps": 1000}
    trainer = make_trainer(model_path, tmp_path, **options)
    trainer.train()
    assert 1 < trainer.state.global_step < 50
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / STATE_FILE).exists()
    warned = make_trainer(model_path, tmp_path / "warn", **{**options, "kl_budget_action": "warn", "max_steps": 8})
    warned.train()
    assert warned.state.global_step == 8
    assert warned.kl.budget.exceeded


@pytest.mark.parametrize("rows", [None, {"level": [1, 2, 3, 4]}], ids=["no dataset", "no prompts"])
def test_an_environment_may_make_the_prompts(tmp_path: Path, rows: dict | None) -> None:
    class Sums:
        def reset(self, **kwargs: object) -> str:
            return "1+2="

        def add(self, a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: one number
                b: the other
            """
            return a + b

        def get_reward(self) -> float:
            return 1.0

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = Path(trl.__file__).parent.joinpath("chat_templates", "qwen3.jinja").read_text()
    trainer = KLXGRPOTrainer(
        tiny_model(),
        args=KLXGRPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        train_dataset=None if rows is None else Dataset.from_dict(rows),
        processing_class=tokenizer,
        environment_factory=Sums,
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/Sums/mean"] == 1.0
    assert trainer.state.log_history[0]["kl/sequences"] == 8


def test_a_sampled_credit_computes_no_exact_kl(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact KL that is only monitored is computed in the loss; the credit of k1 has no use for it."""
    settings = {"kl_estimator": "k1", "kl_placement": "reward", "kl_monitor": ["k1", "exact"]}
    trainer = make_trainer(model_path, tmp_path, **settings, max_steps=1)
    asked, exact_kl_of = [], trainer._exact.exact_kl

    def counted(*args, **kwargs):
        asked.append(args)
        return exact_kl_of(*args, **kwargs)

    monkeypatch.setattr(trainer._exact, "exact_kl", counted)
    trainer.train()
    assert len(asked) == 1  # the loss of the one micro-batch
