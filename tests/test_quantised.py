"""QLoRA without bitsandbytes: what is refused before a model is loaded, and what a plan says."""

import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from support.fault_tools import make
from support.ppo_tools import classifier
from test_dry_run import ARGS
from test_situations_numbers import inputs, recipe, refusal

from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.check.layout import Layout
from trl_klx.run.check.memory import training_state
from trl_klx.run.explain import explain_command
from trl_klx.run.sources.named_models import Weights
from trl_klx.trainers.checks import packages

__all__ = ["inputs"]  # a fixture
FOUR: dict[str, Any] = {"load_in_4bit": True}
NO_ADAPTER = "is quantised, and no step can change such weights: set use_peft to true, to train an adapter on them."
WITH_LORA = {"use_peft": True, "lora_target_modules": ["all-linear"]}
NO_VALUE_MODEL = "the policy is quantised, and no value model can be copied from it: give value_model_path."
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", FOUR, f"the policy of load_in_4bit=True {NO_ADAPTER}"),
    ("dpo", {"load_in_8bit": True}, f"the policy of load_in_8bit=True {NO_ADAPTER}"),
    (
        "grpo",
        {"model_init_kwargs": {"quantization_config": FOUR}},
        f"the policy of model_init_kwargs {NO_ADAPTER}",
    ),
    ("ppo", {**FOUR, **WITH_LORA}, NO_VALUE_MODEL),
    (
        "grpo",
        {**FOUR, "load_in_8bit": True, **WITH_LORA},
        "load_in_4bit=True and load_in_8bit=True cannot both be: remove one of the two.",
    ),
    (
        "dpo",
        {**FOUR, **WITH_LORA, "dtype": "auto"},
        "load_in_4bit=True computes in dtype, and dtype='auto' names none: set it to bfloat16.",
    ),
]


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is missing; whatever is loaded then would fail."""
    monkeypatch.setattr(packages, "find_spec", lambda name: ModuleSpec(name, None, origin=name))


@pytest.mark.situation("quantises a policy in a way that cannot be trained", "refused")
@pytest.mark.parametrize(("algorithm", "fields", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_recipe(
    algorithm: str,
    fields: dict[str, Any],
    sentence: str,
    inputs: Path,
    tmp_path: Path,
    bitsandbytes: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    words = ["--config", str(recipe(inputs, tmp_path, algorithm, **fields))]
    assert make_plan(algorithm, words).problems == [sentence]
    capsys.readouterr()  # the data's progress bars
    assert refusal(algorithm, words, monkeypatch, capsys) == sentence


@pytest.mark.situation("starts from a model that is stored quantised, without an adapter", "refused")
def test_a_model_that_is_stored_quantised(inputs: Path, tmp_path: Path, bitsandbytes: None) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    path = recipe(inputs, tmp_path, "grpo", model_name_or_path=str(tmp_path / "model"))
    plan = make_plan("grpo", ["--config", str(path)])
    assert plan.problems == [f"the policy of model_name_or_path {NO_ADAPTER}"]
    assert plan.models is not None
    assert plan.models.policy.bits == 4


@pytest.mark.situation("quantises a policy in Python and gives no adapter", "refused")
@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "ppo"])
def test_python(algorithm: str, inputs: Path, tmp_path: Path) -> None:
    model, value = {"model": str(inputs / "model"), "quantization_config": FOUR}, {"value_model": classifier()}
    with pytest.raises(ValueError, match=r"policy of load_in_4bit=True .*: pass a peft_config, to train an adapter"):
        make(algorithm, tmp_path, **model, **value)


def test_ppo_needs_a_value_model_in_python(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no value model can be copied from it: give value_model"):
        make("ppo", tmp_path, model=str(inputs / "model"), quantization_config=FOUR)


SHARDED = (
    "shards 4-bit weights only if they are stored as the others are: set bnb_4bit_quant_storage to dtype, bfloat16."
)


@pytest.mark.situation("shards a policy in 4 bits", "refused")
@pytest.mark.parametrize(
    ("layout", "fields", "problem"),
    [
        ("fsdp2", FOUR, f"load_in_4bit=True: FSDP2, 8 processes {SHARDED}"),
        ("zero3", {**FOUR, "bnb_4bit_quant_storage": "uint8"}, SHARDED),
        ("fsdp2", {"load_in_8bit": True}, "cannot shard 8-bit weights: use load_in_4bit."),
        ("fsdp2", {**FOUR, "bnb_4bit_quant_storage": "bfloat16"}, None),
        ("zero2", FOUR, None),
    ],
    ids=str,
)
def test_sharding(
    layout: str, fields: dict[str, Any], problem: str | None, inputs: Path, tmp_path: Path, bitsandbytes: None
) -> None:
    path = recipe(inputs, tmp_path, "grpo", **fields, **WITH_LORA, dtype="bfloat16", accelerate_config=layout)
    words = ["--config", str(path), "--num_processes", "8"]
    found = [sentence for sentence in make_plan("grpo", words).problems if "-bit weights" in sentence]
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_packed_weights_are_shared_out_as_they_are() -> None:
    """1000 weights in 600 bytes, of which 40 are trained in float32; DeepSpeed trains those in half precision."""
    weights = Weights(1000, 600, 40, 160, 1, bits=4)
    held = [
        training_state(weights, ARGS, layout)[0].bytes
        for layout in (Layout("DEEPSPEED", 2, zero_stage=3), Layout("FSDP", 2, fsdp_version=2), Layout())
    ]
    assert held == [300, 300, 600]


def test_what_a_plan_and_explain_say(
    inputs: Path, tmp_path: Path, bitsandbytes: None, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(inputs, tmp_path, "grpo", **FOUR, **WITH_LORA, dtype="bfloat16", learning_rate=1e-5, beta=0.1)
    plan = make_plan("grpo", ["--config", str(path)])
    assert plan.models is not None
    policy = plan.models.policy
    assert policy.trainable_bytes == 2 * policy.trainable  # TRL's bfloat16
    assert plan.problems == []
    [warning] = plan.warnings
    assert warning.startswith("TRL casts an adapter on a quantised policy to bfloat16, in which steps of learning_rate")
    assert "set it to 4e-05 or more" in warning
    assert explain_command.main(["--config", str(path), "--algorithm", "grpo"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "load_in_4bit=true: the reference is the same 4-bit weights without the adapter." in said
