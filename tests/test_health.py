"""Health alarms in real, tiny runs of GRPO and DPO: each provoked by the settings that it is about, and silence else.

PPO's are in test_health_ppo.py.
"""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.device import PLAIN
from support.tiny import Arguments, digit_reward, drift, save_tiny, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import PROBE
from support.tiny_dpo import make_trainer as dpo_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import kl_estimate
from trl_klx.monitor.health.alarms import HEALTH_FILE, HealthCallback, HealthMonitor, HealthSources
from trl_klx.trainers.grpo.batch import health_metrics, hidden_mask, loss_mask, with_cut_answers
from trl_klx.trainers.report.outcome import health_lines
from trl_klx.trainers.shared.engine import cut_ratios
from trl_klx.trainers.shared.health import SCORING_NOISE, coarsest_precision, reference_mismatches

GRPO = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 8,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "beta": 0.2,
    **PLAIN,
}


def grpo_trainer(folder: Path, *, reward: Any = digit_reward, trainer: type = KLXGRPOTrainer, **settings) -> Any:
    config = KLXGRPOConfig(str(folder), **{**GRPO, **settings})
    data = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
    return trainer(tiny_model(), reward, config, **data)


def share_of_h(completions: list[str], **kwargs: Any) -> list[float]:
    return [text.count("h") / 16 for text in completions]


def always_half(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.5 for _ in completions]


def perturb(reference: torch.nn.Module) -> None:
    """Make the reference another model."""
    drift(reference.requires_grad_(True))
    reference.requires_grad_(False)


def events(folder: Path) -> list[dict]:
    path = folder / HEALTH_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alarms(folder: Path) -> dict[str, dict]:
    """The first event of each alarm."""
    return {event["alarm"]: event for event in reversed(events(folder)) if "ends" not in event}


def logged(trainer: Any) -> set[str]:
    """Alarms that were ever logged."""
    names = {name for entry in trainer.state.log_history for name in entry}
    return {name.removeprefix("health/") for name in names if name.startswith("health/")}


