"""What the traces say, one row for each task, controller and target: mean over the seeds, and their range."""

import statistics
from collections.abc import Sequence

from rich.table import Table

from .figures import end_of, figures, over_frontier
from .traces import Key, Trace

COLUMNS = {
    "within": "means within 25 %",
    "single": "single steps",
    "possible": "possible",
    "overshoot": "highest mean",
    "undershoot": "lowest mean",
    "crossed": "crossed at",
    "stays": "stays after",
}


def control_table(traces: dict[Key, Trace]) -> Table:
    table = Table(
        title="How the KL was held",
        caption="Mean over the seeds (range), from the first mean of five steps at 75 % of the target on. `possible`: "
        "share of single steps within 25 % at a KL that is the target. Over the frontier: reward at the end, less that "
        "of fixed betas at the same KL.",
    )
    for column in ("task, controller", "level", "seeds", *COLUMNS.values(), "KL at the end", "reward", "over frontier"):
        is_name = column.startswith("task")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in dict.fromkeys((key.task, key.controller, key.level, key.steps) for key in traces):
        mine = [trace for key, trace in traces.items() if (key.task, key.controller, key.level, key.steps) == row]
        fixed = [t for key, t in traces.items() if (key.task, key.controller, key.steps) == (row[0], "fixed", row[3])]
        table.add_row(f"{row[0]}, {row[1]}", f"{row[2]:g}", str(len(mine)), *_cells(mine, fixed, row[1]))
    return table


def _cells(traces: list[Trace], fixed: list[Trace], controller: str) -> list[str]:
    ends = [end_of(trace) for trace in traces]
    at_end = [spread([kl for kl, _ in ends]), spread([reward for _, reward in ends], 3)]
    if controller == "fixed":
        return ["-"] * len(COLUMNS) + at_end + ["-"]
    found = [figures(trace) for trace in traces]
    cells = [spread([getattr(f, name) for f in found], 0 if name in ("crossed", "stays") else 2) for name in COLUMNS]
    return cells + at_end + [spread([over_frontier(trace, fixed) for trace in traces], 3)]


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and range of what there is, and how many have none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ({min(known):.{digits}f} to {max(known):.{digits}f})"
    return text + f", {len(values) - len(known)} never" * (len(known) < len(values))
