"""`--dry_run`: counts equal real models, exact bytes equal real tensors, all problems are named, nothing is written."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from support.real_models import SHAPES, save_dataset, save_shape
from support.real_models import save_tiny as save_tiny_chat
from support.tiny import save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_klx.cli import commands as cli
from trl_klx.cli.words import CommandLine
from trl_klx.run import grpo
from trl_klx.run.check import machine
from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.check.layout import Layout, read_layout
from trl_klx.run.check.memory import EXACT, Memory, Part, training_state
from trl_klx.run.check.page import memory_sentence
from trl_klx.run.check.problems import count_rows
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.sources.named_models import Weights
from trl_klx.trainers.seams import FUSED_LM_HEAD

RECIPES = Path(__file__).parent.parent / "recipes"
ZERO3 = str(RECIPES / "accelerate" / "zero3.yaml")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    rows = [{"prompt": f"{i}+1=", "answer": "2"} for i in range(24)]
    pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 24
    for name, content in {"data": rows, "pairs": pairs, "no_answer": [{"prompt": "1+1="}]}.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def words(inputs: Path, tmp_path: Path, algorithm: str = "grpo", **changes: object) -> list[str]:
    fields = {
        "model_name_or_path": str(inputs / "model"),
        "dataset_name": str(inputs / ("pairs" if algorithm == "dpo" else "data")),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        **({} if algorithm == "dpo" else {"reward_funcs": ["trl_klx.rewards.exact_match"]}),
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not None}))
    return ["--config", str(path)]


# Counts and bytes

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}


# An adapter goes on a policy, and on no reward model.
COUNTED = [(name, False) for name in SHAPES] + [(name, True) for name in SHAPES if "Reward" not in name]


@pytest.mark.parametrize(("name", "lora"), COUNTED)
def test_counts_are_those_of_the_real_models(name: str, lora: bool, inputs: Path, tmp_path: Path) -> None:
    """Models that are really built, tied heads and adapters included, in float32 and in bfloat16."""
    path = save_tiny_chat(name, tmp_path / "model")
    auto = AutoModelForSequenceClassification if "Reward" in name else AutoModelForCausalLM
    for dtype in ("float32", "bfloat16"):
        real = auto.from_pretrained(path, dtype=dtype)
        if lora:
            real = get_peft_model(real, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        changes = {**(LORA if lora else {}), "model_name_or_path": path, "dtype": dtype}
        plan = make_plan("grpo", words(inputs, tmp_path, **changes))
        assert plan.models is not None
        every = list(real.parameters())
        trained = [p for p in every if p.requires_grad]
        assert plan.models.policy == Weights(
            sum(p.numel() for p in every),
            sum(p.numel() * p.element_size() for p in every),
            sum(p.numel() for p in trained),
            sum(p.numel() * p.element_size() for p in trained),
            len(trained),
        )
        assert plan.models.base.parameters == auto.from_pretrained(path).num_parameters()


def test_counts_of_ppos_models(tmp_path: Path, inputs: Path) -> None:
    value = save_tiny_chat("meta-llama/Llama-3.2-1B-Instruct", tmp_path / "value")
    reward = save_tiny_chat("Skywork/Skywork-Reward-V2-Qwen3-0.6B", tmp_path / "reward")
    plan = make_plan("ppo", words(inputs, tmp_path, "ppo", value_model_path=value, reward_model_path=reward))
    assert plan.models is not None and plan.models.value is not None and plan.models.reward is not None
    real_value = AutoModelForSequenceClassification.from_pretrained(value, num_labels=1)
    assert plan.models.value.parameters == plan.models.value.trainable == real_value.num_parameters()
    assert plan.models.reward.parameters == AutoModelForSequenceClassification.from_pretrained(reward).num_parameters()
    assert plan.models.reward.trainable == 0
    assert plan.models.reference is not None and plan.models.reference.parameters == tiny_model().num_parameters()
    assert plan.models.trained.trainable == plan.models.policy.trainable + plan.models.value.trainable


def bytes_after_a_step(model: nn.Module, optim: str) -> dict[str, int]:
    """Bytes of the real tensors: weights, gradients, and the optimizer's state after one step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1) if optim == "sgd" else torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    return {
        "weights": size(model.parameters()),
        "gradients": size([p.grad for p in trained if p.grad is not None]),
        "optimizer state": size(state),
    }


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("kind", ["full", "LoRA", "bfloat16"])
def test_the_exact_parts_are_the_bytes_of_real_tensors(kind: str, optim: str, inputs: Path, tmp_path: Path) -> None:
    model: nn.Module = tiny_model()
    changes: dict[str, object] = {"optim": optim}
    if kind == "LoRA":
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        changes |= LORA
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
        changes |= {"dtype": "bfloat16"}
    plan = make_plan("grpo", words(inputs, tmp_path, beta=0.1, **changes))
    assert plan.memory is not None
    exact = {part.name: part.bytes for part in plan.memory.parts if part.how == EXACT}
    reference = exact.pop("reference", 0)
    assert exact == {name: size for name, size in bytes_after_a_step(model, optim).items() if size}
    # The reference is the policy without its adapter, or a copy.
    assert reference == (0 if kind == "LoRA" else exact["weights"])


