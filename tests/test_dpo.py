"""KLXDPOTrainer: its options, the exact KL in the loss, the log-ratios, the probe, controllers and checkpoints."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.tiny import drift, save_tiny, tiny_model, tiny_tokenizer
from support.tiny_dpo import LORA, PROBE, SETTINGS, batch, loss_and_gradients, make_trainer, preferences
from torch import Tensor, nn
from transformers import GenerationConfig
from trl import DPOConfig

from trl_klx.config import KLArguments
from trl_klx.kl import exact_kl, kl_estimate
from trl_klx.trainers.dpo import config as dpo_config
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.dpo.pairs import pair_prompts
from trl_klx.trainers.dpo.probe import GumbelSampling, distinct_prompts
from trl_klx.trainers.dpo.trainer import KLXDPOTrainer
from trl_klx.trainers.session.session import STATE_FILE

pytestmark = pytest.mark.trl

PID = {"kl_controller": "pid", "kl_target": 0.01}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


# Options ------------------------------------------------------------------------------------------------------------

BAD = [  # options, what the sentence must contain
    ({"kl_estimator": "k1"}, "k1 is a likelihood difference"),
    ({"kl_estimator": "low_var_kl"}, "kl_estimator='k3' is refused for DPO"),
    ({"kl_estimator": "k2", "kl_coef": 0.1}, "use kl_estimator='exact'"),
    ({"kl_placement": "reward"}, "has no reward step"),
    ({"kl_placement": "both"}, "use 'loss', or 'none'"),
    ({"kl_credit": "immediate"}, "kl_credit='immediate' has no meaning for DPO"),
    ({"kl_importance_sampling": "token"}, "kl_importance_sampling='token' has no meaning for DPO"),
    ({"kl_is_mode": "mask"}, "takes no importance weight"),
    ({"kl_is_cap": 2.0}, "takes no importance weight"),
    ({"kl_is_answer_cap": 2.0}, "takes no importance weight"),
    ({"kl_is_veto": 0.1}, "takes no importance weight"),
    ({"kl_aggregation": "token"}, "kl_aggregation='token' has no meaning"),
    ({"kl_group_column": "task"}, "kl_group_column='task' has no meaning"),
    ({"allow_biased_kl": True}, "allow_biased_kl=True has no meaning"),
    ({"kl_coef": -0.1}, "kl_coef=-0.1 must be zero or more"),
    ({"kl_coef": "high"}, "kl_coef='high' must be a finite number"),
    ({"kl_coef": 0.1, "kl_placement": "none"}, "kl_coef=0.1 has no effect with kl_placement='none'"),
    ({"kl_value_cap": 1.0}, "kl_value_cap=1.0 bounds the value of the KL loss"),
    ({"kl_direction": "forward"}, "kl_direction='forward' has no effect at kl_coef=0"),
    ({"kl_direction": "forward", **PROBE, "kl_monitor": ["k1"]}, "add exact to kl_monitor"),
    ({"beta": 0.0}, "beta=0.0 must be more than zero"),
    ({"beta": -0.1}, "beta=-0.1 must be more than zero"),
    ({"beta": None}, "beta=None must be a finite number"),
    ({"kl_controls": "alpha"}, "kl_controls='alpha' does not exist"),
    ({"kl_controls": "beta"}, "kl_controller='fixed' sets nothing"),
    ({"kl_controller": "linear", "kl_coef_end": 0.1}, "give kl_coef a positive start"),
    ({**PID, "kl_coef": 0.1}, "set kl_probe_steps, or use 'linear' or 'cosine'"),
    ({**PID, "kl_controls": "beta"}, "kl_controller='pid' needs the policy's own KL"),
    ({**PID, **PROBE}, "give kl_coef a positive start"),
    ({**PID, **PROBE, "kl_controls": "beta", "kl_coef_min": 0.5}, "beta=0.1 must lie between kl_coef_min=0.5"),
    ({"kl_budget": 1.0}, "kl_budget=1.0 bounds the KL per sequence"),
    ({"kl_monitor": ["k1"]}, "kl_monitor=['k1'] names the estimators that the probe measures"),
    ({"kl_signal": "k1"}, "set kl_probe_steps, or remove it"),
    ({"log_completions": True}, "set kl_probe_steps, or remove it"),
    ({"kl_probe_prompts": 8}, "kl_probe_prompts=8 has no effect without a probe"),
    ({"kl_probe_max_new_tokens": 8}, "set kl_probe_steps, or remove it"),
    ({"kl_probe_steps": 0}, "kl_probe_steps=0 must be a whole number, 1 or more"),
    ({"kl_probe_steps": 2.5}, "kl_probe_steps=2.5 must be a whole number"),
    ({"kl_probe_steps": 2, "kl_probe_prompts": True}, "kl_probe_prompts=True must be a whole number"),
    ({"precompute_ref_log_probs": True, "kl_coef": 0.1}, "set it to false"),
    ({"precompute_ref_log_probs": True, "kl_placement": "none"}, "keeps no reference"),
    ({"precompute_ref_log_probs": True, "kl_probe_steps": 2}, "keeps no reference"),
    ({"use_liger_kernel": True, "kl_coef": 0.1}, "use_liger_kernel=true computes DPO's loss"),
    (
        {"use_liger_kernel": True, "kl_controls": "beta", "kl_controller": "linear", "kl_coef_end": 0.1},
        "nor a changing beta",
    ),
]


def config(folder: Path, **options: object) -> KLXDPOConfig:
    return KLXDPOConfig(str(folder), **{**SETTINGS, **options})


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=lambda value: str(value)[:60])
def test_one_sentence_each(tmp_path: Path, options: dict, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_config, "LIGER_COMPUTES_THE_LOSS", True)  # as up to TRL 1.14
    with pytest.raises(ValueError, match=r"\.$") as error:
        config(tmp_path, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_measured(tmp_path: Path) -> None:
    assert not config(tmp_path).kl_is_measured
    assert config(tmp_path).kl_logged_estimators == ()
    assert config(tmp_path, kl_placement="none").kl_on_data
    assert not config(tmp_path, kl_placement="none").kl_in_loss
    assert config(tmp_path, kl_coef=0.1).kl_logged_estimators == ()
    assert config(tmp_path, kl_coef=0.1).kl_needs_exact
    assert config(tmp_path, **PROBE).kl_logged_estimators == ("k1", "k3", "exact")
    assert config(tmp_path, **PROBE).kl_reading == "exact"
    assert config(tmp_path, **PROBE, kl_monitor=["k1"]).kl_logged_estimators == ("k1", "k3")
    assert not config(tmp_path, **PROBE, kl_monitor=["k1"]).kl_needs_exact
    assert config(tmp_path, **PROBE, kl_direction="forward").kl_reading == "k3"
    assert config(tmp_path, **PROBE, kl_monitor=["k1"], kl_signal="exact").kl_needs_exact


def test_config_survives_a_round_trip(tmp_path: Path) -> None:
    first = config(tmp_path, kl_coef=0.1, **PROBE)
    names = {
        name for name in KLXDPOConfig.__dataclass_fields__ if name in KLArguments.__dataclass_fields__ or "kl_" in name
    }
    again = config(tmp_path, **{name: getattr(first, name) for name in names})
    assert all(getattr(first, name) == getattr(again, name) for name in names)


def test_wrong_arguments_of_the_trainer(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="KLXDPOTrainer takes a KLXDPOConfig"):
        make_trainer(model_path, tmp_path, config=DPOConfig)
    with pytest.raises(ValueError, match="kl_probe_steps=2 samples answers to the prompts of eval_dataset"):
        make_trainer(model_path, tmp_path, eval_dataset=None, **PROBE)
    long = Dataset.from_dict({"prompt": ["12+34="], "chosen": ["1"], "rejected": ["2"]})
    short = Dataset.from_dict({"prompt": ["1"], "chosen": ["1"], "rejected": ["2"]})
    with pytest.raises(ValueError, match="every prompt alone fills max_length=2"):
        make_trainer(model_path, tmp_path, train_dataset=short, eval_dataset=long, max_length=2, **PROBE)
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match=r"lm_head"):
        make_trainer(model_path, tmp_path, peft_config=lora, kl_coef=0.1)


# The exact KL in the loss -------------------------------------------------------------------------------------------


def dense(model: nn.Module, inputs: dict) -> Tensor:
    """(2B, L-1, V) float64 logits by a plain forward of a model that no trainer has touched."""
    return model.double()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]


def data_kl(policy: nn.Module, reference: nn.Module, inputs: dict, direction: str = "reverse") -> Tensor:
    """The mean KL over the completion tokens, dense and in float64."""
    with torch.no_grad():
        ref_logits = dense(reference, inputs)
    return exact_kl(dense(policy, inputs), ref_logits, direction)[inputs["completion_mask"][:, 1:].bool()].mean()


def check_kl_loss(trainer: KLXDPOTrainer, policy: nn.Module, reference: nn.Module, **settings) -> None:
    """With kl_coef, loss and every gradient rise by those of kl_coef times the dense KL of fresh copies."""
    policy.load_state_dict(trainer.model.state_dict())
    inputs = batch(trainer)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.kl_coef = 0.0
    plain_loss, plain_gradients = loss_and_gradients(trainer, inputs)
    wanted = 0.7 * data_kl(policy, reference, inputs, **settings)
    wanted.backward()
    assert float(wanted.detach()) > 0.01
    assert float(loss - plain_loss) == pytest.approx(float(wanted.detach()), rel=1e-4)
    expected = {name: parameter.grad for name, parameter in policy.named_parameters() if name in gradients}
    assert len(expected) == len(gradients) > 0
    for name, gradient in gradients.items():
        found = (gradient - plain_gradients[name]).double()
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=3e-6, msg=name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tied", [False, True])
def test_kl_loss_equals_dense(tmp_path: Path, direction: str, tied: bool) -> None:
    path = save_tiny(tmp_path / "model", tied=tied)
    trainer = make_trainer(path, tmp_path, kl_coef=0.7, kl_direction=direction)
    drift(trainer.model)
    check_kl_loss(trainer, tiny_model(tied=tied), tiny_model(tied=tied), direction=direction)
    logged: dict[str, float] = {}
    trainer.log(logged)
    name = "kl/data_exact" if direction == "reverse" else "kl/data_exact_forward"
    other = {"kl/data_exact", "kl/data_exact_forward"} - {name}
    assert logged[name] > 0.01
    assert not other & set(logged)


def test_error_of_the_data_kl_counts_prompts(model_path: str, tmp_path: Path) -> None:
    """Of two micro-batches, the second with a prompt of the first: the linearised error of a ratio of sums
    over prompts, written out."""
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.7)
    drift(trainer.model)
    policy = tiny_model()
    policy.load_state_dict(trainer.model.state_dict())
    trainer.model.train()
    nats, tokens = [0.0] * 4, [0] * 4
    for inputs in [batch(trainer), {name: tensor[[1, 5]] for name, tensor in batch(trainer).items()}]:
        trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        mask = inputs["completion_mask"][:, 1:].bool()
        with torch.no_grad():
            per_token = exact_kl(dense(policy, inputs), dense(tiny_model(), inputs)).where(mask, 0.0)
        half = len(mask) // 2
        for prompt, row in zip((0, 1, 2, 3) if half == 4 else (1,), range(half), strict=True):
            nats[prompt] += float((per_token[row] + per_token[half + row]).sum())
            tokens[prompt] += int(mask[row].sum() + mask[half + row].sum())
    logged: dict[str, float] = {}
    trainer.log(logged)
    mean, count = sum(nats) / sum(tokens), len(nats)
    residuals = sum((s - mean * t) ** 2 for s, t in zip(nats, tokens, strict=True))
    error = (count / (count - 1) * residuals) ** 0.5 / sum(tokens)
    assert logged["kl/data_exact"] == pytest.approx(mean, rel=1e-4)
    assert logged["kl/data_exact_se"] == pytest.approx(error, rel=1e-3)


def test_peft_reference_is_the_model_without_its_adapter(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, peft_config=LoraConfig(**LORA), kl_coef=0.7, **PROBE)
    assert trainer.ref_model is None
    runs = count_forwards(trainer.model.get_base_model())
    check_kl_loss(trainer, get_peft_model(tiny_model(), LoraConfig(**LORA)), tiny_model())
    assert len(runs) == 4  # two losses, each with one run of the policy and one of the reference
    trainer.train()
    assert trainer.state.log_history[0]["kl/sequence"] > 0.01


def test_peft_reference_is_the_adapter_that_training_began_with(tmp_path: Path) -> None:
    """TRL keeps a copy of a trained adapter under the name ref."""
    torch.manual_seed(3)
    policy = get_peft_model(tiny_model(), LoraConfig(**LORA))
    start = copy.deepcopy(policy)
    trainer = make_trainer(policy, tmp_path, kl_coef=0.7, **PROBE)
    assert "ref" in trainer.model.peft_config
    assert trainer.evaluate()["eval_kl/exact"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.mul_(2.0)
    moved = copy.deepcopy(start)
    moved.add_adapter("ref", moved.peft_config["default"])
    check_kl_loss(trainer, moved, start)
    assert trainer.evaluate()["eval_kl/sequence"] > 0.01
    assert trainer.model.active_adapter == "default"


def count_forwards(model: nn.Module) -> list[int]:
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_value_cap_bounds_the_value_and_keeps_the_gradient(model_path: str, tmp_path: Path) -> None:
    found = []
    for options in ({}, {"kl_value_cap": 0.05}):
        trainer = make_trainer(model_path, tmp_path, kl_coef=0.7, **options)
        drift(trainer.model)
        found.append(loss_and_gradients(trainer, batch(trainer)))
        if options:
            trainer.metrics.settle("train")
            assert trainer._metrics["train"]["kl/loss"][0] <= 0.7 * 0.05 + 1e-7
        logged: dict[str, float] = {}
        trainer.log(logged)
        assert logged["kl/data_exact"] > 0.05  # measured without the cap
    assert found[1][0] < found[0][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-8)


def test_prompt_and_padding_never_count(model_path: str, tmp_path: Path) -> None:
    """Longer padding, and other tokens there, change neither loss nor gradients."""
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.7)
    drift(trainer.model)
    inputs = batch(trainer)
    loss, gradients = loss_and_gradients(trainer, inputs)
    padded = {
        name: nn.functional.pad(tensor, (0, 3)) if tensor.dim() == 2 else tensor for name, tensor in inputs.items()
    }
    padded["input_ids"][padded["attention_mask"] == 0] = 7
    again, padded_gradients = loss_and_gradients(trainer, padded)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_logged_kl_is_pooled_over_tokens(model_path: str, tmp_path: Path) -> None:
    """Evaluated in batches of 1 or 12, the KL at the data is the same: its token mean."""
    found = []
    for size in (1, 12):
        trainer = make_trainer(model_path, tmp_path, kl_placement="none", per_device_eval_batch_size=size)
        drift(trainer.model)
        found.append(trainer.evaluate()["eval_kl/data_exact"])
    inputs = batch(trainer, 12, trainer.eval_dataset)
    policy = tiny_model()
    policy.load_state_dict(trainer.model.state_dict())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(data_kl(policy, tiny_model(), inputs).item(), rel=1e-4)


def test_logged_names(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.3, kl_controller="pid", kl_target=0.02, **PROBE)
    trainer.train()
    logs = trainer.state.log_history[:3]
    names = {"kl", "kl/k1", "kl/k1_se", "kl/k3", "kl/k3_se", "kl/exact", "kl/exact_se", "kl/sequence", "kl/sequence_se"}
    names |= {"kl/target", "kl/error"}
    every_step = {"kl/coef", "kl/loss", "kl/data_exact", "log_ratio/chosen", "log_ratio/rejected", "log_ratio/margin"}
    assert names | every_step <= set(logs[0])
    assert not names & set(logs[1])  # no probe there
    assert every_step <= set(logs[1])
    assert logs[2]["kl"] == logs[2]["kl/exact"]
    assert logs[2]["kl/error"] == pytest.approx(logs[2]["kl"] - 0.02)
    assert logs[2]["kl/loss"] == pytest.approx(logs[2]["kl/coef"] * logs[2]["kl/data_exact"], rel=1e-5)
    assert all(value is not None and abs(value) < 1e6 for entry in logs for value in entry.values())


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence"])
def test_log_ratios(model_path: str, tmp_path: Path, divergence: str) -> None:
    """log pi(answer) - log ref(answer), summed over the answer, without beta and whatever the f-divergence."""
    trainer = make_trainer(model_path, tmp_path, f_divergence_type=divergence, beta=0.37)
    drift(trainer.model)
    inputs = batch(trainer)
    loss_and_gradients(trainer, inputs)
    policy, mask = tiny_model(), inputs["completion_mask"][:, 1:].bool()
    policy.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        gap = dense(policy, inputs).log_softmax(-1) - dense(tiny_model(), inputs).log_softmax(-1)
    ratios = gap.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1).masked_fill(~mask, 0.0).sum(-1)
    chosen, rejected = ratios.chunk(2)
    metrics = trainer._metrics["train"]
    assert metrics["log_ratio/chosen"][0] == pytest.approx(float(chosen.mean()), rel=1e-4)
    assert metrics["log_ratio/rejected"][0] == pytest.approx(float(rejected.mean()), rel=1e-4)
    assert metrics["log_ratio/margin"][0] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)


def test_outputs_are_returned_beside_the_loss(model_path: str, tmp_path: Path) -> None:
    """For compute_metrics; TRL 1.16 runs the policy once more for them."""
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.7)
    drift(trainer.model)
    inputs = batch(trainer)
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape
    assert torch.equal(loss, trainer.compute_loss(trainer.model, inputs))
    assert trainer.precompute_ref_logps is False


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 0.1, "gradient_checkpointing": True, "bf16": True, **PROBE},
        {"kl_coef": 0.1, "gradient_accumulation_steps": 2, "kl_controller": "cosine", "kl_coef_end": 0.01},
        {"precompute_ref_log_probs": True},
        {"kl_placement": "none", "loss_type": ["ipo", "sft"], "ld_alpha": 0.5},
        {"kl_coef": 0.1, "padding_free": True, "kl_direction": "forward", **PROBE},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_kind_of_configuration_trains(model_path: str, tmp_path: Path, options: dict) -> None:
    trainer = make_trainer(model_path, tmp_path, **options)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert logs[2]["log_ratio/margin"] > 0
    assert all(value is not None and abs(value) < 1e6 for entry in logs for value in entry.values())


def test_a_reference_that_follows_the_policy(model_path: str, tmp_path: Path) -> None:
    """sync_ref_model after every step, mixed in whole: the reference is the policy of the step before."""
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.1, **options)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["kl/data_exact"] == pytest.approx(0.0, abs=1e-6)


def test_reference_of_an_in_memory_policy_is_that_policy(tmp_path: Path) -> None:
    """TRL would reload the path in its config: here another model. The KL at step 0 must be 0."""
    save_tiny(tmp_path / "other", seed=5)
    model = tiny_model(seed=0)
    model.config._name_or_path = str(tmp_path / "other")
    trainer = make_trainer(model, tmp_path / "run", kl_coef=0.1, **PROBE)
    for mine, ref in zip(model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(mine, ref)
        assert mine.data_ptr() != ref.data_ptr()
        assert not ref.requires_grad
    trainer.train()
    for name in ("kl/exact", "kl/sequence", "kl/data_exact", "log_ratio/chosen"):
        assert trainer.state.log_history[0][name] == pytest.approx(0.0, abs=1e-5)
        assert abs(trainer.state.log_history[2][name]) > 1e-4
    # The next trainer's reference is a copy of its own: it does not follow the model that is trained.
    second = make_trainer(model, tmp_path / "second", **PROBE)
    second.train()
    assert second.state.log_history[0]["kl/exact"] == pytest.approx(0.0, abs=1e-5)
    assert second.state.log_history[2]["kl/exact"] > 1e-4


def test_a_reference_that_is_given(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, ref_model=tiny_model(seed=5), kl_coef=0.7)
    check_kl_loss(trainer, tiny_model(), tiny_model(seed=5))


# The probe ----------------------------------------------------------------------------------------------------------


def test_probe_measures_the_policys_own_kl(model_path: str, tmp_path: Path) -> None:
    """k1, k3, exact, token mean and sequence sum equal a dense computation on the sampled answers."""
    trainer = make_trainer(model_path, tmp_path, **PROBE)
    drift(trainer.model)
    metrics = trainer.evaluate()
    policy = tiny_model()
    policy.load_state_dict(trainer.model.state_dict())
    totals, tokens = dict.fromkeys(("k1", "k3", "exact"), 0.0), 0
    batches = trainer._probe.sample(trainer.model, 0)
    assert [len(part.prompts) for part in batches] == [4, 2]
    for part in batches:
        inputs = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
        with torch.no_grad():
            logits, ref_logits = dense(policy, inputs), dense(tiny_model(), inputs)
        ids, mask = part.input_ids[:, 1:, None], part.answer_mask[:, 1:].bool()
        logps, ref_logps = (x.log_softmax(-1).gather(-1, ids).squeeze(-1) for x in (logits, ref_logits))
        values = {name: kl_estimate(logps, ref_logps, name) for name in ("k1", "k3")}
        values["exact"] = exact_kl(logits, ref_logits)
        tokens += int(mask.sum())
        for name in totals:
            totals[name] += float(values[name][mask].sum())
    for name, total in totals.items():
        assert metrics[f"eval_kl/{name}"] == pytest.approx(total / tokens, rel=1e-4)
        assert metrics[f"eval_kl/{name}_se"] > 0
    assert metrics["eval_kl/sequence"] == pytest.approx(totals["exact"] / 6, rel=1e-4)
    assert metrics["eval_kl"] == metrics["eval_kl/exact"] > 0.01


def answers(trainer: KLXDPOTrainer, step: int = 0) -> dict[int, list[int]]:
    """Sampled answers by the number of their prompt."""
    found = {}
    for part in trainer._probe.sample(trainer.model, step):
        for ids, mask, number in zip(part.input_ids, part.answer_mask, part.prompts.tolist(), strict=True):
            found[number] = ids[mask.bool()].tolist()
    return found


def test_answers_end_with_their_end_token_and_prompts_do_not_count(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, **{**PROBE, "kl_probe_prompts": 64, "kl_probe_max_new_tokens": 6})
    prompts = distinct_prompts([trainer.eval_dataset], 64)
    assert len(prompts) == 10  # of twelve rows, two repeat a prompt
    assert prompts == [trainer.eval_dataset[i]["prompt_ids"] for i in range(10)]
    assert distinct_prompts([trainer.eval_dataset, trainer.eval_dataset], 4) == prompts[:4]
    ends = {1, 3, 4, 5}  # chat models have several
    trainer.model.generation_config.eos_token_id = sorted(ends)
    found = answers(trainer)
    assert sorted(found) == list(range(10))
    assert {1, 6} < {len(answer) for answer in found.values()}
    for answer in found.values():
        assert not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == 6
    for part in trainer._probe.sample(trainer.model, 0):
        for ids, mask, attended, number in zip(
            part.input_ids, part.answer_mask, part.attention_mask, part.prompts.tolist(), strict=True
        ):
            prompt = prompts[number]
            assert ids[: len(prompt)].tolist() == prompt
            assert mask[: len(prompt)].sum() == 0
            assert attended.sum() == len(prompt) + mask.sum()


def test_answers_are_the_policys_own_whatever_its_generation_config(model_path: str, tmp_path: Path) -> None:
    """No penalty, no truncation and no temperature of the model's own; and the model's config is given back."""
    trainer = make_trainer(model_path, tmp_path, **PROBE)
    plain = answers(trainer)
    assert any(len(set(answer)) > 2 for answer in plain.values())
    settings = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 4}
    settings |= {"suppress_tokens": [5, 6, 7, 8], "eos_token_id": 1, "max_new_tokens": 2, "num_beams": 3}
    odd = trainer.model.generation_config = GenerationConfig(**settings)
    assert answers(trainer) == plain
    assert trainer.model.generation_config is odd


def test_answers_depend_on_seed_step_and_prompt_alone(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, **PROBE)
    first = answers(trainer)
    state = torch.get_rng_state()
    assert answers(trainer) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(trainer, step=2) != first
    torch.manual_seed(99)
    one_by_one = make_trainer(model_path, tmp_path, per_device_eval_batch_size=1, **PROBE)
    assert answers(one_by_one) == first
    assert answers(make_trainer(model_path, tmp_path, seed=7, **PROBE)) != first
    trainer._probe._prompts = [trainer._probe._prompts[0]] * 6
    assert len(set(map(tuple, answers(trainer).values()))) > 3


def test_gumbel_sampling_is_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -torch.inf]])
    sampler, draws = GumbelSampling([3], torch.device("cpu")), 4000
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[sampler(torch.zeros(1, 1), logits).argmax()] += 1
    probs = logits[0].softmax(-1)
    errors = (counts / draws - probs).abs()
    assert (errors <= 4 * (probs * (1 - probs) / draws).sqrt()).all()


def test_probe_leaves_the_model_as_it_was(model_path: str, tmp_path: Path) -> None:
    checkpointing = {"use_reentrant": True, "preserve_rng_state": False}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    trainer = make_trainer(model_path, tmp_path, **options, **PROBE)
    trainer.model.gradient_checkpointing_enable(checkpointing)
    trainer.model.train()
    trainer._run_probe("train")
    assert trainer.model.training
    assert trainer.model.is_gradient_checkpointing
    assert trainer.model.model.layers[0]._gradient_checkpointing_func.keywords == checkpointing
    assert not trainer.model._forward_hooks
    trainer.model.eval()
    trainer._run_probe("eval")
    assert not trainer.model.training


def test_evaluation_probes_once(model_path: str, tmp_path: Path) -> None:
    """Also where eval_dataset is several: their prompts make one probe."""
    splits = {"a": preferences(4), "b": preferences(12)}
    trainer = make_trainer(model_path, tmp_path, eval_dataset=splits, eval_strategy="steps", eval_steps=2, **PROBE)
    assert trainer._probe._prompts == distinct_prompts([trainer.eval_dataset["b"]], 6)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_kl/sequence" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 3]
    trained = [entry for entry in trainer.state.log_history if "kl/sequence" in entry]
    assert [entry["step"] for entry in trained] == [1, 3]
    # Evaluated after two steps and probed before the third: the same policy, the same answers.
    assert evaluations[0]["eval_kl/sequence"] == trained[1]["kl/sequence"]


CHAT = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def test_conversational_data(model_path: str, tmp_path: Path) -> None:
    """The probe's prompts are TRL's, with the chat template's generation prompt at their end."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = preferences(12).to_list()
    for row in rows:
        row["prompt"] = [{"role": "h", "content": row["prompt"]}]
        for answer in ("chosen", "rejected"):
            row[answer] = [{"role": "a", "content": row[answer] + "<eos>"}]
    data = Dataset.from_list(rows)
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer}
    trainer = make_trainer(model_path, tmp_path, kl_coef=0.1, **PROBE, **options)
    ids = tokenizer("h" + preferences(1)[0]["prompt"] + "a")["input_ids"]
    assert trainer._probe._prompts[0] == ids
    trainer.train()
    assert trainer.state.log_history[2]["kl/sequence"] > 0


