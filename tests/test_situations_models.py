"""What users do with models: adapters, frozen ones, noise, devices, quantised weights, compilation, architectures."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
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
from support.fault_tools import ALGORITHMS, make
from support.tiny import drift, tiny_model
from support.tiny_dpo import make_trainer
from torch import Tensor, nn
from transformers import (
    BartForCausalLM,
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTJForCausalLM,
    GraniteForCausalLM,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTForCausalLM,
    PegasusForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import use_adapter

from trl_klx.kl import exact_kl
from trl_klx.measure.passes.models import Scorer
from trl_klx.trainers.checks.noise import noise_of, without_noise
from trl_klx.trainers.checks.trainable import check_trainable
from trl_klx.trainers.exact.forward import ExactKLForward
from trl_klx.trainers.exact.head import call_as_forward, whole
from trl_klx.trainers.exact.tokens import AnswerTokens
from trl_klx.trainers.seams import FUSED_LM_HEAD

pytestmark = pytest.mark.trl

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


def hooked_model() -> PreTrainedModel:
    """As `device_map` leaves a model, with accelerate's hooks around each module; here every device is the CPU."""
    model = tiny_model()
    for module in (model, model.model, *model.model.layers, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return model


def kl_of_a_run(algorithm: str, folder: Path, model: Any, **more: Any) -> list[float]:
    """The exact KL of each step."""
    trainer = make(algorithm, folder, model=model, max_steps=2, **exact(algorithm), **more)
    trainer.train()
    return [row["kl/exact"] for row in trainer.state.log_history if "kl/exact" in row]


@pytest.mark.situation("spreads the model over devices (device_map) with the exact KL", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hooks_of_accelerate_change_nothing(algorithm: str, tmp_path: Path) -> None:
    plain = kl_of_a_run(algorithm, tmp_path / "plain", tiny_model())
    hooked = kl_of_a_run(algorithm, tmp_path / "hooked", hooked_model())
    assert hooked == pytest.approx(plain, rel=1e-5, abs=1e-9)
    assert plain[1] > 1e-3


def test_head_on_another_device_than_its_input() -> None:
    """The function that stands in for the head runs inside accelerate's hook, with the weights in place."""
    head = nn.Linear(4, 3)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    cpu_offload(head, "cpu")
    assert head.weight.is_meta
    seen = call_as_forward(head, lambda hidden: head.weight.sum() + hidden.sum(), torch.ones(2))
    assert seen.item() == pytest.approx(float(weight.sum()) + 2)
    assert head.weight.is_meta
    read = whole(head)
    assert torch.equal(read[0], weight)
    assert torch.equal(read[1], bias)


@pytest.mark.situation("gives a reference whose weights are offloaded, with the exact KL", "right")
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "grpo"])  # GRPO takes no reference
def test_an_offloaded_reference(algorithm: str, tmp_path: Path) -> None:
    plain = kl_of_a_run(algorithm, tmp_path / "plain", tiny_model(), ref_model=tiny_model(1))
    reference = cpu_offload(tiny_model(1), "cpu")
    reference.hf_device_map = {"model": "cpu", "lm_head": "disk"}  # as from_pretrained notes it
    if FUSED_LM_HEAD and algorithm == "dpo":
        with pytest.raises(ValueError, match="the output head of ref_model is offloaded"):
            make(algorithm, tmp_path / "offloaded", model=tiny_model(), ref_model=reference)
        return
    offloaded = kl_of_a_run(algorithm, tmp_path / "offloaded", tiny_model(), ref_model=reference)
    assert offloaded == pytest.approx(plain, rel=1e-5)
    assert plain[0] > 0.1


@pytest.mark.situation("compiles the model (torch_compile)", "right")
@pytest.mark.parametrize(("estimator", "has_adapter"), [("exact", False), ("exact", True), ("k3", True)])
def test_compiled_dpo_is_dpo(estimator: str, has_adapter: bool, tmp_path: Path) -> None:
    options = {"max_steps": 1, "kl_coef": 0.7 if estimator == "exact" else 0.0}
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        models = {"model": adapted("LoRA")} if has_adapter else {"model": tiny_model(), "ref_model": tiny_model(1)}
        trainer = make_trainer(folder=tmp_path, **models, **options, **compiled)
        trainer.train()
        runs.append(next(row for row in trainer.state.log_history if "loss" in row))
    for key in ("loss", "grad_norm", "log_ratio/margin"):
        assert runs[1][key] == pytest.approx(runs[0][key], rel=1e-4, abs=1e-6)