ARGS = SimpleNamespace(optim="adamw_torch", bf16=True, fp16=False)


@pytest.mark.parametrize(
    ("layout", "total"),
    [
        # 1000 parameters on 8 processes, in bytes: weights, gradients, optimizer with float32 weights
        (Layout("DEEPSPEED", 8, zero_stage=0), 2000 + 2000 + 12000),
        (Layout("DEEPSPEED", 8, zero_stage=1), 2000 + 2000 + 1500),
        (Layout("DEEPSPEED", 8, zero_stage=2), 2000 + 250 + 1500),
        (Layout("DEEPSPEED", 8, zero_stage=3), 250 + 250 + 1500),
        (Layout("DEEPSPEED", 8, zero_stage=2, offloads_optimizer=True), 2000 + 250),
        (Layout("DEEPSPEED", 8, zero_stage=3, offloads_optimizer=True, offloads_parameters=True), 250),
        (Layout("FSDP", 8, fsdp_version=2), 500 + 500 + 1000),
        (Layout("MULTI_GPU", 8), 4000 + 4000 + 8000 + 4 + 4000),  # one step count, and DDP's buckets
    ],
    ids=str,
)
def test_what_sharding_leaves_to_one_process(layout: Layout, total: int) -> None:
    """16 bytes per parameter in mixed precision, shared out as the ZeRO paper's table has it."""
    weights = Weights(1000, 4000, 1000, 4000, 1)
    assert sum(part.bytes for part in training_state(weights, ARGS, layout)) == total


def test_vllms_share_and_weights_decide_the_device() -> None:
    parts = [Part("weights", 6 * 2**30, EXACT), Part("cache", 2**30, "estimate", "generation")]
    assert Memory(parts, 0.0, 0).device == 7 * 2**30
    assert Memory(parts, 0.5, 2**30).device == 14 * 2**30
    assert Memory(parts, 0.5, 8 * 2**30).device == 20 * 2**30  # 8 GiB and 2 of cache in half of it
    assert memory_sentence(Memory(parts, 0.5, 2**30)) == (
        "about 7 GiB per GPU beside vLLM's 50 %, so a GPU of 14 GiB or more"
    )
    assert memory_sentence(Memory(parts, 0.0, 0), use_cpu=True) == "about 7.0 GiB per process"