# Controllers, budget, checkpoints -----------------------------------------------------------------------------------


def coefs(trainer: KLXDPOTrainer) -> list[float]:
    return [entry["kl/coef"] for entry in trainer.state.log_history if "kl/coef" in entry]


@pytest.mark.parametrize("controls", ["kl_coef", "beta"])
def test_a_controller_moves_what_it_controls_once_per_probe(model_path: str, tmp_path: Path, controls: str) -> None:
    options = {**PID, "kl_target": 1e-4, **PROBE, "max_steps": 6, "kl_controls": controls, "beta": 0.2, "kl_coef": 0.2}
    trainer = make_trainer(model_path, tmp_path, gradient_accumulation_steps=2, **options)
    probes = []
    measure = trainer._run_probe
    trainer._run_probe = lambda mode: (probes.append(trainer.state.global_step), measure(mode))
    trainer.train()
    assert probes == [0, 2, 4]
    assert trainer.kl.controller.readings == 3
    found = coefs(trainer)
    assert found[0] == 0.2
    assert found[1] == found[2] <= 0.2  # the KL starts at 0, or where rounding leaves it, below its target
    assert found[3] == found[4] > found[1]
    assert trainer.kl.coef > found[4]
    moved, still = (trainer.beta, trainer.kl_coef) if controls == "beta" else (trainer.kl_coef, trainer.beta)
    assert moved == trainer.kl.coef
    assert still == 0.2
    for entry in trainer.state.log_history[:6]:
        beta = entry["kl/coef"] if controls == "beta" else 0.2
        assert entry["rewards/margins"] == pytest.approx(beta * entry["log_ratio/margin"], rel=1e-5)


