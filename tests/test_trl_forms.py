"""What TRL's own scripts and commands take runs here as it is: data, rewards, models and fields by TRL's names."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import load_dataset
from support.ppo_tools import classifier
from support.tiny import save_tiny, tiny_tokenizer
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl import rewards as trl_rewards

from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.cli import commands as cli
from trl_klx.monitor.history import HISTORY_FILE, read_history
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.sources import named_rewards
from trl_klx.run.sources.named_rewards import load_reward
from trl_klx.trainers.checks.packages import Package

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": "run", "disable_tqdm": True}
SMALL = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1.0e-3, "logging_steps": 1}
OF_GRPO = {"num_generations": 4, "max_completion_length": 6, **SMALL}
# Every character that the tiny tokenizer has; a template of TRL's would be unknown tokens throughout.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with models and data."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    classifier().save_pretrained(tmp_path / "reward-model")
    tokenizer.save_pretrained(tmp_path / "reward-model")
    write_rows("text.jsonl", [{"prompt": f"{n}=", "solution": str(n)} for n in range(8)])
    chat = [{"prompt": [{"role": "user", "content": f"{n}+1"}], "solution": str(n + 1)} for n in range(8)]
    write_rows("chat.jsonl", chat)
    pairs = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(8)]
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):
        write_rows(f"pairs/{split}.jsonl", pairs)
    return tmp_path


def run(module: Any, fields: dict[str, Any], *words: str) -> int:
    Path("recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": "model", **QUIET, **fields}))
    status: int = module.main(["--config", "recipe.yaml", *words])
    return status


def logged(name: str) -> list[float]:
    return [entry[name] for entry in read_history(Path("run") / HISTORY_FILE) if name in entry]


# Rewards


@pytest.mark.trl
def test_rewards_by_the_names_that_trl_gives_them() -> None:
    assert load_reward("think_format_reward", "reward_funcs") is trl_rewards.think_format_reward
    assert load_reward("trl.rewards.think_format_reward", "reward_funcs") is trl_rewards.think_format_reward
    too_long = load_reward("get_soft_overlong_punishment", "reward_funcs")
    assert too_long(completion_ids=[[1] * 1024, [1] * 1152, [1] * 1281]) == [0.0, -0.5, -1.0]


def test_a_name_that_is_none_of_trls() -> None:
    with pytest.raises(BadInput, match=r"'accuracy' is not a function: .* or one of TRL's: accuracy_reward, reas"):
        load_reward("accuracy", "reward_funcs")


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward", "trl.rewards.accuracy_reward"])
def test_a_reward_that_needs_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_rewards, "MATH_VERIFY", Package("math-verify", ("no_such_module",)))
    with pytest.raises(BadInput, match="no_such_module is not installed: pip install math-verify, or name another"):
        load_reward(name, "reward_funcs")
    monkeypatch.setattr(named_rewards, "MATH_VERIFY", Package("math-verify", ("json",)))
    assert load_reward(name, "reward_funcs") is getattr(trl_rewards, name.removeprefix("trl.rewards."))


@pytest.mark.trl
@pytest.mark.situation("gives TRL's rewards by name, and a reward model as in TRL's script", "right")
def test_a_grpo_recipe_with_the_rewards_of_trl(folder: Path) -> None:
    """The reward model comes first, as in TRL's script, so that `reward_weights` mean the same."""
    (folder / "my_rewards.py").write_text("def digits(completions, **_):\n    return [1.0 for _ in completions]\n")
    rewards = ["think_format_reward", "get_soft_overlong_punishment", "my_rewards.py:digits"]
    weights = [2.0, 1.0, 1.0, 0.5]
    fields = {"dataset_name": "chat.jsonl", "reward_funcs": rewards, "reward_weights": weights, **OF_GRPO}
    assert run(grpo, {**fields, "reward_model_name_or_path": "reward-model"}) == 0
    names = ("think_format_reward", "soft_overlong_punishment_reward", "digits")
    assert [logged(f"rewards/{name}/mean")[0] for name in names] == [0.0, 0.0, 1.0]
    (of_model,) = (name for name in read_history(Path("run") / HISTORY_FILE)[0] if "reward-model/mean" in name)
    torch.testing.assert_close(logged("reward")[0], 2 * logged(of_model)[0] + 0.5)


