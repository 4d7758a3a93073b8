"""Whole runs through a real engine: a recipe from the command line to the report, and two processes.

The last of these files: the end of a recipe's run takes the process group of all engines with it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import vllm_engine
import yaml

from trl_klx.run import grpo, ppo
from trl_klx.tasks import starter
from trl_klx.tasks.starter import make_starter

RECIPES = Path(__file__).parent.parent.parent / "recipes" / "starter"


def test_two_processes_with_an_engine_each(model: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_processes.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path), model]
    os.sched_setaffinity(0, vllm_engine.CORES)
    done = subprocess.run(command, env=vllm_engine.BEFORE, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    processes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for algorithm in ("grpo", "ppo"):
        first, second = (runs[algorithm] for runs in processes)
        assert first["processes"] == second["processes"] == 2
        assert first["weights"] == second["weights"]
        assert first["answers"] != second["answers"]  # each engine has its own seed
        assert len(first["logs"]) == 3
        for one, other in zip(first["logs"], second["logs"], strict=True):
            assert 0 < one["kl/sampler"] < 5e-3
            for name in ("kl", "kl/sampler", "kl/sampler_se", "kl/weight_mean", "kl/ess", "kl/ratio_cut"):
                assert one[name] == other[name], name


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's model and data."""
    folder = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "PAIR_TRAIN_PROMPTS", 256)  # the pairs are not used
        patch.setattr(starter, "PAIR_TEST_PROMPTS", 64)
        make_starter(folder, steps=20, progress=False)
    return folder


@pytest.mark.parametrize("command", [grpo, ppo], ids=["grpo", "ppo"])
def test_a_recipe_runs_through_the_engine(command: ModuleType, start: Path, tmp_path: Path) -> None:
    own = {
        "model_name_or_path": str(start / "model"),
        "dataset_name": str(start / "data"),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 32,
        "max_steps": 4,
        "eval_strategy": "no",
        "eval_on_start": False,
        "logging_steps": 1,
        "use_vllm": True,
        "vllm_max_model_length": 64,
        "report_to": "none",
    }
    name = command.__name__.rpartition(".")[2]
    recipe = tmp_path / f"{name}_recipe.yaml"
    stock = (RECIPES / f"{name}_exact_both_pid.yaml").read_text()
    recipe.write_text(yaml.safe_dump(yaml.safe_load(stock) | own))
    assert command.main(["--config", str(recipe)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "kl/sampler" in row]
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["kl/sampler"] < 5e-3 and "kl/sampler_se" in row and row["kl/ratio_cut"] == 0
    assert (tmp_path / "run" / "README.md").read_text()