@pytest.mark.parametrize("controls", ["kl_coef", "beta"])
@pytest.mark.parametrize("probe", [{}, PROBE], ids=["without a probe", "with a probe"])
def test_a_schedule_moves_at_every_step(model_path: str, tmp_path: Path, controls: str, probe: dict) -> None:
    options = {"kl_controller": "linear", "kl_coef_end": 0.1, "kl_controls": controls, "beta": 0.4, "kl_coef": 0.4}
    trainer = make_trainer(model_path, tmp_path, gradient_accumulation_steps=2, **options, **probe)
    trainer.train()
    assert coefs(trainer) == pytest.approx([0.4, 0.3, 0.2])
    assert (trainer.beta if controls == "beta" else trainer.kl_coef) == pytest.approx(0.1)
    trainer.train()
    assert coefs(trainer)[:3] == pytest.approx([0.4, 0.3, 0.2])  # starts again


@pytest.mark.parametrize("controls", ["kl_coef", "beta"])
def test_resume_continues_controller_probe_and_metrics(model_path: str, tmp_path: Path, controls: str) -> None:
    """Six steps in one go, and three, a checkpoint, three more: the same betas, KL and weights."""
    options = {**PID, **PROBE, "kl_controls": controls, "kl_coef": 0.3, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model_path, tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    torch.manual_seed(1234)
    half = make_trainer(model_path, tmp_path / "half", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert half.kl.controller.state_dict() == whole.kl.controller.state_dict()
    for name in ("kl", "kl/coef", "kl/k1", "kl/sequence", "kl/data_exact", "loss"):
        mine = [entry[name] for entry in half.state.log_history if name in entry]
        assert mine == [entry[name] for entry in whole.state.log_history if name in entry], name
    assert half.beta == whole.beta
    for a, b in zip(whole.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_budget_stops_with_a_checkpoint(model_path: str, tmp_path: Path) -> None:
    options = {"kl_budget": 0.05, "max_steps": 30, "save_strategy": "steps", "save_steps": 1000}
    trainer = make_trainer(model_path, tmp_path, **options, **PROBE)
    trainer.train()
    assert 1 < trainer.state.global_step < 30
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / STATE_FILE).exists()


def test_train_again_begins_with_a_probe(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, max_steps=1, **PROBE)
    for _ in range(2):
        trainer.train()
        assert "kl/sequence" in trainer.state.log_history[0]


def test_rows_of_one_prompt_have_one_number() -> None:
    """Whatever the padding and the answers; a prompt's tokens count by their places."""
    prompts = [[5], [5, 5], [5, 6], [6, 5], [5, 6], [0], [0, 0], [22] * 9, [5, 6, 0], list(range(9)), []]
    length = 14
    rows = [[*prompt, *range(7, 7 + 1 + place % 3)] for place, prompt in enumerate(prompts)]
    inputs = {
        "input_ids": torch.tensor([row + [3] * (length - len(row)) for row in rows] * 2),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows] * 2),
        "completion_mask": torch.tensor(
            [
                [int(len(prompt) <= i < len(row)) for i in range(length)]
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            * 2
        ),
    }
    numbers = pair_prompts(inputs)
    assert torch.equal(*numbers.chunk(2))
    assert numbers.double().long().equal(numbers)  # as statistics keep them
    same = [[prompt == other for other in prompts] for prompt in prompts]
    chosen = numbers[: len(prompts)]
    assert (chosen[:, None] == chosen).tolist() == same
    wider = {name: torch.nn.functional.pad(values, (0, 4)) for name, values in inputs.items()}
    assert torch.equal(pair_prompts(wider), numbers)