@pytest.mark.situation("compiles the model (torch_compile)", "right")
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "dpo"])
def test_compiled_exact_kl_is_the_exact_kl(algorithm: str, tmp_path: Path) -> None:
    plain = kl_of_a_run(algorithm, tmp_path / "plain", tiny_model())
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert kl_of_a_run(algorithm, tmp_path / "c", tiny_model(), **compiled) == pytest.approx(plain, rel=1e-4, abs=1e-7)


DECODER = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "d_model": 16}
COMMON = {"vocab_size": 23, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
HIDDEN = {"intermediate_size": 32, "num_key_value_heads": 1}
# Decoders that run past `base_model`, heads with a bias, tied ones, and logits that are scaled or capped.
ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "OPT": (OPTForCausalLM, {**LAYERS, "ffn_dim": 32, "word_embed_proj_dim": 8}),
    "BART": (BartForCausalLM, {**DECODER, "is_decoder": True}),
    "Pegasus": (PegasusForCausalLM, {**DECODER, "is_decoder": True}),
    "GPT-J, a head with a bias": (GPTJForCausalLM, GPT),
    "GPT-2, a tied head": (GPT2LMHeadModel, {**GPT, "n_positions": 64}),
    "Gemma 2, capped logits": (Gemma2ForCausalLM, {**LAYERS, **HIDDEN, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "Cohere, scaled logits": (CohereForCausalLM, {**LAYERS, **HIDDEN, "logit_scale": 0.25}),
    "Granite, divided logits": (GraniteForCausalLM, {**LAYERS, **HIDDEN, "logits_scaling": 4.0}),
    "Mamba": (MambaForCausalLM, {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}


def architecture(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model_class, shape = ARCHITECTURES[name]
    return model_class(model_class.config_class(**COMMON, **shape, initializer_range=0.3, init_std=0.3, **changes))


@pytest.mark.situation("takes the exact KL of a decoder of another architecture", "right")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_kl_of_architectures(name: str) -> None:
    policy, reference = architecture(name), architecture(name, seed=1)
    wanted = exact_kl(2.0 * policy.eval()(IDS).logits, 2.0 * reference.eval()(IDS).logits)
    forward = ExactKLForward(policy, reference, temperature=0.5, direction="reverse")
    forward.check()
    tokens = AnswerTokens.of(torch.ones(1, IDS.size(1) - 1))
    with forward.hidden_states(tokens) as ref_hidden:
        reference(IDS)
    with forward.exact_kl(policy, tokens, ref_hidden, with_grad=True) as found:
        policy(IDS)
    torch.testing.assert_close(found[0], wanted[:, :-1], rtol=1e-4, atol=1e-5)
    assert wanted.mean() > 0.1


@pytest.mark.situation("takes the exact KL to a reference that scales or caps its logits otherwise", "refused")
@pytest.mark.parametrize(
    ("name", "changes"),
    [("Gemma 2, capped logits", {"final_logit_softcapping": 30.0}), ("Cohere, scaled logits", {"logit_scale": 1.0})],
)
def test_exact_kl_refuses_another_transform_of_logits(name: str, changes: dict) -> None:
    policy, reference = architecture(name), architecture(name)
    for field, value in changes.items():
        setattr(reference.config, field, value)
    with pytest.raises(ValueError, match=r"scales its logits by .* the reference by .*use the checkpoint"):
        ExactKLForward(policy, reference, temperature=1.0, direction="reverse")


@pytest.mark.situation("takes the exact KL of a decoder of another architecture", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_exact_kl_of_opt_in_training(algorithm: str, tmp_path: Path) -> None:
    kl = kl_of_a_run(algorithm, tmp_path, architecture("OPT", dropout=0.0))
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[1] > 1e-5


class OddHead(Qwen3ForCausalLM):
    """Does more to its logits than its config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 3.0 * output.logits
        return output


class HiddenHead(Qwen3ForCausalLM):
    """Does not call its head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=nn.functional.linear(hidden, self.lm_head.weight))


@pytest.mark.situation("takes the exact KL of a model whose head does more than is known", "refused")
@pytest.mark.parametrize("model_class", [OddHead] if FUSED_LM_HEAD else [OddHead, HiddenHead])
def test_exact_kl_refuses_what_it_does_not_know_before_the_first_step(model_class: type, tmp_path: Path) -> None:
    model = model_class(tiny_model().config)
    with pytest.raises(ValueError, match=rf"{model_class.__name__}.*use kl_estimator k1, k2 or k3"):
        make("dpo", tmp_path, model=model)


@pytest.mark.situation("loads an adapter without is_trainable=True, or freezes the whole policy", "refused")
@pytest.mark.parametrize("frozen", ["adapter", "policy"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_frozen_policy_is_refused(algorithm: str, frozen: str, tmp_path: Path) -> None:
    if frozen == "adapter":
        adapted("LoRA").save_pretrained(tmp_path / "adapter")
        policy = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    else:
        policy = tiny_model().requires_grad_(False)
    remedy = "is_trainable=True" if frozen == "adapter" else "requires_grad_"
    with pytest.raises(ValueError, match=rf"no parameter of the policy requires a gradient.*{remedy}"):
        make(algorithm, tmp_path, model=policy).train()


@pytest.mark.situation("loads an adapter with is_trainable=True: it moves", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_adapter_moves(algorithm: str, tmp_path: Path) -> None:
    adapted("LoRA").save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    start = logits(policy)
    trainer = make(algorithm, tmp_path, model=policy, max_steps=1)
    trainer.train()
    assert not torch.allclose(logits(policy_of(trainer)), start, atol=1e-5)


@pytest.mark.situation("passes an optimizer of another model's parameters", "refused")
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "ppo"])
def test_an_optimizer_without_the_policy_is_refused(algorithm: str, tmp_path: Path) -> None:
    trainer = make(algorithm, tmp_path)
    trainer.optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter of the policy"):
        trainer.train()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.train()


@pytest.mark.situation("trains weights that device_map has offloaded", "refused")
def test_offloaded_weights_are_not_trained() -> None:
    policy = cpu_offload(tiny_model(), "cpu")
    policy.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"device_map has put.*device_map=None"):
        check_trainable(policy)


@pytest.mark.situation("adds NEFTune's noise to the embeddings", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_neftune_is_refused(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 adds noise.*remove it"):
        make(algorithm, tmp_path, neftune_noise_alpha=5.0)


NOISY = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3}


@pytest.mark.situation("trains a model with dropout, whatever transformers calls it, and disable_dropout", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_dropout_nothing_is_random(algorithm: str, tmp_path: Path) -> None:
    more = {} if algorithm == "ppo" else {"disable_dropout": True}
    kl = kl_of_a_run(algorithm, tmp_path, architecture("OPT", **NOISY), **more)
    assert kl[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.situation("has a router that jitters in training, and disable_dropout", "right")
def test_router_jitter_is_noise() -> None:
    shape = {**LAYERS, **HIDDEN, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**COMMON, **shape)).train()
    assert noise_of(model)["jitter_noise"] == 0.5
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    without_noise(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert not noise_of(model)


@pytest.mark.situation("trains with LoRA dropout in GRPO", "warned")
def test_dropout_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=TWO, lora_dropout=0.25, task_type="CAUSAL_LM")
    make("grpo", tmp_path, peft_config=config, max_steps=1).train()
    assert "is noisy in training (dropout 0.25)" in caplog.text
    assert "disable_dropout=true" in caplog.text


@pytest.mark.situation("trains an adapter on a base whose packed weights read as NaN (FSDP-QLoRA)", "right")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packed_weights_are_not_judged(algorithm: str, tmp_path: Path) -> None:
    """bitsandbytes keeps nibbles in bf16 where FSDP wants one dtype; no layer multiplies by them as they are."""
    model = tiny_model()
    model.packed = nn.Parameter(torch.full((4,), torch.nan, dtype=torch.bfloat16), requires_grad=False)
    trainer = make(algorithm, tmp_path, model=model, max_steps=1)
    trainer.train()
    assert trainer.guard.bad_weight(trainer.model) is None
    with torch.no_grad():
        next(policy_of(trainer).model.layers.parameters())[0] = torch.nan
    assert trainer.guard.bad_weight(trainer.model) is not None


@pytest.mark.situation("probes DPO's KL under FSDP1", "refused")
def test_fsdp1_leaves_nothing_to_sample_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_klx.trainers.dpo.trainer.is_flattened", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"kl_probe_steps=1 .*fsdp_version 2, DDP or DeepSpeed, or remove it"):
        make("dpo", tmp_path)


@pytest.mark.situation("adds NEFTune's noise to the embeddings in DPO without a KL on the data", "right")
def test_dpo_alone_may_have_neftune(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path, kl_coef=0.0, max_steps=1, neftune_noise_alpha=1.0)
    trainer.train()


@pytest.mark.situation("measures a model of another architecture", "right")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measure_knows_architectures(name: str) -> None:
    assert Scorer(architecture(name), temperature=1.0, name=name).vocab_size == 23
