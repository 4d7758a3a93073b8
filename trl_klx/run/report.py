"""What a run leaves behind: the resolved recipe and versions at its start, a table and pictures at its end."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from ..config import KLArguments
from ..monitor.history import HISTORY_FILE, read_history
from ..monitor.plots import plot_run

_VERSIONED = ("trl_klx", "trl", "torch", "transformers", "accelerate", "datasets", "peft")


def write_resolved_recipe(folder: Path, *arguments) -> None:
    """Write every field with the value it ended up with (`resolved_recipe.yaml`) and the versions (`versions.json`)."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved: dict = {}
    for group in arguments:
        fields = group.to_dict() if hasattr(group, "to_dict") else vars(group)
        resolved |= {name: value for name, value in fields.items() if _plain(value)}
    (folder / "resolved_recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=True))
    versions = {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def report(folder: Path, args: KLArguments) -> None:
    """Print the summary table and draw the pictures, from the metrics file of the run."""
    history = read_history(folder / HISTORY_FILE)
    pictures = plot_run(history, folder, target_unit=args.kl_target_unit)
    console = Console()
    console.print(summary_table(history, args))
    for path in pictures:
        console.print(f"picture: {path}")


def summary_table(history: list[dict], args: KLArguments) -> Table:
    """Before and after, on held-out prompts where the run evaluated, else on its first and last training batches."""
    evaluated = [entry for entry in history if "eval_reward" in entry]
    if len(evaluated) >= 2:
        prefix, source, entries = "eval_", "held-out prompts", evaluated
    else:
        prefix, source, entries = "", "training batches", [entry for entry in history if "reward" in entry]
    table = Table(title=f"{args.kl_estimator} in {args.kl_placement}, {args.kl_controller} beta ({source})")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("target", justify="right")
    if not entries:
        return table
    first, last = entries[0], entries[-1]
    unit = args.kl_target_unit
    target = "" if args.kl_target is None else f"{args.kl_target:g}"

    def row(label: str, name: str, goal: str = "", error: str | None = None) -> None:
        cells = [_number(entry, prefix + name, None if error is None else prefix + error) for entry in (first, last)]
        table.add_row(label, *cells, goal)

    row("mean reward (accuracy, if it is 0 or 1)", "reward")
    row("KL, nats per sequence", "kl/sequence", target if unit == "sequence" else "", "kl/sequence_se")
    reading = f"kl/{args.kl_reading}"
    row(f"KL ({args.kl_reading}), nats per token", reading, target if unit == "token" else "", f"{reading}_se")
    betas = [entry["kl/coef"] for entry in history if "kl/coef" in entry]
    if betas:
        table.add_row("beta", f"{betas[0]:.3g}", f"{betas[-1]:.3g}", "")
    return table


def _number(entry: dict, name: str, error_name: str | None) -> str:
    value = entry.get(name)
    if not isinstance(value, (int, float)):
        return "-"
    error = entry.get(error_name) if error_name else None
    has_error = isinstance(error, (int, float)) and math.isfinite(error)
    return f"{value:.3f} ± {error:.3f}" if has_error else f"{value:.3f}"
