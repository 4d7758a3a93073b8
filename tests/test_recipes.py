"""Every recipe in the repository: its name is true, it parses, and the starter recipes run."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig

from trl_klx.run.arguments import RunArguments, parse_recipe
from trl_klx.run.grpo import main
from trl_klx.starter import make_starter
from trl_klx.trainers import KLXGRPOConfig

RECIPES = Path(__file__).parent.parent / "recipes"
ACCELERATE = sorted((RECIPES / "accelerate").rglob("*.yaml"))
TRAINING = sorted(path for path in RECIPES.rglob("*.yaml") if path not in ACCELERATE)
CONFIGS = {"grpo": KLXGRPOConfig}


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "starter"
    make_starter(folder, steps=20, progress=False)
    return folder


def test_there_are_recipes() -> None:
    names = {path.stem for path in TRAINING}
    assert {"grpo_k3_loss", "grpo_k2_loss", "grpo_k1_reward", "grpo_exact_both_pid"} <= names
    assert {"cpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp2"} <= {path.stem for path in ACCELERATE}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {"cpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert str(config.distributed_type).split(".")[-1] == kinds.get(path.stem, "DEEPSPEED")
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_recipe_is_flat_and_its_name_is_true(path: Path) -> None:
    """<algorithm>_<estimator>_<placement>[_<controller>].yaml"""
    fields = yaml.safe_load(path.read_text())
    assert not any(isinstance(value, dict) for value in fields.values())
    algorithm, estimator, placement, *controller = path.stem.split("_")
    _, args, _ = parse_recipe("test", (RunArguments, CONFIGS[algorithm], ModelConfig), ["--config", str(path)])
    assert (args.kl_estimator, args.kl_placement) == (estimator, placement)
    assert args.kl_controller == (controller[0] if controller else "fixed")
    assert Path(args.output_dir).name == path.stem


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_asks_and_what_came_out(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert header[0].startswith("# Question: ")
    assert f"--config {path.relative_to(RECIPES.parent).as_posix()}" in text
    for label in ("# Hardware: ", "# Outcome: "):
        assert any(line.startswith(label) and len(line) > len(label) + 10 for line in header), label


@pytest.mark.parametrize("path", sorted((RECIPES / "starter").glob("grpo_*.yaml")), ids=lambda path: path.stem)
def test_starter_recipes_run(
    path: Path, starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own settings, on fewer steps and a less trained starter: trains, evaluates, saves and reports."""
    monkeypatch.chdir(tmp_path)
    overrides = {
        "model_name_or_path": starter / "model",
        "dataset_name": starter / "data",
        "output_dir": tmp_path / "run",
        "max_steps": 4,
        "eval_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 32,
    }
    argv = ["--config", str(path), *(part for name, value in overrides.items() for part in (f"--{name}", str(value)))]
    assert main(argv) == 0
    folder = tmp_path / "run"
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [entry for entry in history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4]
    assert evaluations[0]["eval_kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert evaluations[1]["eval_kl/sequence"] > 0
    for name in ("reward_vs_kl.png", "kl_control.png", "model.safetensors", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    resolved = yaml.safe_load((folder / "resolved_recipe.yaml").read_text())
    recipe = yaml.safe_load(path.read_text())
    assert resolved["max_steps"] == 4
    assert all(resolved[name] == value for name, value in recipe.items() if name.startswith("kl_"))
    assert {"trl_klx", "trl", "torch"} <= set(json.loads((folder / "versions.json").read_text()))
    again = ["--config", str(folder / "resolved_recipe.yaml")]
    _, args, _ = parse_recipe("test", (RunArguments, KLXGRPOConfig, ModelConfig), again)
    assert (args.max_steps, args.kl_estimator, args.beta) == (4, resolved["kl_estimator"], recipe["beta"])
    printed = capfd.readouterr().out
    assert "held-out prompts" in printed
    assert "KL, nats per sequence" in printed