def test_estimates_grow_with_what_they_estimate(inputs: Path, tmp_path: Path) -> None:
    def parts(**changes: object) -> dict[str, int]:
        plan = make_plan("grpo", words(inputs, tmp_path, **{"beta": 0.1, **changes}))
        assert plan.memory is not None
        return {part.name: part.bytes for part in plan.memory.parts}

    short, long = parts(max_completion_length=64), parts(max_completion_length=128)
    assert long.get("logits", 0) == 2 * short.get("logits", 0)
    assert long["activations"] > short["activations"]
    assert long["keys and values"] > short["keys and values"]
    assert "exact KL" not in short
    exact = parts(kl_estimator="exact", max_completion_length=64)
    assert 0 < exact["exact KL"] < parts(kl_estimator="exact", max_completion_length=128)["exact KL"]
    assert "reference" in parts()
    assert "reference" not in parts(beta=0.0)
    moving, start = parts(sync_ref_model=True), "the start, for kl/origin"
    assert moving[start] == moving["reference"]
    assert not {start, "the reference's adapter"} & (set(parts(sync_ref_model=True, kl_origin=False)) | set(parts()))
    adapters = parts(sync_ref_model=True, **LORA)
    assert adapters["the reference's adapter"] == 2 * adapters["gradients"]
    assert parts(gradient_checkpointing=False)["activations"] > parts(gradient_checkpointing=True)["activations"]


# Layouts


def test_layouts_of_the_accelerate_files() -> None:
    assert read_layout(ZERO3) == Layout("DEEPSPEED", 8, zero_stage=3, source=ZERO3)
    found = {path.stem: read_layout(str(path)) for path in (RECIPES / "accelerate").glob("*.yaml")}
    assert {name: (layout.zero_stage, layout.processes) for name, layout in found.items()} == {
        **{"cpu": (0, 1), "one_gpu": (0, 1), "multi_gpu": (0, 8), "fsdp2": (0, 8)},
        **{f"zero{stage}": (stage, 8) for stage in (1, 2, 3)},
    }
    assert found["fsdp2"].fsdp_version == 2
    assert found["zero2"].name == "DeepSpeed ZeRO-2, 8 processes"
    assert read_layout(None) == Layout()


