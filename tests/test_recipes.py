"""Every recipe in the repository: its name is true, it parses, and the starter recipes run."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from trl_klx.run import dpo, grpo, ppo
from trl_klx.run.recipe.arguments import Recipe
from trl_klx.run.recipe.parse import parse
from trl_klx.tasks import starter as starter_module
from trl_klx.tasks.starter import make_starter
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.grpo.config import KLXGRPOConfig
from trl_klx.trainers.ppo.config import KLXPPOConfig

RECIPES = Path(__file__).parent.parent / "recipes"
ACCELERATE = sorted((RECIPES / "accelerate").rglob("*.yaml"))
TRAINING = sorted(path for path in RECIPES.rglob("*.yaml") if path not in ACCELERATE)
MAINS = {"grpo": grpo.main, "ppo": ppo.main, "dpo": dpo.main}
CONFIGS: dict[str, type] = {"grpo": KLXGRPOConfig, "dpo": KLXDPOConfig, "ppo": KLXPPOConfig}
# A recipe on a less trained starter and four steps: the data that it reads, and what makes it short.
SHORT = {
    "grpo": {"dataset_name": "data", "per_device_train_batch_size": 32},
    "ppo": {"dataset_name": "data", "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1},
    "dpo": {"dataset_name": "preferences", "per_device_train_batch_size": 16, "kl_probe_steps": 2},
}
# What an evaluation logs beside the KL, and a line of the table at the end.
EXPECTED = {
    "grpo": ("eval_reward", "reward exact_match"),
    "ppo": ("eval_reward", "reward exact_match"),
    "dpo": ("eval_rewards/margins", "implicit reward margin"),
}


def algorithm_of(path: Path) -> str:
    return path.stem.split("_")[0]


def recipes(paths: list[Path]) -> list:
    """Test parameters."""
    return [pytest.param(path, id=path.stem) for path in paths]


def parsed(path: Path, algorithm: str) -> Recipe:
    """Read a recipe as it stands; one for GPUs needs to be told that there is none."""
    return parse(CONFIGS[algorithm], ["--config", str(path)], use_cpu=True).whole()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "starter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter_module, "PAIR_TRAIN_PROMPTS", 256)  # about one in five gives a pair so early
        patch.setattr(starter_module, "PAIR_TEST_PROMPTS", 64)
        make_starter(folder, steps=20, progress=False)
    held_out = folder / "data" / "test.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:96]))
    return folder


def test_there_are_recipes() -> None:
    names = {path.stem for path in TRAINING}
    assert {"grpo_k3_loss", "grpo_k2_loss", "grpo_k1_reward", "grpo_exact_both_pid", "dpo_exact_loss"} <= names
    assert {"cpu", "one_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp2"} <= {path.stem for path in ACCELERATE}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {"cpu": "NO", "one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert str(config.distributed_type).split(".")[-1] == kinds.get(path.stem, "DEEPSPEED")
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("path", recipes(TRAINING))
def test_a_recipe_is_flat_and_its_name_is_true(path: Path) -> None:
    """<algorithm>_<estimator>_<placement>[_<controller>].yaml"""
    recipe = yaml.safe_load(path.read_text())
    assert not any(isinstance(value, dict) for value in recipe.values())
    algorithm, estimator, placement, *controller = path.stem.split("_")
    args = parsed(path, algorithm).args
    assert (args.kl_estimator, args.kl_placement) == (estimator, placement)
    assert args.kl_controller == (controller[0] if controller else "fixed")
    assert Path(args.output_dir).name == path.stem
    assert f"scripts/{algorithm}.py" in path.read_text()


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_asks_and_what_came_out(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert header[0].startswith("# Question: ")
    assert f"--config {path.relative_to(RECIPES.parent).as_posix()}" in text
    for label in ("# Hardware: ", "# Outcome: "):
        assert any(line.startswith(label) and len(line) > len(label) + 10 for line in header), label


@pytest.mark.pictures
@pytest.mark.parametrize("path", recipes([path for path in TRAINING if path.parent.name == "starter"]))
def test_starter_recipes_run(
    path: Path, starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own settings, on fewer steps and a less trained starter: trains, evaluates, saves and reports."""
    monkeypatch.chdir(tmp_path)
    algorithm = algorithm_of(path)
    recipe = yaml.safe_load(path.read_text())
    # Of the two ways to give the length of a PPO run, the recipe may use the other.
    length = {"total_episodes": 4 * 32} if "total_episodes" in recipe else {"max_steps": 4}
    overrides = {
        **SHORT[algorithm],
        **length,
        "model_name_or_path": starter / "model",
        "dataset_name": starter / SHORT[algorithm]["dataset_name"],
        "output_dir": tmp_path / "run",
        "eval_steps": 4,
        "logging_steps": 2,
        "hub_token": "secret",
    }
    argv = ["--config", str(path), *(part for name, value in overrides.items() for part in (f"--{name}", str(value)))]
    assert MAINS[algorithm](argv) == 0
    folder = tmp_path / "run"
    measure, row = EXPECTED[algorithm]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [entry for entry in history if measure in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4]
    assert evaluations[0]["eval_kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert evaluations[1]["eval_kl/sequence"] > 0
    assert any("kl/sequence" in entry for entry in history)
    for name in ("reward_vs_kl.png", "kl_control.png", "model.safetensors", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert {"trl_klx", "trl", "torch"} <= set(json.loads((folder / "versions.json").read_text()))
    assert "secret" not in (folder / "resolved_recipe.yaml").read_text()
    again = parsed(folder / "resolved_recipe.yaml", algorithm)
    first = parse(CONFIGS[algorithm], argv).whole()
    names = {option.name for option in fields(first.args) if option.init}
    changed = {name for name in names if getattr(again.args, name) != getattr(first.args, name)}
    assert changed == {"hub_token"}  # else, running the file again is the same run
    assert again.args.hub_token is None
    assert again.run == first.run
    assert again.model == first.model
    printed = capfd.readouterr().out
    for text in ("held-out prompts", row, "KL, nats per sequence", first.args.kl_coef_name, "no health alarms"):
        assert text in printed, text
