"""Logged metrics: which are numbers, and what their names tell."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

# PPO's eval_objective/rlhf_reward is no reward of a set called objective/rlhf.
EVAL_PREFIX = "eval_(?:(?!objective/|kl_groups/).+_)?"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without NaN (nothing counted, or an error bar of one prompt) and infinity: JSON loggers choke on them."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def is_training(entry: Mapping[str, Any]) -> bool:
    """Whether a log entry is of training steps: not of an evaluation, and not the summary at the end."""
    return "train_runtime" not in entry and not any(name.startswith("eval_") for name in entry)


def evaluated_sets(history: list[dict], *metrics: str) -> list[str]:
    """The prefixes under which evaluations logged one of `metrics`: eval_ and, of several sets, eval_<name>_."""
    wanted = re.compile(rf"({EVAL_PREFIX})(?:{'|'.join(map(re.escape, metrics))})")
    return list(dict.fromkeys(match[1] for entry in history for name in entry if (match := wanted.fullmatch(name))))


def set_name(prefix: str) -> str:
    """The name in such a prefix; empty where there is one set without a name."""
    return prefix.removeprefix("eval_").removesuffix("_")


def logged_groups(history: list[dict]) -> list[str]:
    """The groups of prompts whose KL was logged, of training or of evaluation; a name may have slashes of its own."""
    names = {name.partition("kl_groups/")[2] for entry in history for name in entry if "kl_groups/" in name}
    return sorted({name.rpartition("/")[0] for name in names})


def when(history: list[dict], entry: dict) -> str:
    """Of what steps an entry is, for a table: before or after training, or the steps whose mean it is."""
    step = int(entry.get("step", 0))
    if any(name.startswith("eval_") for name in entry):
        end = max(int(logged.get("step", 0)) for logged in history)
        return {0: "before", end: "after"}.get(step, f"after step {step}")
    earlier = [int(logged.get("step", 0)) for logged in history if not any(name.startswith("eval_") for name in logged)]
    first = max((other for other in earlier if other < step), default=0) + 1
    return f"step {step}" if first == step else f"steps {first} to {step}"
