"""Policies in 4 bits, with an adapter. `make test-qlora` runs this, with bitsandbytes itself."""

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from support.fault_tools import ALGORITHMS, make
from support.ppo_tools import classifier, first_rollout
from support.tiny import save_tiny, tiny_model
from support.tiny_dpo import batch
from test_grpo import rollout
from test_real_recipes import EVERY_STEP, RECIPES, SHORTER, SMALLER, algorithm_of, argv, places, varying_reward
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_klx import rewards
from trl_klx.kl import exact_kl
from trl_klx.run import dpo, grpo, ppo
from trl_klx.run.check.dry_run import make_plan
from trl_klx.trainers.reference.build import causal_lm
from trl_klx.trainers.shared.lifecycle import Lifecycle

__all__ = ["places"]  # a fixture
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
MODULES = {"grpo": grpo, "ppo": ppo, "dpo": dpo}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def packed(path: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """The model in 4 bits, computed in `dtype`."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **options)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model in float32, of the values that the packed weights stand for."""
    twin = tiny_model()
    layers, own = dict(twin.named_modules()), dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, bnb.nn.Params4bit):
                own[name].copy_(parameter)
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                layers[name].weight.copy_(bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
    return twin


def trainer(algorithm: str, folder: Path, model: Any, **changes: Any) -> Any:
    """A trainer whose policy has moved away from its reference, its adapter in float32."""
    if algorithm == "ppo":
        changes["value_model"] = classifier()
    options = {"peft_config": copy.deepcopy(LORA), "kl_report": False, "kl_health": False, **changes}
    made = make(algorithm, folder, model=model, **options)
    policy = made._saved_model
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora" in name and ".ref." not in name:
            nn.init.normal_(parameter, std=0.2)
    return made


def adapter(made: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made._saved_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_that_of_the_values_that_are_packed(algorithm: str, path: str, tmp_path: Path) -> None:
    """Losses, KL and steps of three steps, sampling and scoring in between, equal those of an ordinary model."""
    model = packed(path)
    twin = unpacked(model)
    runs = [
        trainer(algorithm, tmp_path / name, of, max_steps=3) for name, of in (("packed", model), ("unpacked", twin))
    ]
    first = adapter(runs[0])
    for made in runs:
        torch.manual_seed(0)
        made.train()
    histories = [[entry for entry in made.state.log_history if "loss" in entry] for made in runs]
    assert len(histories[0]) == 3
    watched = [name for name in histories[0][0] if name.startswith(("kl/", "loss", "grad_norm"))]
    assert {"kl/sequence", "kl/coef", "grad_norm"} <= set(watched)
    for ours, theirs in zip(*histories, strict=True):
        assert ours["kl/sequence"] > 0.1
        for name in watched:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    ours, theirs = map(adapter, runs)
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
        assert (found - first[name]).abs().max() > 1e-3, name


def dense(model: Any, dtype: torch.dtype, **inputs: Tensor) -> Tensor:
    """(B, L, V) logits in float64 of what the output head is given, in the precision in which it takes it."""
    head, given = causal_lm(model).get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(**inputs)
    handle.remove()
    return given[0].to(dtype).double() @ head.weight.to(dtype).double().T


def scored(made: Any, algorithm: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the models read of a batch that the trainer has measured, and the tokens that count, by their place."""
    if algorithm == "dpo":
        inputs = batch(made)
        made.compute_loss(made.model, dict(inputs))
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}, inputs["completion_mask"].bool()
    if algorithm == "grpo":
        inputs = rollout(made)
        made._compute_loss(made.model, inputs)
        names = ("ids", "mask")
        ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in names)
        empty = torch.zeros_like(inputs["prompt_mask"])
        return {"input_ids": ids, "attention_mask": mask}, torch.cat([empty, inputs["completion_mask"]], 1).bool()
    done = first_rollout(made)
    positions = (done.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": done.input_ids, "attention_mask": done.attention_mask, "position_ids": positions}
    before = torch.zeros_like(done.input_ids[:, : -done.length], dtype=torch.bool)
    return inputs, torch.cat([before, done.mask], 1)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16, prepared by PEFT"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_exact_kl_is_that_of_the_packed_policys_logits(
    algorithm: str, kind: str, path: str, tmp_path: Path
) -> None:
    """Also where `prepare_model_for_kbit_training` has cast norms, embedding and head to float32."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = packed(path, dtype)
    changes: dict[str, Any] = {"bf16": dtype == torch.bfloat16}
    if "PEFT" in kind:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert model.lm_head.weight.dtype == torch.float32
    if algorithm != "dpo":
        changes |= {"kl_estimator": "exact", "kl_placement": "loss", "temperature": 1.0}
    made = trainer(algorithm, tmp_path, model, **changes)
    inputs, counts = scored(made, algorithm)
    made._end_step()
    logged: dict[str, float] = {}
    made.log(logged)
    policy = made._saved_model.train()
    logits = dense(policy, dtype, **inputs)
    with policy.disable_adapter():
        ref_logits = dense(policy, dtype, **inputs)
    wanted = exact_kl(logits, ref_logits)[:, :-1][counts[:, 1:]].mean()
    assert wanted > 0.1
    tolerance = 1e-4 if dtype == torch.float32 else 5e-3  # layers in bfloat16 round batches of other sizes otherwise
    assert logged["kl/data_exact" if algorithm == "dpo" else "kl/exact"] == pytest.approx(float(wanted), rel=tolerance)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_the_adapter_moves(algorithm: str, path: str, tmp_path: Path) -> None:
    made = trainer(algorithm, tmp_path, packed(path, torch.bfloat16), max_steps=2, bf16=True)
    policy, trained = made._saved_model, adapter(made)
    frozen = {name: t.clone() for name, t in policy.state_dict().items() if name not in trained}
    assert any("absmax" in name for name in frozen)
    assert all("lora_" in name for name in trained)
    made.train()
    for name, tensor in policy.state_dict().items():
        if name in frozen:
            assert torch.equal(tensor, frozen[name]), name
        else:
            assert not torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_saved_is_what_was_trained(algorithm: str, path: str, tmp_path: Path) -> None:
    made = by_path(algorithm, tmp_path / "run", path, max_steps=2)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    base = packed(path, torch.bfloat16, bnb_4bit_use_double_quant=False)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    names = {name: p.dtype for name, p in made._saved_model.named_parameters() if "lora_" in name}
    assert set(names.values()) == {torch.float32 if algorithm == "ppo" else torch.bfloat16}
    for name, parameter in loaded.named_parameters():
        if name in names:
            assert parameter.dtype == torch.float32  # PEFT's choice
            parameter.data = parameter.data.to(names[name])
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model.train()(input_ids=ids).logits.float() for model in (made._saved_model, loaded))
        assert torch.equal(ours, theirs)
        with loaded.disable_adapter():
            assert not torch.equal(ours, loaded(input_ids=ids).logits.float())


def by_path(algorithm: str, folder: Path, path: str, **changes: Any) -> Any:
    """A trainer that loads the policy in 4 bits itself."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if algorithm == "ppo":
        changes["value_model"] = classifier()
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True, "kl_report": False, **changes}
    lora = {"peft_config": copy.deepcopy(LORA), "quantization_config": config}
    return make(algorithm, folder, model=path, **lora, **options)


@pytest.mark.parametrize("moves", [False, True], ids=["still reference", "moving reference"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_is_the_unbroken_one(algorithm: str, moves: bool, path: str, tmp_path: Path) -> None:
    reference = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5} if moves else {}
    steps = {"save_strategy": "steps", "save_steps": 2, **reference}
    whole = by_path(algorithm, tmp_path / "whole", path, max_steps=4, **steps)
    whole.train()
    resumed = by_path(algorithm, tmp_path / "resumed", path, max_steps=4, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    names = [name for name, _ in whole._saved_model.named_parameters() if "lora_" in name]
    assert any(".ref." in name for name in names) is moves
    ours, theirs = (dict(made._saved_model.named_parameters()) for made in (resumed, whole))
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name
    last = [made.state.log_history[-2:] for made in (resumed, whole)]
    ours, theirs = ({k: v for entry in entries for k, v in entry.items() if k.startswith("kl/")} for entries in last)
    assert ours == theirs


PATHS = [
    "qwen2.5-7b-qlora/grpo_exact_both_pid",
    "qwen2.5-1.5b-lora/ppo_k1_reward_pid",
    "qwen2.5-1.5b-lora/dpo_exact_loss",
]


@pytest.mark.parametrize("name", PATHS)
def test_two_steps_of_a_recipe(
    name: str, places: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe for QLoRA, and two others with load_in_4bit, on tiny models: all in bf16 and 4 bits, on the CPU.

    What the dry run counts of the model is there, to the byte; what is frozen stays; and the banner says so.
    """
    recipe = RECIPES / f"{name}.yaml"
    algorithm = algorithm_of(recipe)
    changes = {**EVERY_STEP, "dtype": "bfloat16", "use_cpu": True, "load_in_4bit": True, "report_to": "none"}
    changes |= {"use_vllm": False} if algorithm == "grpo" else {}
    words = argv(recipe, places["tiny"], SMALLER[algorithm], SHORTER[algorithm], changes, {"output_dir": tmp_path})
    monkeypatch.setattr(rewards, "final_number", varying_reward)
    plan = make_plan(algorithm, words)
    assert [problem for problem in plan.problems if "prompts and a rollout takes" not in problem] == []
    seen: list[Any] = []
    train = Lifecycle.train

    def watched(made: Any, **options: Any) -> Any:
        seen.append(made)
        return train(made, **options)

    monkeypatch.setattr(Lifecycle, "train", watched)
    assert MODULES[algorithm].main(words) == 0
    policy, counted = seen[0]._saved_model, plan.models.policy
    assert counted.bits == 4
    assert held(policy) == counted.bytes
    assert sum(p.nbytes for p in policy.parameters() if p.requires_grad) == counted.trainable_bytes
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{counted.parameters:,} parameters, {counted.trainable:,} trained" in shown
    assert "frozen ones in 4 bits" in shown
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in history) == 2
    assert any("kl/sequence" in entry for entry in history) or algorithm == "dpo"


def held(model: nn.Module) -> int:
    """Bytes of the parameters, and of what packed ones need to be read."""
    scales = [p.quant_state for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    found = sum(p.nbytes for p in model.parameters())
    for state in scales:
        found += state.absmax.nbytes
        if state.nested:
            found += state.state2.absmax.nbytes + state.offset.nbytes
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_packed_head_is_refused(algorithm: str, path: str, tmp_path: Path) -> None:
    """transformers leaves the head as it is, unless it is told otherwise."""
    assert type(packed(path).lm_head) is nn.Linear
    model = packed(path, llm_int8_skip_modules=["norm"])
    with pytest.raises(ValueError, match=r"the output head is quantised \(a Linear4bit\).*skip_modules=\['lm_head'\]"):
        trainer(algorithm, tmp_path, model)


def test_a_policy_that_has_run_in_eval_mode_is_refused(path: str, tmp_path: Path) -> None:
    """Where the CPU has the instructions for it, bitsandbytes has then packed the weights in another way."""
    model = packed(path)
    model.model.layers[0].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"has run in eval mode .* has no gradient: load it again"):
        trainer("grpo", tmp_path, model)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_without_an_adapter_is_refused(algorithm: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is quantised, and no step can change such weights: pass a peft_config"):
        trainer(algorithm, tmp_path, packed(path), peft_config=None)
