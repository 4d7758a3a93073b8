"""Traces of runs as data, one JSON line each: what the controller read and set, and the reward, step by step."""

import json
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = {"kl": "kl/sequence", "kl_se": "kl/sequence_se", "coef": "kl/coef", "reward": "reward"}  # the log's names

Trace = dict[str, Any]


class Key(NamedTuple):
    """Which run it is; `level` is the target in nats per sequence, or the beta of a fixed one."""

    task: str
    controller: str
    level: float
    seed: int
    steps: int


def trace_of(key: Key, start: float, history: list[dict[str, Any]], every: int = 1) -> Trace:
    """The key, beta before the first step, the steps behind a value, and four digits of each value, by column.

    `coef` is the beta of the step, before the controller has the step's reading.
    """
    logged = [entry for entry in history if COLUMNS["kl"] in entry and COLUMNS["coef"] in entry]
    columns = {name: [_short(entry.get(field, 0.0)) for entry in logged] for name, field in COLUMNS.items()}
    seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {**key._asdict(), "start": start, "every": every, "seconds": round(seconds), **columns}


def key_of(trace: Trace) -> Key:
    return Key(*(trace[name] for name in Key._fields))


def read_traces(folder: Path) -> dict[Key, Trace]:
    """All traces of a folder, by their keys; a line that an interruption cut short is left out."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                trace = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[key_of(trace)] = trace
    return found


def add_trace(folder: Path, trace: Trace) -> None:
    """Append it to its task's file, on a line of its own also after one that an interruption cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trace['task']}.jsonl"
    text = path.read_text() if path.exists() else ""
    with path.open("a") as lines:
        lines.write("\n" * (text != "" and not text.endswith("\n")) + json.dumps(trace, separators=(",", ":")) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.4g}")