def test_layouts_of_a_deepspeed_file_and_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    fields = {"distributed_type": "DEEPSPEED", "num_processes": 4}
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        yaml.safe_dump({**fields, "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}})
    )
    assert read_layout(str(path)) == Layout("DEEPSPEED", 4, zero_stage=2, offloads_optimizer=True, source=str(path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_layout(None).name == "DDP, 4 processes"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert read_layout(None).zero_stage == 3
    with pytest.raises(BadInput, match="not a readable accelerate file"):
        read_layout(str(tmp_path / "nowhere.yaml"))


# What is printed, and what is left alone


def test_a_good_recipe_on_the_command_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is printed, nothing is trained or written, and the exit status is 0."""
    monkeypatch.chdir(tmp_path)
    changes = {"beta": 0.05, "kl_controller": "pid", "kl_target": 0.1, "max_steps": 6, "learning_rate": 1e-4}
    argv = words(inputs, tmp_path, **changes, per_device_train_batch_size=16, num_generations=4)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["grpo", *argv, "--accelerate_config", "cpu", "--dry_run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    for line in (
        "kl_target: 0.1",
        "kl_estimator: k3",
        "learning_rate: 0.0001",
        "has the partial gradient of the reverse KL",
        "a step: 16 answers; a rollout: 4 prompts, 4 answers each",
        "24 rows: 6 steps per epoch; max_steps=6 is 1 epochs",
        f"policy {tiny_model().num_parameters():,} parameters",
        "memory of one process",
        "no problems found",
    ):
        assert line in printed, line
    assert "hub_token" not in printed


def test_eight_processes_are_planned_for_without_being_started(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch that eight processes make divisible is no problem, though it would be one on a single process."""
    argv = words(inputs, tmp_path, beta=0.1, per_device_train_batch_size=1, num_generations=8)
    assert cli.main(["grpo", *argv, "--accelerate_config", "zero3", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "DeepSpeed ZeRO-3, 8 processes" in printed
    assert "a step: 8 answers; a rollout: 1 prompts, 8 answers each" in printed
    assert cli.main(["grpo", *argv, "--dry_run"]) == 1
    assert "generation_batch_size (1) must be divisible by num_generations (8)" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_the_other_algorithms(algorithm: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"dpo": {"kl_coef": 0.1}, "ppo": {"total_episodes": 16, "num_mini_batches": 2}}[algorithm]
    assert cli.main([algorithm, *words(inputs, tmp_path, algorithm, **changes), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    said = {
        "dpo": ["a step: 8 pairs", "24 rows: 3 steps per epoch, 9 in all", "at the data's own prefixes"],
        "ppo": [
            "a step: a rollout of 8 prompts, one answer each, and 8 optimizer steps",
            "value model",
            "whole gradient",
        ],
    }[algorithm]
    for line in (*said, "no problems found"):
        assert line in printed, line


def test_all_problems_are_named_and_not_only_the_first(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    argv = words(
        inputs,
        tmp_path,
        model_name_or_path="./nowhere",
        dataset_name=str(inputs / "no_answer"),
        reward_funcs=["trl_klx.rewards.exact_match", "nowhere.reward", "trl_klx.rewards.exact"],
        output_dir=str(tmp_path / "file" / "run"),
        beta=0.1,
        kl_estimator="k1",
        kl_importance_sampling="none",
        kl_kp=2.0,
        kl_tarjet=1,
        eval_strategy="steps",
        eval_steps=1,
        dataset_test_split="validation",
        use_vllm=True,
        push_to_hub=True,
        generation_batch_size=7,
        report_to=["mlflow"],
        resume_from_checkpoint=str(tmp_path / "checkpoint-5"),
    )
    assert cli.main(["grpo", *argv, "--dry_run"]) == 1
    printed = capsys.readouterr().out
    for part in (
        "the field 'kl_tarjet' does not exist: did you mean 'kl_target'?",
        "zero expected gradient",
        "kl_kp=2.0 has no effect with kl_controller='fixed'",
        "generation_batch_size (7) must be divisible",
        "model_name_or_path='./nowhere' is neither a local folder",
        "the tokenizer of model_name_or_path='./nowhere'",
        "reward_funcs='nowhere.reward' cannot be imported",
        "reward_funcs='trl_klx.rewards.exact' cannot be imported",
        "dataset_test_split='validation' is not in",
        "checkpoint-5",
        "vLLM is not installed",
        "push_to_hub=true needs a token",
        "cannot be written to",
        "report_to names mlflow",
    ):
        assert part in printed, part
    numbers = [line.split(":")[0] for line in printed.splitlines() if line.startswith("problem ")]
    assert numbers == [f"problem {number}" for number in range(1, len(numbers) + 1)]
    assert len(numbers) >= 14


@pytest.mark.parametrize(
    ("algorithm", "changes", "said"),
    [
        ("grpo", {"dataset_name": "INPUTS/no_answer"}, "'exact_match' needs a column 'answer'"),
        ("grpo", {"dataset_name": None}, "dataset_name is missing"),
        ("grpo", {"dataset_name": "INPUTS/nowhere"}, "nowhere' cannot be loaded"),
        ("grpo", {"reward_funcs": None}, "there is no reward"),
        ("grpo", {"model_name_or_path": None}, "model_name_or_path is missing"),
        ("grpo", {"gold_reward_func": "nowhere.gold", "beta": 0.1}, "gold_reward_func='nowhere.gold'"),
        ("grpo", {"dataset_prepare": "trl_klx.tasks.gsm8k.gsm8k_prompts"}, "gsm8k_prompts' fails on the first row"),
        ("grpo", {**LORA, "lora_target_modules": ["nowhere"]}, "lora_target_modules=nowhere fits no layer"),
        (
            "grpo",
            {**LORA, "lora_target_modules": ["q_proj", "lm_head"], "beta": 0.1, "kl_estimator": "exact"},
            "refuses an adapter on lm_head",
        ),
        ("grpo", {"bf16": True, "use_cpu": None}, "bf16=true needs a GPU"),
        ("grpo", {"accelerate_config": ZERO3, "use_cpu": None}, "wants 8 processes"),
        ("grpo", {"use_vllm": True, "vllm_tensor_parallel_size": 3, "accelerate_config": ZERO3}, "must divide the 8"),
        ("ppo", {"use_vllm": True, "vllm_tensor_parallel_size": 3, "accelerate_config": ZERO3}, "must divide the 8"),
        ("dpo", {"dataset_name": "INPUTS/data"}, "has no column 'chosen'"),
        ("dpo", {"dataset_name": "INPUTS/data"}, "has no column 'rejected'"),
        ("dpo", {"reward_funcs": ["trl_klx.rewards.exact_match"]}, "has no effect in DPO"),
        ("dpo", {"kl_estimator": "k1", "kl_probe_steps": 0}, "kl_estimator='k1' is refused for DPO"),
        ("dpo", {"kl_estimator": "k1", "kl_probe_steps": 0}, "kl_probe_steps=0 must be a whole number"),
        ("ppo", {"gradient_accumulation_steps": 16}, "24 prompts and a rollout takes 128"),
        ("ppo", {"reward_model_path": "./none"}, "reward_model_path='./none'"),
        ("ppo", {"gamma": 2, "lam": 3}, "lam=3 must be"),
    ],
)
def test_each_problem(algorithm: str, changes: dict, said: str, inputs: Path, tmp_path: Path) -> None:
    changes = {
        name: value.replace("INPUTS", str(inputs)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    layout = changes.pop("accelerate_config", None)
    more = [] if layout is None else ["--accelerate_config", layout]
    plan = make_plan(algorithm, [*words(inputs, tmp_path, algorithm, **changes), *more])
    assert any(said in problem for problem in plan.problems), plan.problems


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"dtype": "bfloat16", **LORA}], ids=["float32", "LoRA"])
def test_weights_that_can_take_small_steps_are_no_problem(changes: dict, inputs: Path, tmp_path: Path) -> None:
    """PEFT keeps its adapters in float32, and DeepSpeed its own copy."""
    plan = make_plan("grpo", words(inputs, tmp_path, learning_rate=1e-6, **changes))
    assert plan.problems == plan.warnings == []
    half = words(inputs, tmp_path, learning_rate=1e-6, dtype="bfloat16")
    plan = make_plan("grpo", [*half, "--accelerate_config", ZERO3])
    assert plan.problems == plan.warnings == []


def test_conversations_need_a_chat_template(tmp_path: Path, inputs: Path) -> None:
    data = save_dataset("trl-lib/ultrafeedback-prompt", tmp_path / "data")
    changes = {"dataset_name": data, "reward_funcs": ["support.tiny.message_reward"]}
    plan = make_plan("grpo", words(inputs, tmp_path, **changes))
    assert any("has no chat template" in problem for problem in plan.problems)
    chat = save_tiny_chat("Qwen/Qwen2.5-7B-Instruct", tmp_path / "chat")
    assert make_plan("grpo", words(inputs, tmp_path, **changes, model_name_or_path=chat)).problems == []


def test_an_output_folder_with_checkpoints_and_a_full_disk(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(inputs, tmp_path)
    assert make_plan("grpo", argv).problems == []
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "kl_state.json").write_text('{"files": []}')
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    plan = make_plan("grpo", argv)
    assert plan.problems == []
    assert "holds the checkpoints of another run (the last is checkpoint-4)" in plan.warnings[0]
    assert "free: make room" in plan.warnings[1]
    (warned,) = make_plan("grpo", [*argv, "--resume_from_checkpoint", "last"]).warnings
    assert "another run" not in warned


def test_a_hub_that_is_away_is_asked_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own retries would take minutes; a local recipe does not ask at all."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    argv = words(inputs, tmp_path, model_name_or_path="nobody/nothing")
    began = time.monotonic()
    plan = make_plan("grpo", argv)
    assert time.monotonic() - began < 20
    (away,) = (warning for warning in plan.warnings if "cannot be reached" in warning)
    assert "only what is cached of nobody/nothing" in away
    assert any("model_name_or_path='nobody/nothing' is neither" in problem for problem in plan.problems)
    assert not constants.HF_HUB_OFFLINE
    assert make_plan("grpo", words(inputs, tmp_path)).problems == []


def test_rows_of_a_dataset_elsewhere_are_not_downloaded_to_be_counted() -> None:
    def rows():
        yield {"prompt": "1"}
        raise AssertionError("the stream was read")

    stream = IterableDataset.from_generator(rows)
    assert count_rows(stream, "train", is_local=False) is None
    stream.info.splits = {"train": SimpleNamespace(num_examples=7473)}
    assert count_rows(stream, "train", is_local=False) == 7473
    assert count_rows(Dataset.from_list([{"prompt": "1"}] * 3).to_iterable_dataset(), "train", is_local=True) == 3


def test_a_shape_alone_is_counted(tmp_path: Path, inputs: Path) -> None:
    """No weights are needed, nor read: a config of 8 billion parameters is planned for in a second."""
    path = save_shape("meta-llama/Llama-3.1-8B-Instruct", tmp_path / "shape")
    plan = make_plan("grpo", words(inputs, tmp_path, model_name_or_path=path, dtype="bfloat16"))
    assert plan.models is not None and plan.memory is not None
    assert plan.models.policy.parameters == 8_030_261_248
    assert next(part.bytes for part in plan.memory.parts if part.name == "weights") == 2 * 8_030_261_248


@pytest.mark.parametrize(("algorithm", "lora"), [("ppo", True), ("ppo", False), ("grpo", True)])
def test_scores_are_estimated_by_the_chunks_that_they_are_taken_in(
    algorithm: str, lora: bool, tmp_path: Path, inputs: Path
) -> None:
    """Up to 0.9 GiB at a vocabulary of 152,000; where the head is trained four times as many tokens, and its gradient.

    Where whole logits exist, the exact KL holds a gradient of their size too.
    """
    path = save_shape("Qwen/Qwen2.5-7B-Instruct", tmp_path / "shape")
    model = {
        "model_name_or_path": path,
        "kl_estimator": "exact",
        "per_device_train_batch_size": 8,
        **(LORA if lora else {}),
    }
    length: dict[str, object] = {"max_completion_length": 512, "num_generations": 4, "beta": 0.1}
    if algorithm == "ppo":
        length = {"response_length": 512, "kl_placement": "both"}
    changes = {**model, **length, "per_device_train_batch_size": 8}
    plan = make_plan(algorithm, words(inputs, tmp_path, algorithm, **changes))
    assert plan.memory is not None
    parts = {part.name: part for part in plan.memory.parts}
    logits = 4 * 8 * 512 * 152_064
    whole = 0 if algorithm == "ppo" or FUSED_LM_HEAD else logits
    part = parts["scores, in chunks" if algorithm == "ppo" else "exact KL"]
    chunks = part.bytes - whole - (0 if lora else 4 * 152_064 * 3584)
    least, most = (0.8, 1.1) if lora else (3.2, 4.4)
    assert least * 2**30 < chunks < most * 2**30
    assert ("logits" in parts) == bool(whole)
    assert part.how == "estimate"


def test_who_asks_for_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("dry_run: true\n")
    assert CommandLine(["--dry_run"]).flag("dry_run")
    assert CommandLine(["--dry_run", "--config", "x"]).flag("dry_run")
    assert CommandLine(["--dry_run=true"]).flag("dry_run")
    assert not CommandLine(["--dry_run", "false"]).flag("dry_run")
    assert CommandLine(["--config", str(path)]).flag("dry_run")
    assert not CommandLine(["--config", str(path), "--dry_run=false"]).flag("dry_run")
    with pytest.raises(ValueError, match="does not exist"):
        CommandLine(["--config", str(tmp_path / "nowhere.yaml")]).flag("dry_run")
    assert not CommandLine([]).flag("dry_run")


def test_what_is_no_recipe(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo.main(["--config", str(tmp_path / "nowhere.yaml"), "--dry_run"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert grpo.main([*words(inputs, tmp_path), "--accelerate_config", "nowhere.yaml", "--dry_run"]) == 2
    assert "not a readable accelerate file" in capsys.readouterr().err
    assert grpo.main([*words(inputs, tmp_path), "--accelerate_config", ZERO3]) == 2
    assert "accelerate_config=" in capsys.readouterr().err
