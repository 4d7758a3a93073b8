"""What the controllers are tried on: recipes of this repository, each at several targets."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from trl_klx.config.choices import CONTROLLER_SETTINGS
from trl_klx.monitor.history import HISTORY_FILE, read_history
from trl_klx.run import grpo, ppo

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SMALL = {"eval_on_start": False, "eval_strategy": "no", "disable_tqdm": True, "report_to": [], "logging_steps": 1}


@dataclass(frozen=True)
class Task:
    """A recipe whose KL is to be held, in nats per sequence; it starts from the recipe's own beta."""

    recipe: str
    main: Callable[[list[str]], int]
    coef: str  # the recipe's field for beta
    steps: int
    targets: tuple[float, ...]
    betas: tuple[float, ...]  # fixed ones: the frontier of reward over KL
    prepare: str  # the command that makes its model and data
    changes: tuple[tuple[str, Any], ...] = ()


# Controllers beside those of the package: pid where a step's KL is limited to this share of the target.
LIMITED, STEP_SHARE = "pid, steps limited", 0.015

_STARTER = "trl-klx starter --output_dir runs/starter"
TASKS = {
    "grpo": Task(
        "starter/grpo_exact_both_pid.yaml", grpo.main, "beta", 600, (0.4, 0.2, 0.8), (0.25, 0.5, 1.0, 2.0), _STARTER
    ),
    # At twice the recipe's learning rate: a step takes the policy four times as far.
    "grpo-fast": Task(
        "starter/grpo_exact_both_pid.yaml",
        grpo.main,
        "beta",
        300,
        (0.4,),
        (0.25, 0.5, 1.0, 2.0),
        _STARTER,
        (("learning_rate", 2e-4),),
    ),
    "ppo": Task(
        "starter/ppo_exact_both_pid.yaml", ppo.main, "kl_coef", 150, (0.4, 0.2, 0.8), (0.1, 0.2, 0.4, 0.8), _STARTER
    ),
    "stories": Task(
        "tinystories-15m/grpo_exact_both_pid.yaml",
        grpo.main,
        "beta",
        90,
        (12.8, 6.4),
        (0.05, 0.1, 0.2, 0.4),
        "python recipes/tinystories-15m/prepare.py",
        (("gold_reward_func", None), ("gold_action", None)),
    ),
    # Two minutes on a GPU; on one core of a CPU, half a minute a step with bf16 in hardware (AMX).
    "sums": Task(
        "smollm2-135m/grpo_exact_both_pid.yaml",
        grpo.main,
        "beta",
        100,
        (1.0, 2.0),
        (0.02, 0.05, 0.1, 0.2),
        "python recipes/smollm2-135m/prepare.py",
        (
            ("per_device_train_batch_size", 64),
            ("use_cpu", not torch.cuda.is_available()),
            ("learning_rate", 2e-4),
            ("bf16", True),
        ),
    ),
}


def recipe_of(task: Task, controller: str, level: float, seed: int, steps: int, runs: Path) -> dict[str, Any]:
    """The task's recipe with this controller; `level` is the target, or the beta of a fixed one."""
    recipe = yaml.safe_load((RECIPES / task.recipe).read_text())
    recipe = {name: value for name, value in recipe.items() if name not in CONTROLLER_SETTINGS}
    is_limited = controller == LIMITED
    recipe |= {**SMALL, **dict(task.changes), "kl_controller": "pid" if is_limited else controller}
    recipe |= {"seed": seed, "max_steps": steps}
    recipe |= {task.coef: level} if controller == "fixed" else {"kl_target": level}
    recipe["kl_step_limit"] = STEP_SHARE * level if is_limited else None
    for name in ("model_name_or_path", "dataset_name"):
        recipe[name] = str(runs / Path(recipe[name]).relative_to("runs"))
    return {name: value for name, value in recipe.items() if value is not None}


def trained(task: Task, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Train the recipe; its log, one entry for each step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | {"output_dir": folder}))
        with contextlib.redirect_stdout(io.StringIO()):
            status = task.main(["--config", str(path)])
        if status:
            raise RuntimeError(f"{task.recipe} ended with status {status}; its model and data: {task.prepare}")
        return read_history(Path(folder) / HISTORY_FILE)
