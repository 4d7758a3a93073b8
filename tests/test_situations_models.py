"""What users do with models: adapters, frozen ones, noise, devices, quantised weights, compilation, architectures."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_tools import ALGORITHMS, make
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import tiny_model
from tiny_dpo import drift, make_trainer
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from trl_klx.trainers.trl_compat import FUSED_LM_HEAD

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
TWO = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(r=2, target_modules=TWO),
    "DoRA": LoraConfig(r=2, target_modules=TWO, use_dora=True),
    "LoRA on embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "LoRA and trainable tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "LoRA and modules to save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    "LoRA on parameters": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]),
    "PiSSA": LoraConfig(r=2, target_modules=TWO, init_lora_weights="pissa"),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=TWO),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "LoKr": LoKrConfig(r=2, target_modules=TWO),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=TWO),
    "FourierFT": FourierFTConfig(n_frequency=8, target_modules=TWO),
    "norms": LNTuningConfig(),
    "trainable tokens": TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"]),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3),
}
VIRTUAL_TOKENS = ("prompt tuning", "p-tuning")
EXACT = {"kl_estimator": "exact", "kl_placement": "loss"}


def adapted(kind: str, *, name: str = "default") -> PeftModel:
    """The tiny model with an adapter that is not as it was made."""
    config = copy.deepcopy(ADAPTERS[kind])
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(3)
    policy = get_peft_model(tiny_model(), config, adapter_name=name)
    drift(policy)
    return policy


def policy_of(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return getattr(model, "policy", model)


@torch.no_grad()
def logits(model: nn.Module, adapter: str | None = None) -> Tensor:
    """As they are; or those of the named adapter."""
    model.eval()
    if adapter is None:
        return model(input_ids=IDS).logits
    with use_adapter(model, adapter):
        return model(input_ids=IDS).logits


def exact(algorithm: str) -> dict[str, Any]:
    return {} if algorithm == "dpo" else EXACT


@pytest.mark.situation("gives a policy with an adapter of any kind: its reference is that policy", "right")
@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        (algorithm, kind)
        for algorithm in ALGORITHMS
        for kind in ADAPTERS
        if algorithm != "dpo" or kind not in VIRTUAL_TOKENS or FUSED_LM_HEAD  # refused: see below
    ],
)
def test_reference_of_an_adapter_is_the_policy_as_given(algorithm: str, kind: str, tmp_path: Path) -> None:
    policy = adapted(kind)
    start, trained = logits(policy), [p for p in policy.parameters() if p.requires_grad]
    policy = policy_of(make(algorithm, tmp_path, model=policy, **exact(algorithm)))
    assert torch.equal(logits(policy), start)  # making the copy changed nothing
    assert torch.equal(logits(policy, "ref"), start)
    assert [p for p in policy.parameters() if p.requires_grad] == trained
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    assert not torch.allclose(logits(policy), start, atol=1e-3)
    assert torch.equal(logits(policy, "ref"), start)


@pytest.mark.situation("trains a PeftModel of prompt tuning or p-tuning with DPO", "refused")
@pytest.mark.parametrize("is_made_by_trainer", [False, True])
@pytest.mark.parametrize("kind", VIRTUAL_TOKENS if not FUSED_LM_HEAD else ())
def test_dpo_and_virtual_tokens(kind: str, is_made_by_trainer: bool, tmp_path: Path) -> None:
    """TRL below 1.16 scores the virtual tokens as if they were the prompt's."""
    given = adapted(kind)
    if is_made_by_trainer:
        model, more = tiny_model(), {"peft_config": given.peft_config["default"]}
    else:
        model, more = given, {}
    with pytest.raises(ValueError, match=r"virtual tokens.*trl>=1\.16"):
        make_trainer(model, tmp_path, **more)


@pytest.mark.situation("trains one model in three runs: each has a reference of its own", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_run_on_one_model_begins_at_its_own_reference(algorithm: str, tmp_path: Path) -> None:
    policy = adapted("LoRA on embeddings")
    for run in range(3):
        start = logits(policy)
        trainer = make(algorithm, tmp_path / str(run), model=policy, max_steps=2, **exact(algorithm))
        trainer.train()
        kl = [row["kl/exact"] for row in trainer.state.log_history if "kl/exact" in row]
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[1] > 1e-4
        policy = policy_of(trainer)
        assert torch.equal(logits(policy, "ref"), start)


@pytest.mark.situation("gives a policy that has an adapter of its own called ref", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_adapter_called_ref_is_not_taken(algorithm: str, tmp_path: Path) -> None:
    policy = adapted("LoRA")
    policy.add_adapter("ref", policy.peft_config["default"])
    with pytest.raises(ValueError, match=r"'ref' already.*delete_adapter"):
        make(algorithm, tmp_path, model=policy)
    assert "ref" in policy.peft_config
    if algorithm == "ppo":  # unless it is named as the reference
        assert make(algorithm, tmp_path, model=policy, ref_adapter_name="ref").ref_model is None


@pytest.mark.situation("trains an adapter that is not called default, beside others", "right")
@pytest.mark.parametrize("has_default", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reference_copies_the_active_adapter(algorithm: str, has_default: bool, tmp_path: Path) -> None:
    policy = adapted("LoRA", name="default" if has_default else "mine")
    if has_default:
        policy.add_adapter("mine", LoraConfig(r=3, target_modules=["o_proj"]))
        policy.set_adapter("mine")
        drift(policy, seed=7)
    start = logits(policy)
    trainer = make(algorithm, tmp_path, model=policy, max_steps=2, **exact(algorithm))
    assert set(policy_of(trainer).peft_config) == {"mine", "ref"} | ({"default"} if has_default else set())
    trainer.train()
    assert torch.equal(logits(policy_of(trainer), "ref"), start)
    assert not torch.allclose(logits(policy_of(trainer)), start, atol=1e-4)
    assert policy_of(trainer).active_adapters == ["mine"]


@pytest.mark.situation("freezes a part of the adapter: it stays frozen", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scoring_the_reference_frees_nothing(algorithm: str, tmp_path: Path) -> None:
    policy = adapted("LoRA")
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = make(algorithm, tmp_path, model=policy, max_steps=2, max_grad_norm=1e-3, **exact(algorithm))
    trainer.train()
    frozen = [p for name, p in policy_of(trainer).named_parameters() if "lora_A" in name]
    assert len(frozen) == 8  # those of the reference too
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


@pytest.mark.situation("trains the base model's biases with the adapter (bias: all)", "refused")
@pytest.mark.parametrize("is_made_by_trainer", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_biases_of_the_base_leave_no_reference(algorithm: str, is_made_by_trainer: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=TWO, bias="all", task_type="CAUSAL_LM")
    given = {"peft_config": config} if is_made_by_trainer else {"model": get_peft_model(tiny_model(), config)}
    with pytest.raises(ValueError, match=r"bias='all'.*bias='none'"):
        make(algorithm, tmp_path, **given)


@pytest.mark.situation("has the trainer make a PiSSA or OLoRA adapter, which changes the base model", "refused")
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_adapter_that_changes_the_base_is_made_by_the_user(algorithm: str, init: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=TWO, init_lora_weights=init, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' changes the base model.*get_peft_model"):
        make(algorithm, tmp_path, peft_config=config)
