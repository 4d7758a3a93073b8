"""What a run shows at its end: a table and pictures, from its metrics file."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...config.options import KLArguments
from ...monitor.health.alarms import HEALTH_FILE
from ...monitor.history import HISTORY_FILE, read_history
from ...monitor.metrics import evaluated_sets, is_number, logged_groups, set_name, when
from ...monitor.plots import plot_run

# Of these, every batch of a run has one: reward in GRPO and PPO, accuracies in DPO.
_EVERY_BATCH = ("reward", "rewards/accuracies")
_PREFERENCES = (
    ("pairs ranked right (ties wrong)", "rewards/accuracies"),
    ("implicit reward margin", "rewards/margins"),
    ("log-ratio margin, nats", "log_ratio/margin"),
)


def show_outcome(console: Console, folder: Path, args: KLArguments) -> None:
    """Print the summary table and draw the pictures, from the metrics file of the run."""
    history = read_history(folder / HISTORY_FILE)
    pictures = plot_run(
        history, folder, target_unit=args.kl_target_unit, reading=args.kl_reading, coef_name=args.kl_coef_name
    )
    console.print(summary_table(history, args))
    for line in health_lines(folder, args):
        console.print(line, markup=False, highlight=False)
    for path in pictures:
        console.print(f"picture: {path}")


def health_lines(folder: Path, args: KLArguments) -> list[str]:
    """The health alarms of a run, one line each: when they began and ended, what was seen, and what to change."""
    if not args.kl_health:
        return ["health alarms are switched off (kl_health)"]
    lines: list[str] = []
    began: dict[str, int] = {}
    for event in read_history(folder / HEALTH_FILE):
        if "ends" in event:
            lines[began[event["alarm"]]] += f" (until step {event['step']})"
            continue
        began[event["alarm"]] = len(lines)
        lines.append(
            f"health alarm {event['alarm']} at step {event['step']}: {event['evidence']}. Likely cause: "
            f"{event['cause']}. What to change: {event['remedy']}."
        )
    return lines or ["no health alarms"]


def summary_table(history: list[dict], args: KLArguments) -> Table:
    """First and last, on held-out prompts where the run evaluated twice, else on its training batches."""
    read = {prefix: _logged(history, prefix) for prefix in evaluated_sets(history, *_EVERY_BATCH)}
    read = {prefix: entries for prefix, entries in read.items() if len(entries) >= 2}
    source = "held-out prompts"
    if not read:
        read, source = {"": _logged(history, "")}, "training batches"
    entries = next(iter(read.values()))
    if "rewards/accuracies" in (entries or [{}])[-1]:
        source += "; KL of answers to held-out prompts"  # DPO's probe
    title = f"{args.kl_estimator} KL in {args.kl_placement}, {args.kl_controller} {args.kl_coef_name}"
    table = Table("", title=title, caption=f"mean ± standard error, {source}")
    ends = [when(history, entry) for entry in (entries[0], entries[-1])] if entries else ["before", "after"]
    for column in (*ends, "target"):
        table.add_column(column, justify="right")
    if not entries:
        return table
    for prefix, logged in read.items():
        for row in _set_rows(history, prefix, logged, args):
            table.add_row(*row)
    coefs = [entry["kl/coef"] for entry in history if "kl/coef" in entry]
    if coefs:
        start = args.kl_coef_start if ends[0] == "before" else coefs[0]
        table.add_row(args.kl_coef_name, f"{start:.3g}", f"{coefs[-1]:.3g}", "")
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    if seconds:
        table.add_row("steps", "0" if ends[0] == "before" else "", str(history[-1]["step"]), "")
        table.add_row("seconds", "", f"{seconds[-1]:.0f}", "")
    return table


def _logged(history: list[dict], prefix: str) -> list[dict]:
    """The entries of an evaluation set, or of training."""
    return [entry for entry in history if any(f"{prefix}{name}" in entry for name in _EVERY_BATCH)]


def _set_rows(history: list[dict], prefix: str, entries: list[dict], args: KLArguments) -> Iterator[tuple[str, ...]]:
    """Rows of gains and KL, first and last; of several sets, each has its name behind the label."""
    name = set_name(prefix) if prefix else ""
    of_set = f" ({name})" if name else ""
    for label, metric in _gains(entries[-1], prefix):
        yield label + of_set, _number(entries[0], prefix + metric), _number(entries[-1], prefix + metric), ""
    # DPO measures the KL now and then, so that not every training batch has it.
    measured = [entry for entry in entries if f"{prefix}kl/sequence" in entry] or entries
    ends = measured[0], measured[-1]
    if (ends[0]["step"], ends[1]["step"]) != (entries[0]["step"], entries[-1]["step"]):
        of_set += f", {when(history, ends[0])} and {when(history, ends[1])}"
    one_target = args.kl_target is not None and not args.kl_group_column
    target = f"{args.kl_target:g}" if one_target else ""
    for unit, metric in (("sequence", "kl/sequence"), ("token", f"kl/{args.kl_reading}")):
        numbers = (_number(entry, prefix + metric, f"{prefix}{metric}_se") for entry in ends)
        yield f"KL, nats per {unit}{of_set}", *numbers, target if unit == args.kl_target_unit else ""
    if f"{prefix}kl/origin" in ends[-1]:
        numbers = (_number(entry, f"{prefix}kl/origin", f"{prefix}kl/origin_se") for entry in ends)
        yield f"KL to the start, nats per sequence{of_set}", *numbers, ""
    for group in logged_groups([ends[-1]]):
        metric, own = f"{prefix}kl_groups/{group}/{args.kl_target_unit}", args.kl_target_of(group)
        numbers = (_number(entry, metric, f"{metric}_se") for entry in ends)
        yield f"  of {group}, nats per {args.kl_target_unit}{of_set}", *numbers, "" if own is None else f"{own:g}"


def _gains(entry: dict, prefix: str) -> list[tuple[str, str]]:
    """(label, metric) of what the run was to raise: each reward function of GRPO and PPO, or DPO's own measures."""
    names = [name.removeprefix(prefix) for name in entry if name.startswith(f"{prefix}rewards/")]
    functions = [(f"reward {name.split('/')[1]}", name) for name in names if name.endswith("/mean")]
    return functions + [(label, name) for label, name in _PREFERENCES if prefix + name in entry]


def _number(entry: dict, name: str, error_name: str = "") -> str:
    value, error = entry.get(name), entry.get(error_name)
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.3f} ± {error:.3f}" if is_number(error) else f"{value:.3f}"