def test_runaway_and_mode_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reward that one letter earns, a huge learning rate and no KL to speak of."""
    settings = {"learning_rate": 0.1, "beta": 1e-6, "max_steps": 12, "max_completion_length": 16}
    trainer = grpo_trainer(tmp_path, reward=share_of_h, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = alarms(tmp_path)
    assert logged(trainer) == set(found) == {"runaway", "mode_collapse"}
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert "entropy at most" in found["mode_collapse"]["evidence"]
    warnings = [record.getMessage() for record in caplog.records if "Health alarm" in record.getMessage()]
    assert len(warnings) == len([event for event in events(tmp_path) if "ends" not in event])
    for name, event in found.items():
        assert sum(f"at step {event['step']}: {name}. {event['evidence']}." in text for text in warnings) == 1
        begin = event["step"]
        assert history[begin][f"health/{name}"] == 1.0
        assert f"health/{name}" not in history[begin - 1]  # quiet until it begins
    last_three = [history[step] for step in range(found["runaway"]["step"] - 2, found["runaway"]["step"] + 1)]
    seen = f"at least {min(e['kl/k3'] for e in last_three):.3g} nats per token"
    assert seen in found["runaway"]["evidence"]
    assert all(entry["kl/sequence"] > 20 for entry in last_three)


def test_runaway_from_a_target(tmp_path: Path) -> None:
    """A controller that may not raise beta."""
    settings = {"kl_controller": "pid", "kl_target": 0.01, "kl_coef_max": 0.2, "learning_rate": 1e-2}
    trainer = grpo_trainer(tmp_path, **settings)
    trainer.train()
    event = alarms(tmp_path)["runaway"]
    assert "times its target" in event["evidence"]
    assert "beta 0.2" in event["evidence"]
    assert "kl_coef_max" in event["remedy"]
    assert logged(trainer) == {"runaway"}


def test_runaway_from_a_groups_target(tmp_path: Path) -> None:
    settings = {"kl_controller": "pid", "kl_group_column": "answer", "kl_target": 0.001, "learning_rate": 1e-2}
    grpo_trainer(tmp_path, **settings, kl_group_targets={"1": 100.0}).train()
    evidence = alarms(tmp_path)["runaway"]["evidence"]
    assert evidence.startswith("kl_groups/")
    assert not evidence.startswith("kl_groups/1:")
    assert "target 0.001" in evidence


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_runaway_of_one_group(unit: str) -> None:
    """Each group has its own target; the KL of the whole says nothing about them."""
    watch = monitor(target_unit=unit, coef_max=lambda: 9.0)
    heard = []
    for step in range(1, 6):
        groups = {"a": 0.1, "b": 0.4 if step > 1 else 0.1}
        logs = {f"kl_groups/{group}/{unit}": kl for group, kl in groups.items() if (step, group) != (3, "b")}
        logs |= {
            f"kl_groups/{group}/{name}": value for group in groups for name, value in (("target", 0.1), ("coef", 1))
        }
        heard += watch.read({"step": step, "kl/sequence": 99.0, "kl/k3": 9.0, "kl/coef": 1.0, **logs})
    (event,) = heard  # at steps 2, 4 and 5: of step 3 there is no answer of the group
    assert (event["alarm"], event["step"]) == ("runaway", 5)
    assert event["evidence"].startswith("kl_groups/b: the KL is at least 4 times its target (threshold 3)")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"reward": always_half, "beta": 1000.0}, "rewards do not differ"),
        ({"learning_rate": 1e-9}, "steps are too small"),
        ({"beta": 1000.0, "learning_rate": 1e-4}, "the KL outweighs the reward"),
    ],
)
def test_collapse(tmp_path: Path, options: dict, cause: str) -> None:
    trainer = grpo_trainer(tmp_path, max_steps=65, logging_steps=5, warmup_steps=5, **options)
    trainer.train()
    event = alarms(tmp_path)["collapse"]
    assert event["step"] == 60  # 50 steps after the first reading since the warm-up, which is of step 10
    assert cause in event["cause"]
    assert "the gain went from" in event["evidence"]
    assert logged(trainer) == {"collapse"}


def test_wrong_reference_of_grpo(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, max_steps=4, logging_steps=2)
    perturb(trainer.ref_model)
    trainer.train()
    (event,) = events(tmp_path)
    first = trainer.state.log_history[0]
    assert (event["alarm"], event["step"]) == ("wrong_reference", 2)
    assert f"{first['kl/start']:.2g} nats per token" in event["evidence"]
    assert "threshold 0.0001: scoring noise of float32" in event["evidence"]
    assert [entry["health/wrong_reference"] for entry in trainer.state.log_history if "loss" in entry] == [1.0, 1.0]


@pytest.mark.parametrize("options", [{}, PROBE])
def test_wrong_reference_of_dpo(tmp_path: Path, options: dict) -> None:
    """By the probe, or by the log-ratios of the pairs."""
    trainer = dpo_trainer(tiny_model(), tmp_path, learning_rate=1e-4, **options)
    perturb(trainer.ref_model)
    trainer.train()
    assert events(tmp_path)[0]["alarm"] == "wrong_reference"
    assert f"threshold {'0.0001' if options else '0.014'}" in events(tmp_path)[0]["evidence"]


def test_reference_of_another_tokenizer_vocabulary_and_template(tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["xyz"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(other)
    path = save_tiny(tmp_path / "policy")
    reference = AutoModelForCausalLM.from_pretrained(other)
    trainer = dpo_trainer(path, tmp_path / "run", ref_model=reference, max_steps=1)
    trainer.train()
    (event,) = events(tmp_path / "run")
    assert (event["alarm"], event["step"]) == ("wrong_reference", 0)  # before the first step
    for words in ("tokens are different", "another chat template", "answers end with token 1, those of the reference"):
        assert words in event["evidence"]


def test_which_references_mismatch(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    policy, same, larger = tiny_model().config, tiny_model().config, tiny_model(vocab=30).config
    policy.name_or_path = save_tiny(tmp_path / "policy")
    assert reference_mismatches(policy, same, tokenizer) == []
    (sentence,) = reference_mismatches(policy, larger, tokenizer)
    assert "23 entries and the reference's 30" in sentence
    # Rows beyond the tokenizer are padding: the same tokens are the same vocabulary.
    larger.name_or_path = save_tiny(tmp_path / "larger", vocab=30)
    assert reference_mismatches(policy, larger, tokenizer) == []
    same.name_or_path = str(tmp_path / "nowhere")
    assert reference_mismatches(policy, same, tokenizer) == []


def test_precision_that_explains_the_noise() -> None:
    model = tiny_model()
    plain, bf16 = SimpleNamespace(mixed_precision="no"), SimpleNamespace(mixed_precision="bf16")
    assert coarsest_precision([model], plain) == "float32"  # type: ignore[arg-type]
    assert coarsest_precision([model], bf16) == "bfloat16"  # type: ignore[arg-type]
    assert coarsest_precision([model, tiny_model().half()], plain) == "float16"  # type: ignore[arg-type]
    assert coarsest_precision([tiny_model().bfloat16(), model], plain) == "bfloat16"  # type: ignore[arg-type]
    assert list(SCORING_NOISE.values()) == sorted(SCORING_NOISE.values())


def test_bf16_noise_is_no_wrong_reference(tmp_path: Path) -> None:
    """A reference in float32 and a policy in bf16: another rounding, and no other model."""
    trainer = grpo_trainer(tmp_path, max_steps=1, bf16=True)
    trainer.model.to(torch.bfloat16)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["kl/start"] < SCORING_NOISE["bfloat16"]
    assert events(tmp_path) == []


class FromAnEngine(KLXGRPOTrainer):
    """Answers whose engine says that it sampled them with other log-probs."""

    noise = 2.0

    def _generate_and_score_completions(self, inputs: Any) -> dict:
        output = super()._generate_and_score_completions(inputs)
        ref_logps = output["ref_per_token_logps"]  # the policy's, as long as it does not move
        generator = torch.Generator().manual_seed(self.state.global_step)
        output["sampling_per_token_logps"] = ref_logps + self.noise * torch.randn(ref_logps.shape, generator=generator)
        return output


class FromAnEngineNearby(FromAnEngine):
    noise = 0.4


@pytest.mark.parametrize(
    ("trainer", "evidence"), [(FromAnEngine, "of the samples effective"), (FromAnEngineNearby, "sampler and trainer")]
)
def test_stale_sampler(tmp_path: Path, trainer: type, evidence: str) -> None:
    made = grpo_trainer(tmp_path, trainer=trainer, learning_rate=1e-6, max_steps=4)
    made.train()
    (event,) = events(tmp_path)
    assert (event["alarm"], event["step"]) == ("stale_sampler", 3)
    assert evidence in event["evidence"]
    entry = made.state.log_history[0]
    assert (entry["kl/ess"] < 0.5) == (trainer is FromAnEngine)
    assert entry["kl/sampler"] > 0.02


def test_sampler_kl_is_of_the_sampler_against_the_trainer(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, trainer=FromAnEngine)
    inputs = one_rollout(trainer)
    inputs["sampling_per_token_logps"][0, 0] = torch.nan  # a token that the engine could not score
    trainer._compute_loss(trainer.model, inputs)
    trained, engine, mask = (
        inputs[name] for name in ("ref_per_token_logps", "sampling_per_token_logps", "completion_mask")
    )
    expected = kl_estimate(engine, trained, "k3")[mask.bool() & ~engine.isnan()].mean()
    found = trainer.kl.metrics("train")
    assert found["kl/sampler"] == pytest.approx(float(expected), rel=1e-4)
    assert 0 < found["kl/sampler_se"] < 10 * found["kl/sampler"]


@pytest.mark.parametrize(
    ("mode", "low", "high", "cut", "of"),
    [
        ("token_mask", None, 1.5, 3, 6),
        ("token_truncate", 0.5, 1.5, 4, 6),
        ("sequence_mask", None, 3.0, 1, 2),
        ("sequence_truncate", 0.9, 4.1, 1, 2),
        ("sequence_mask", None, None, 0, 2),
    ],
)
def test_which_of_trls_ratios_are_cut(mode: str, low: float | None, high: float | None, cut: int, of: int) -> None:
    """Token by token or answer by answer; padding does not count, and what the engine could not score is not cut."""
    ratios = torch.tensor([[2.0, 2.0, 1.0, 9.0], [2.0, 0.4, 9.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    engine = -ratios.log()
    engine[1, 2] = torch.nan
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    names = ("mode", "clip_min", "clip_max")
    args = SimpleNamespace(
        **{f"vllm_importance_sampling_{name}": value for name, value in zip(names, (mode, low, high), strict=True)}
    )
    found = cut_ratios(torch.zeros(3, 4), engine, mask, args)
    assert (int(found.outside), int(found.all)) == (cut, of)


def one_rollout(trainer: Any) -> dict[str, Tensor]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in tiny_dataset(2).to_list() for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


CUT = {"mask_truncated_completions": True, "max_completion_length": 4}


def test_hidden_kl(tmp_path: Path) -> None:
    """Most answers are cut off and masked; the policy moves on the others, and with them on all."""
    trainer = grpo_trainer(tmp_path, learning_rate=2e-2, beta=1e-3, max_steps=10, **CUT)
    trainer.train()
    event = alarms(tmp_path)["hidden_kl"]
    assert "lies on tokens that the loss mask leaves out" in event["evidence"]
    assert "mask_truncated_completions" in event["remedy"]
    entry = next(entry for entry in trainer.state.log_history if entry["step"] == event["step"])
    assert entry["kl/masked_share"] > 0.5
    assert entry["completions/clipped_ratio"] > 0.5


def test_kl_of_cut_answers_is_their_real_one(tmp_path: Path) -> None:
    """TRL scores a masked answer without seeing it; what is looked at is the KL of the answer as it is."""
    trainer = grpo_trainer(tmp_path, **CUT)
    drift(trainer.model)
    inputs = one_rollout(trainer)
    cut = ~inputs["completion_mask"].bool().any(1)
    assert 0 < cut.sum() < len(cut)
    trainer._compute_loss(trainer.model, inputs)
    found = trainer._health_metrics()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    answers = with_cut_answers(inputs["completion_mask"], inputs["completion_ids"], 0)
    assert (answers.sum(1)[cut] == 4).all()
    mask = torch.cat([inputs["prompt_mask"], answers], 1)
    logps = []
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, inputs["prompt_ids"].size(1) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1))
    k3 = kl_estimate(*logps, "k3")
    hidden, seen = float(k3[cut].sum()), float(k3[inputs["completion_mask"].bool()].sum())
    assert found["kl/masked"] == pytest.approx(hidden / len(cut), rel=1e-4)
    assert found["kl/masked_share"] == pytest.approx(hidden / (hidden + seen), rel=1e-4)


def test_rounding_has_no_share() -> None:
    """Before the first update the KL is what float32 leaves of 0, and depends on the processor and the batch."""
    rounding = {"seen": 7e-13, "hidden": 1e-13, "answers": 12.0}
    assert health_metrics(rounding, behind_mask=True)["kl/masked_share"] == 0
    more = {**rounding, "hidden": 3e-3, "seen": 1e-3}
    assert health_metrics(more, behind_mask=True)["kl/masked_share"] == pytest.approx(0.75)


def test_looking_behind_the_mask_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for health in (True, False):
        trainer = grpo_trainer(tmp_path, kl_health=health, kl_estimator="exact", **CUT)
        drift(trainer.model)
        torch.manual_seed(0)
        loss = trainer._compute_loss(trainer.model, one_rollout(trainer))
        gradients.append(torch.autograd.grad(loss, list(trainer.model.parameters())))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    for mine, without in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, without, rtol=1e-4, atol=1e-7)


def test_what_the_mask_hides() -> None:
    """Rows: finished, cut off, finished with a tool's output in the middle."""
    inputs = {
        "completion_ids": torch.tensor([[5, 6, 1, 0], [5, 0, 7, 8], [5, 9, 9, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]),
    }
    assert hidden_mask(inputs, 0).tolist() == [4 * [False], 4 * [True], 4 * [False]]
    inputs["tool_mask"] = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert not hidden_mask(inputs, 0).any()  # tools made what TRL says that they made
    # An engine's log-probs tell: it sampled the first token of the last answer, and all of the one that is cut off but
    # its second token.
    engine = torch.tensor([[-1.0, -1, -1, 0], [-1, 0, torch.nan, -1], [-1, 0, -1, -1]])
    hidden = hidden_mask({**inputs, "sampling_per_token_logps": engine}, 0)
    assert hidden.tolist() == [4 * [False], [True, False, True, True], [True, False, False, False]]
    assert not (hidden & loss_mask(inputs).bool()).any()


def unbalanced(rows: int = 32) -> Dataset:
    """The chosen answer says the same thing as often as it can."""
    long = ["a" * (4 + i % 5) for i in range(rows)]
    return Dataset.from_dict({"prompt": [f"{i % 10}=" for i in range(rows)], "chosen": long, "rejected": ["b"] * rows})


def test_length_bias(tmp_path: Path) -> None:
    data = {"train_dataset": unbalanced(), "eval_dataset": unbalanced(20)}
    settings = {"per_device_train_batch_size": 16, "max_steps": 12, "kl_coef": 0.0, **PROBE}
    trainer = dpo_trainer(tiny_model(), tmp_path, **data, **settings)
    trainer.train()
    event = alarms(tmp_path)["length_bias"]
    assert "the pairs prefer longer answers" in event["cause"]
    entry = next(e for e in trainer.state.log_history if e["step"] == event["step"])
    assert f"chosen answers have {entry['length/chosen']:.3g} tokens" in event["evidence"]
    assert entry["length/rejected"] == 2.0  # the letter and the end
    assert "wrong_reference" not in logged(trainer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pair_statistics_are_those_of_the_pairs(tmp_path: Path, accumulation: int) -> None:
    """Correlation and slope over all pairs of a step, by other means. At a learning rate of 0 the policy stays."""
    size = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = dpo_trainer(tiny_model(), tmp_path, max_steps=1, learning_rate=0.0, beta=0.3, **size)
    drift(trainer.model)
    trainer.train()
    entry = trainer.state.log_history[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    ratios = []
    for model, sign in ((trainer.model, 1), (trainer.ref_model, -1)):
        with torch.no_grad():
            logps = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        ratios.append(sign * (logps.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1) * mask).sum(1))
    chosen, rejected = sum(ratios).chunk(2)
    chosen_length, rejected_length = mask.sum(1).float().chunk(2)
    margin, difference = chosen - rejected, chosen_length - rejected_length
    assert entry["log_ratio/margin"] == pytest.approx(float(margin.mean()), rel=1e-4)
    pair = torch.stack([margin, difference])
    assert entry["length/margin_correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), rel=1e-3)
    slope = torch.cov(pair)[0, 1] / difference.var()
    assert entry["length/margin_slope"] == pytest.approx(float(slope), rel=1e-3)
    assert entry["length/chosen"] == pytest.approx(float(chosen_length.mean()))
    distance = (chosen.abs() / chosen_length + rejected.abs() / rejected_length).mean() / 2
    assert entry["log_ratio/start"] == pytest.approx(float(distance), rel=1e-3)


def test_few_pairs_wait_for_more(tmp_path: Path) -> None:
    trainer = dpo_trainer(tiny_model(), tmp_path, max_steps=8)  # four pairs a step
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "length/chosen" in e] == [4, 8]
    assert [e["step"] for e in trainer.state.log_history if "log_ratio/start" in e] == [1]


def test_probe_measures_length_and_entropy(tmp_path: Path) -> None:
    trainer = dpo_trainer(tiny_model(), tmp_path, max_steps=1, **PROBE)
    batches = trainer._probe.sample(trainer.model, 0)
    for batch in batches:
        trainer._probe.values(trainer.model, trainer.ref_model, nullcontext, batch, trainer.reference)
    with torch.no_grad():
        logps = [
            trainer.model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits[:, :-1].log_softmax(-1)
            for b in batches
        ]
    surprise = torch.cat(
        [
            -every.gather(-1, b.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)[b.target_mask]
            for every, b in zip(logps, batches, strict=True)
        ]
    )
    metrics = trainer._probe.answer_metrics()
    assert metrics["probe/entropy"] == pytest.approx(float(surprise.mean()), rel=1e-4)
    assert metrics["probe/mean_length"] == pytest.approx(len(surprise) / 6)  # PROBE's prompts
    assert trainer._probe.answer_metrics() == {}


class Ends(KLXGRPOTrainer):
    """No answer is cut off."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        answers, logprobs = super()._generate_single_turn(*args, **kwargs)
        return [[*ids[:-1], self._tokenizer.eos_token_id] for ids in answers], logprobs


def quiet(trainer: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert logged(trainer) == set()
    assert not (folder / HEALTH_FILE).exists()
    assert "Health" not in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.02},
        {"kl_estimator": "k1", "kl_placement": "reward", "num_iterations": 2},
        {"kl_placement": "none", "beta": 0.0},
        {"beta": 0.0},  # no reference at all
        {"bf16": True},
        {"mask_truncated_completions": True, "trainer": Ends},
    ],
    ids=str,
)
def test_a_healthy_grpo_run_is_silent(tmp_path: Path, options: dict, caplog: pytest.LogCaptureFixture) -> None:
    quiet(grpo_trainer(tmp_path, max_steps=12, **options), tmp_path, caplog)


@pytest.mark.parametrize("options", [{}, {**PROBE, "kl_coef": 0.5}], ids=["plain", "probed"])
def test_a_healthy_dpo_run_is_silent(tmp_path: Path, options: dict, caplog: pytest.LogCaptureFixture) -> None:
    trainer = dpo_trainer(tiny_model(), tmp_path, max_steps=12, learning_rate=1e-3, **options)
    quiet(trainer, tmp_path, caplog)


def test_switched_off(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, kl_health=False, max_steps=4, logging_steps=2, **CUT)
    perturb(trainer.ref_model)
    trainer.train()
    assert logged(trainer) == set()
    assert events(tmp_path) == []
    assert not {"kl/start", "kl/masked"} & set(trainer.state.log_history[0])
    assert not any(isinstance(callback, HealthCallback) for callback in trainer.callback_handler.callbacks)


def test_a_resumed_run_remembers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The alarms of six steps and of three, a checkpoint and three more are the same, and are told once."""
    settings = {"kl_controller": "pid", "kl_target": 0.01, "kl_coef_max": 0.2, "learning_rate": 1e-2}
    settings |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 1}
    whole = grpo_trainer(tmp_path / "whole", **settings)
    perturb(whole.ref_model)
    whole.train()
    expected = events(tmp_path / "whole")
    assert [event["alarm"] for event in expected] == ["wrong_reference", "runaway"]
    for stop in (expected[1]["step"] - 1, expected[1]["step"] + 1):
        resumed = grpo_trainer(tmp_path / "resumed", **settings)
        perturb(resumed.ref_model)
        (tmp_path / "resumed").mkdir(exist_ok=True)
        (tmp_path / "resumed" / HEALTH_FILE).write_text("{}\n")  # of steps that the checkpoint does not have
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert events(tmp_path / "resumed") == expected
        told = [record.getMessage() for record in caplog.records if "Health alarm" in record.getMessage()]
        assert len(told) == (stop < expected[1]["step"])
        for name in ("health/runaway", "health/wrong_reference", "kl/start"):
            columns = [
                [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]
                for trainer in (whole, resumed)
            ]
            assert columns[0] == columns[1]


def monitor(**changes: Any) -> HealthMonitor:
    fields = {"per_token": "kl/k3", "target_unit": "token", "gain": "reward", "entropy": "entropy", "coef_name": "beta"}
    fields |= {"noise": 1e-4, "precision": "float32"}
    return HealthMonitor(HealthSources(**{**fields, **changes}))


def test_an_alarm_ends_after_several_good_readings_and_may_begin_again() -> None:
    watch = monitor()
    shares = [0.9, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9]
    heard, metrics = [], []
    for step, share in enumerate(shares, start=1):
        heard += watch.read({"step": step, "kl/masked_share": share, "kl/masked": 1.0})
        metrics.append(watch.metrics().get("health/hidden_kl"))
        assert watch.read({"step": step, "eval_kl/masked_share": 0.0}) == []  # an evaluation is no reading
    assert [(event["step"], event.get("ends", False)) for event in heard] == [(3, False), (6, True), (12, False)]
    assert metrics == [None, None, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_numbers_that_are_none_are_left_out() -> None:
    watch = monitor()
    heard = [watch.read({"step": step, "kl/ess": ess}) for step, ess in enumerate((0.4, None, 0.3, float("nan"), 0.2))]
    assert [[event["alarm"] for event in found] for found in heard] == [[], [], [], [], ["stale_sampler"]]


def test_entropy_of_a_batch_without_tokens_is_no_entropy() -> None:
    """TRL logs 0 there."""
    watch = monitor()
    watch.read({"step": 1, "entropy": 2.0, "kl/sequence": 11.0})
    for step in range(2, 9):
        assert watch.read({"step": step, "entropy": 0.0}) == []
    assert watch._readings("entropy") == [(1, 2.0)]


def test_trackers_get_the_metrics(tmp_path: Path) -> None:
    """The callback comes first, and the others see what it adds; so does the history that checkpoints keep."""
    trainer = grpo_trainer(tmp_path, max_steps=1)
    assert isinstance(trainer.callback_handler.callbacks[0], HealthCallback)
    callback = HealthCallback(HealthSources("kl/k3", "token", "reward", "entropy", "beta", 1e-4, "float32"))
    args, state = TrainingArguments(str(tmp_path / "run"), use_cpu=True), TrainerState()
    callback.on_train_begin(args, state, TrainerControl())
    (tmp_path / "run").mkdir()
    state.global_step, logs = 1, {"kl/start": 1.0}
    state.log_history.append({**logs, "step": 1})
    callback.on_log(args, state, TrainerControl(), logs=logs)
    assert logs["health/wrong_reference"] == state.log_history[-1]["health/wrong_reference"] == 1.0
    summary = {"train_runtime": 1.0}
    callback.on_log(args, state, TrainerControl(), logs=summary)
    assert summary == {"train_runtime": 1.0}


def test_the_page_has_every_alarm_and_metric() -> None:
    page = (Path(__file__).parent.parent / "docs" / "health.md").read_text()
    for name in monitor()._verdicts():
        assert page.count(f"| `{name}`") >= 2, name  # its symptom, and when it begins
    for name in (
        "kl/start",
        "kl/sampler",
        "kl/ratio_cut",
        "kl/weight_cut",
        "kl/masked",
        "kl/masked_share",
        "log_ratio/start",
        "length/margin_slope",
    ):
        assert f"`{name}`" in page


def test_report_names_the_alarms(tmp_path: Path) -> None:
    assert health_lines(tmp_path, Arguments()) == ["no health alarms"]
    assert health_lines(tmp_path, Arguments(kl_health=False)) == ["health alarms are switched off (kl_health)"]
    begun = {"alarm": "runaway", "evidence": "the KL is 9", "cause": "haste", "remedy": "wait"}
    heard = [{"step": 3, **begun}, {"step": 6, "alarm": "runaway", "ends": True}, {"step": 9, **begun}]
    (tmp_path / HEALTH_FILE).write_text("".join(json.dumps(event) + "\n" for event in heard))
    told = "the KL is 9. Likely cause: haste. What to change: wait."
    assert health_lines(tmp_path, Arguments()) == [
        f"health alarm runaway at step 3: {told} (until step 6)",
        f"health alarm runaway at step 9: {told}",
    ]


def test_coef_max_is_the_controllers(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, kl_controller="pid", kl_target=0.1, max_steps=1)
    assert trainer.kl.coef_max is None  # not built yet
    trainer.kl.start(10)
    assert trainer.kl.coef_max == pytest.approx(20.0)
