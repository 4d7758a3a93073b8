"""What TRL's own scripts and commands take runs here as it is: data, rewards, models and fields by TRL's names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.ppo_tools import classifier
from support.tiny import save_tiny, tiny_tokenizer
from trl import rewards as trl_rewards

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
