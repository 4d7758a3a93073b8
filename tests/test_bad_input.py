"""Wrong recipes and paths: one sentence on stderr, exit status 2, no traceback, before any model is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from support.tiny import save_tiny

from trl_klx.cli import commands as cli
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.recipe.algorithm import Algorithm, Inputs
from trl_klx.run.recipe.arguments import Recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    for name, rows in {
        "data": [{"prompt": "1+1=", "answer": "2"}] * 4,
        "no_prompt": [{"question": "1+1=", "answer": "2"}],
        "no_answer": [{"prompt": "1+1="}],
        "pairs": [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 4,
        "whole_pairs": [{"chosen": "1+1=2", "rejected": "1+1=3"}] * 4,
        "no_rejected": [{"prompt": "1+1=", "chosen": "2"}] * 4,
        "tokens": [{"input_ids": [4, 5]}] * 4,
    }.items():
        for split in ("train", "test"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("data", "pairs"):
        (folder / f"{name}_no_test").mkdir()
        (folder / f"{name}_no_test" / "train.jsonl").write_text((folder / name / "train.jsonl").read_text())
    (folder / "empty").mkdir()
    return folder


# What each algorithm needs of a recipe, beside what all need.
ALGORITHMS = {
    grpo: {"dataset_name": "INPUTS/data", "reward_funcs": ["trl_klx.rewards.exact_match"]},
    ppo: {"dataset_name": "INPUTS/data", "reward_funcs": ["trl_klx.rewards.exact_match"]},
    dpo: {"dataset_name": "INPUTS/pairs"},
}


def recipe(inputs: Path, tmp_path: Path, algorithm: ModuleType = grpo, **changes: object) -> Path:
    fields = {
        "model_name_or_path": "INPUTS/model",
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "eval_strategy": "steps",
        "eval_steps": 1,
        **ALGORITHMS[algorithm],
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump({name: value for name, value in fields.items() if value is not None})
    path.write_text(text.replace("INPUTS", str(inputs)))
    return path


BAD_RECIPES = [
    ({"kl_estimater": "k3"}, "the field 'kl_estimater' does not exist: did you mean 'kl_estimator'?"),
    ({"learning_rates": 1}, "did you mean 'learning_rate'?"),
    ({"zzz": 1}, "the field 'zzz' does not exist: remove it."),
    ({"kl_estimator": "k4"}, "kl_estimator='k4' does not exist"),
    ({"kl_estimator": "k1", "kl_importance_sampling": "none"}, "zero expected gradient"),
    ({"kl_estimator": "exact", "kl_placement": "reward"}, "prefix term alone"),
    ({"kl_controller": "pid", "beta": 0.1}, "set kl_target"),
    ({"kl": {"estimator": "k3"}}, "the field 'kl' does not exist"),
    ({"beta": {"start": 0.1}}, "beta must be a plain value, not a mapping"),
    ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere' is neither a local folder"),
    ({"model_name_or_path": "runs/starter/nowhere"}, "run `trl-klx starter` first"),
    ({"dataset_name": None}, "dataset_name is missing"),
    ({"dataset_name": "./nowhere"}, "dataset_name='./nowhere' cannot be loaded (there is no such folder)"),
    ({"dataset_name": "INPUTS/empty"}, "cannot be loaded"),
    ({"dataset_name": "INPUTS/no_prompt"}, "has no column 'prompt' (it has question, answer)"),
    ({"dataset_name": "INPUTS/no_answer"}, "'exact_match' needs a column 'answer'"),
    ({"dataset_name": "INPUTS/data_no_test"}, "dataset_test_split='test' is not in"),
    ({"dataset_train_split": "training"}, "dataset_train_split='training' is not in"),
    ({"reward_funcs": None}, "reward_funcs and reward_model_name_or_path are both missing"),
    ({"reward_funcs": ["trl_klx.rewards.exact_mach"]}, "reward_funcs='trl_klx.rewards.exact_mach' cannot be imported"),
    ({"reward_funcs": ["nowhere.reward"]}, "cannot be imported"),
    ({"reward_funcs": ["reward"]}, "is not a function: give module.function or path/to/file.py:function"),
    ({"reward_funcs": ["trl_klx.kl.gradients.NONE"]}, "is not a function"),
    ({"gold_reward_func": "nowhere.reward", "beta": 0.1}, "gold_reward_func='nowhere.reward' cannot be imported"),
    ({"gold_reward_func": "trl_klx.rewards.exact_match"}, "which is not measured at beta=0"),
    ({"gold_reward_func": "trl_klx.rewards.exact_match", "beta": 0.1, "eval_strategy": "no"}, "eval_strategy='no'"),
    ({"gold_action": "stop"}, "gold_action='stop' has no effect without a gold reward"),
    ({"gold_action": "halt"}, "gold_action='halt' does not exist"),
    ({"dataset_name": "runs/stories/nowhere"}, "recipes/tinystories-15m/prepare.py` first"),
    ({"num_generations": 1, "per_device_train_batch_size": 1}, "num_generations=1 must be a number, at least 2"),
    ({"generation_batch_size": 7}, "must be divisible"),
]


BAD_PPO_RECIPES = [
    ({"kl_estimator": "k3"}, "kl_estimator='k3' with kl_placement='reward'"),
    ({"beta": 0.1}, "the field 'beta' does not exist"),
    ({"reward_funcs": None}, "reward_funcs and reward_model_path are both missing"),
    ({"reward_funcs": ["nowhere.reward"]}, "cannot be imported"),
    ({"reward_model_path": "./nowhere"}, "reward_model_path='./nowhere' is neither a local folder"),
    ({"value_model_path": "./nowhere"}, "value_model_path='./nowhere' is neither a local folder"),
    ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere' is neither a local folder"),
    ({"dataset_name": "INPUTS/no_prompt"}, "has no column 'prompt' or 'input_ids' (it has question, answer)"),
    ({"dataset_name": "INPUTS/no_answer"}, "'exact_match' needs a column 'answer'"),
    ({"dataset_name": "INPUTS/data_no_test"}, "dataset_test_split='test' is not in"),
    ({"total_episodes": 8, "max_steps": 1}, "both give the length of the run"),
    ({"gold_reward_func": "nowhere.reward"}, "gold_reward_func='nowhere.reward' cannot be imported"),
    ({"gold_action": "stop"}, "gold_action='stop' has no effect without a gold reward"),
]
BAD_DPO_RECIPES = [
    ({"kl_estimator": "k3"}, "kl_estimator='k3' is refused for DPO"),
    ({"kl_probe_step": 1}, "did you mean 'kl_probe_steps'?"),
    ({"reward_funcs": ["trl_klx.rewards.exact_match"]}, "reward_funcs=['trl_klx.rewards.exact_match'] has no effect"),
    ({"gold_reward_func": "trl_klx.rewards.exact_match"}, "is not followed in DPO"),
    ({"gold_action": "stop"}, "the field 'gold_action' does not exist"),
    ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere' is neither a local folder"),
    ({"dataset_name": "INPUTS/data"}, "has no column 'chosen' (it has prompt, answer)"),
    ({"dataset_name": "INPUTS/no_rejected"}, "has no column 'rejected' (it has prompt, chosen)"),
    ({"dataset_name": "INPUTS/pairs_no_test"}, "dataset_test_split='test' is not in"),
    (
        {"dataset_name": "INPUTS/pairs_no_test", "eval_strategy": "no", "eval_steps": None, "kl_probe_steps": 1},
        "dataset_test_split='test' is not in",
    ),
]
BAD = [
    pytest.param(algorithm, *row, id=f"{algorithm.__name__.split('.')[-1]}-{str(row[0])[:60]}")
    for algorithm, rows in ((grpo, BAD_RECIPES), (ppo, BAD_PPO_RECIPES), (dpo, BAD_DPO_RECIPES))
    for row in rows
]


@pytest.mark.parametrize(("algorithm", "changes", "sentence"), BAD)
def test_recipe_is_refused(
    inputs: Path,
    tmp_path: Path,
    algorithm: ModuleType,
    changes: dict,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    assert algorithm.main(["--config", str(recipe(inputs, tmp_path, algorithm, **changes))]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    message = error[error.index("error: ") :]
    assert "Traceback" not in error
    assert message.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (grpo, {}),
        (ppo, {}),
        (ppo, {"reward_funcs": None, "reward_model_path": "INPUTS/model", "dataset_name": "INPUTS/tokens"}),
        (ppo, {"value_model_path": "INPUTS/model", "total_episodes": 8}),
        (dpo, {}),
        (dpo, {"dataset_name": "INPUTS/whole_pairs"}),
        (dpo, {"dataset_name": "INPUTS/pairs_no_test", "eval_strategy": "no"}),
        (dpo, {"eval_strategy": "no", "kl_probe_steps": 1}),
    ],
)
def test_a_good_recipe_is_not_refused(
    inputs: Path, tmp_path: Path, algorithm: ModuleType, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables above mean something: without its change, a recipe gets as far as building a trainer."""

    class ReachedError(Exception):
        pass

    def reached(of: Algorithm, parsed: Recipe, loaded: Inputs) -> None:
        assert len(loaded.train_dataset) == 4  # type: ignore[arg-type]
        evaluates = parsed.args.eval_strategy != "no" or "kl_probe_steps" in changes
        assert (loaded.eval_dataset is not None) == evaluates
        raise ReachedError

    monkeypatch.setattr(train, "build_trainer", reached)
    with pytest.raises(ReachedError):
        algorithm.main(["--config", str(recipe(inputs, tmp_path, algorithm, **changes))])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config"], "--config needs the path of a recipe"),
        (["--config=nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["--config", "RECIPE", "--kl_targett", "1"], "did you mean 'kl_target'?"),
        (["--config", "RECIPE", "stray"], "'stray' on the command line belongs to no field"),
        (["--config", "LIST"], "must be a YAML mapping"),
        (["--config", "BROKEN"], "is not valid YAML"),
    ],
)
def test_command_line_is_refused(
    inputs: Path, tmp_path: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"RECIPE": recipe(inputs, tmp_path), "LIST": tmp_path / "list.yaml", "BROKEN": tmp_path / "broken.yaml"}
    files["LIST"].write_text("[1, 2]")
    files["BROKEN"].write_text("a: [1")
    assert grpo.main([str(files.get(part, part)) for part in argv]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["grop"], "the command 'grop' does not exist: did you mean 'grpo'? use starter, "),
        (["grpo", "--accelerate_config", "zero9", "--config", "x"], "neither a file nor one of cpu, fsdp2"),
        (["dpo", "--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["grpo", "--accelerate_config"], "neither a file nor one of"),
        (["starter", "--seed", "-1"], "seed"),
    ],
)
def test_cli_is_refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--max_steps", "abc"], "max_steps='abc' must be a whole number."),
        (["--beta", "high"], "beta='high' must be a finite number."),
        (["--beta"], "--beta needs a value: write --beta VALUE."),
    ],
)
def test_a_value_of_the_wrong_kind(
    inputs: Path, tmp_path: Path, change: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grpo.main(["--config", str(recipe(inputs, tmp_path)), *change]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("starter", "grpo", "ppo", "dpo"))


@pytest.mark.processes
def test_a_bad_recipe_under_accelerate_launch(inputs: Path, tmp_path: Path) -> None:
    """As a user meets it: the sentence, a status that is not 0, and no traceback of ours or of the launcher."""
    path = recipe(inputs, tmp_path, kl_estimator="k4")
    command = [sys.executable, "-m", "trl_klx.cli", "grpo", "--accelerate_config", "cpu", "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "kl_estimator='k4' does not exist" in result.stderr
    assert "Traceback" not in result.stderr
