"""What a run leaves behind: the resolved recipe and versions at its start, a table and pictures at its end."""

import json
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments
from trl import ModelConfig

from ..config import KLArguments
from ..monitor.history import HISTORY_FILE, read_history
from ..monitor.plots import plot_run
from .arguments import RunArguments

_VERSIONED = ("trl_klx", "trl", "torch", "transformers", "accelerate", "datasets", "peft")


def write_resolved_recipe(folder: Path, run: RunArguments, args: TrainingArguments, model: ModelConfig) -> None:
    """Write every field with the value it ended up with (`resolved_recipe.yaml`) and the versions (`versions.json`)."""
    folder.mkdir(parents=True, exist_ok=True)
    # `to_dict` and not `asdict`: it leaves the Hub token out.
    resolved = {**asdict(run), **asdict(model), **args.to_dict()}
    # Derived from two others, and refused beside them if the file is run again.
    del resolved["generation_batch_size"]
    plain = {name: value for name, value in resolved.items() if _plain(value)}
    (folder / "resolved_recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=True))
    versions = {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def report(folder: Path, args: KLArguments) -> None:
    """Print the summary table and draw the pictures, from the metrics file of the run."""
    history = read_history(folder / HISTORY_FILE)
    pictures = plot_run(history, folder, target_unit=args.kl_target_unit, reading=args.kl_reading)
    console = Console()
    console.print(summary_table(history, args))
    for path in pictures:
        console.print(f"picture: {path}")


def summary_table(history: list[dict], args: KLArguments) -> Table:
    """Before and after, on held-out prompts where the run evaluated, else on its first and last training batches."""
    evaluated = [entry for entry in history if "eval_reward" in entry]
    held_out = len(evaluated) >= 2
    entries = evaluated if held_out else [entry for entry in history if "reward" in entry]
    prefix, source = ("eval_", "held-out prompts") if held_out else ("", "training batches")
    title = f"{args.kl_estimator} KL in {args.kl_placement}, {args.kl_controller} beta"
    table = Table("", title=title, caption=f"mean ± standard error, {source}")
    for column in ("before", "after", "target"):
        table.add_column(column, justify="right")
    if not entries:
        return table
    ends = entries[0], entries[-1]
    target = "" if args.kl_target is None else f"{args.kl_target:g}"

    def row(label: str, name: str, goal: str = "", error: str = "") -> None:
        table.add_row(label, *(_number(entry, prefix + name, prefix + error) for entry in ends), goal)

    for name in entries[-1]:
        if name.startswith(f"{prefix}rewards/") and name.endswith("/mean"):
            row(f"reward {name.split('/')[1]}", name.removeprefix(prefix))
    per_sequence = args.kl_target_unit == "sequence"
    row("KL, nats per sequence", "kl/sequence", target if per_sequence else "", "kl/sequence_se")
    reading = f"kl/{args.kl_reading}"
    row("KL, nats per token", reading, "" if per_sequence else target, f"{reading}_se")
    betas = [entry["kl/coef"] for entry in history if "kl/coef" in entry]
    if betas:
        table.add_row("beta", f"{args.kl_coef_start:.3g}", f"{betas[-1]:.3g}", "")
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    if seconds:
        table.add_row("steps", "0", str(history[-1]["step"]), "")
        table.add_row("seconds", "", f"{seconds[-1]:.0f}", "")
    return table


def _number(entry: dict, name: str, error_name: str) -> str:
    value, error = entry.get(name), entry.get(error_name)
    if not isinstance(value, (int, float)):
        return "-"
    has_error = isinstance(error, (int, float)) and math.isfinite(error)
    return f"{value:.3f} ± {error:.3f}" if has_error else f"{value:.3f}"