@pytest.mark.situation("gives TRL's rewards to prompts that are text", "refused")
def test_a_reward_that_reads_messages_and_prompts_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"dataset_name": "text.jsonl", "reward_funcs": "think_format_reward", **OF_GRPO}
    assert run(grpo, fields) == 2
    assert "the reward think_format_reward of TRL reads messages, and the prompts are text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "fields", "sentence"),
    [
        (grpo, {"reward_model_name_or_path": "./none"}, "reward_model_name_or_path='./none' is neither a local folder"),
        (grpo, {"reward_model_path": "reward-model"}, "GRPO's reward model is reward_model_name_or_path"),
        (ppo, {"reward_model_name_or_path": "./none"}, "reward_model_path='./none' is neither a local folder"),
        (
            dpo,
            {"reward_model_name_or_path": "reward-model"},
            "reward_model_name_or_path='reward-model' has no effect in",
        ),
    ],
)
def test_reward_models_that_are_not_there(
    module: Any, fields: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {grpo: OF_GRPO, ppo: {**SMALL, "response_length": 6}, dpo: SMALL}[module]
    assert run(module, {"dataset_name": "text.jsonl", **fields, **small}) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.situation("names PPO's reward model as TRL's other scripts do", "right")
def test_either_name_of_a_reward_model_in_ppo(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(train, "build_trainer", lambda algorithm, recipe, inputs: built.append(recipe) or 1 / 0)
    fields = {"dataset_name": "text.jsonl", "response_length": 6, **SMALL}
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="is taken as reward_model_path"):
        run(ppo, {**fields, "reward_model_name_or_path": "reward-model"})
    assert built[0].args.reward_model_path == "reward-model"


# TRL's own scripts, whose two class names are changed, and the command here: one file, the same run

BOTH = """
model_name_or_path:
  model
env:
  TRL_KLX_TEST_OF_ENV: 0
report_to:
  none
learning_rate:
  1e-3
lr_scheduler_type:
  cosine
use_cpu: true
bf16: false
max_steps: 2
logging_steps: 1
per_device_train_batch_size: 4
seed: 7
"""
OF_ALGORITHM = {
    "grpo": """
datasets:
  - path: json
    data_files: chat.jsonl
    columns: [prompt, solution]
    fraction: 0.5
  - path: json
    data_files:
      - chat.jsonl
    split: train
    fraction: 0.5
reward_funcs:
  - think_format_reward
  - get_soft_overlong_punishment
reward_model_name_or_path: reward-model
reward_weights: [0.5, 1.0, 1.0]
beta: 0.1
num_generations: 4
max_completion_length: 6
""",
    "dpo": """
dataset_name: pairs
dataset_config: default
eval_strategy: steps
eval_steps: 1
per_device_eval_batch_size: 4
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
max_length: 16
beta: 0.2
""",
}
CLASSES = {"grpo": (KLXGRPOConfig, KLXGRPOTrainer), "dpo": (KLXDPOConfig, KLXDPOTrainer)}
COMPARED = ("loss", "reward", "kl", "rewards/margins", "eval_loss", "eval_rewards/margins")


@pytest.mark.trl
@pytest.mark.situation("runs a YAML file of TRL's script, or the script with the two class names changed", "right")
@pytest.mark.parametrize("algorithm", CLASSES)
def test_a_script_of_trl_and_the_command_do_the_same(
    algorithm: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "trl.yaml").write_text(BOTH + OF_ALGORITHM[algorithm])
    for name, ours in zip(("Config", "Trainer"), CLASSES[algorithm], strict=True):
        monkeypatch.setattr(trl, f"{algorithm.upper()}{name}", ours)
    script = importlib.import_module(f"trl.scripts.{algorithm}")
    set_seed(7)  # TRL 1.12 makes an adapter before it seeds
    script.main(*script.make_parser().parse_args_and_config(["--config", "trl.yaml", "--output_dir", "by-trl"]))
    of_trl = json.loads((folder / "by-trl" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    set_seed(7)
    assert cli.main([algorithm, "--config", "trl.yaml", "--output_dir", "run"]) == 0
    assert os.environ["TRL_KLX_TEST_OF_ENV"] == "0"
    found = 0
    for step, (theirs, ours) in enumerate(zip(of_trl, read_history(folder / "run" / HISTORY_FILE), strict=False)):
        for metric in set(COMPARED) & set(theirs):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-6), (step, metric)
            found += 1
    assert found >= 4


ON_CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--output_dir", "run", "--max_steps", "1"]
COMMANDS = {
    "grpo": "--model_name_or_path model --dataset_name chat.jsonl --reward_funcs think_format_reward "
    "get_soft_overlong_punishment --num_generations 4 --max_completion_length 6 --per_device_train_batch_size 4",
    "dpo": "--dataset_name pairs --model_name_or_path model --learning_rate 5.0e-6 --num_train_epochs 1 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_strategy steps --eval_steps 50 "
    "--no_remove_unused_columns --use_peft --lora_r 4 --lora_alpha 16 --lora_target_modules all-linear",
}


@pytest.mark.situation("gives the options of TRL's documentation on the command line, without a file", "right")
@pytest.mark.parametrize("algorithm", COMMANDS)
def test_the_command_lines_of_trls_documentation(algorithm: str, folder: Path) -> None:
    assert cli.main([algorithm, *COMMANDS[algorithm].split(), *ON_CPU]) == 0
    assert logged("loss") or logged("train_loss")
    assert (folder / "run" / "resolved_recipe.yaml").is_file()


@pytest.mark.trl
@pytest.mark.situation("changes the two class names in a Python script of TRL's documentation", "right")
def test_a_python_script_as_trl_documents_it(folder: Path) -> None:
    """Arguments by TRL's parser, the dataset mapped to another form, an adapter, a reward written in the script."""

    def right(completions: list, reference: list[str], **kwargs: Any) -> list[float]:
        return [float(reply[0]["content"] == wanted) for reply, wanted in zip(completions, reference, strict=True)]

    parser = TrlParser((ScriptArguments, KLXGRPOConfig, ModelConfig))
    words = "--model_name_or_path model --use_peft --lora_r 4 --lora_target_modules q_proj v_proj --num_generations 4"
    small = "--per_device_train_batch_size 4 --max_completion_length 6 --log_completions --beta 0.1"
    script_args, training_args, model_args = parser.parse_args_and_config([*words.split(), *small.split(), *ON_CPU])
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    dataset = load_dataset("json", data_files="text.jsonl", split=script_args.dataset_train_split)
    dataset = dataset.map(
        lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], "reference": row["solution"]},
        remove_columns=dataset.column_names,
    )
    trainer = KLXGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=right,
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert (folder / "run" / "adapter_model.safetensors").is_file()
    assert trainer.state.global_step == 1


@pytest.mark.situation("writes accelerate_config into the recipe, and starts it by the command", "right")
def test_what_the_command_has_started_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("TRL_KLX_LAUNCHER", "another-host 1")  # as `become` leaves it, of a process that is not here
    fields = {"dataset_name": "chat.jsonl", "reward_funcs": "think_format_reward", **OF_GRPO}
    assert run(grpo, {**fields, "accelerate_config": "cpu", "num_processes": 1}) == 0
    assert logged("rewards/think_format_reward/mean") == [0.0]
    assert run(grpo, {**fields, "accelerate_config": "cpu", "output_dir": "again"}) == 2  # not started by it
