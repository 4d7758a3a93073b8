"""Every logged metric as one JSON line, written as it is logged: a crash loses nothing that was printed."""

import json
import logging
import os
import re
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

HISTORY_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


class HistoryCallback(TrainerCallback):
    """Appends each log entry to `<output_dir>/metrics.jsonl`, from the main process; a fresh run starts it afresh."""

    _end: dict | None = None  # the last entry of a run that had ended, until it trains on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir or ".") / HISTORY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        # On resume, drop what an interrupted run logged past its last checkpoint: those steps are run again. So is the
        # end of a run that goes on after all.
        known = [e for e in read_history(path) if state.global_step > 0 and e.get("step", 0) <= state.global_step]
        kept = [entry for entry in known if "train_runtime" not in entry]
        self._end = known[-1] if known and known[-1] not in kept and known[-1]["step"] == state.global_step else None
        partial = path.with_suffix(".partial")  # killed here, the run has the old file or the new one
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(partial, path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, **logs}
            if self._end is not None and self._end["step"] == state.global_step and "train_runtime" in logs:
                entry = self._end  # nothing was trained since: its time and loss are the run's
            path = Path(args.output_dir or ".") / HISTORY_FILE
            try:
                with path.open("a") as file:
                    file.write(json.dumps(entry, default=str) + "\n")
            except OSError as error:  # a full disk is no reason to lose the step; the next checkpoint says so
                logger.warning("step %d is missing in %s (%s)", state.global_step, path, error)


def read_history(path: Path) -> list[dict]:
    """Entries of a metrics file; a last line cut short by a crash is left out. An absent file is an empty history."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def evaluated_sets(history: list[dict], *metrics: str) -> list[str]:
    """The prefixes under which evaluations logged one of `metrics`: eval_ and, of several sets, eval_<name>_."""
    names = "|".join(map(re.escape, metrics))
    wanted = re.compile(rf"(eval_(?:.+_)?)(?:{names})")
    found = [match[1] for entry in history for name in entry if (match := wanted.fullmatch(name))]
    return list(dict.fromkeys(found))


def set_name(prefix: str) -> str:
    """The name in such a prefix; empty where there is one set without a name."""
    return prefix.removeprefix("eval_").removesuffix("_")


def when(history: list[dict], entry: dict) -> str:
    """Of what steps an entry is, for a table: before or after training, or the steps whose mean it is."""
    step = int(entry.get("step", 0))
    if any(name.startswith("eval_") for name in entry):
        end = max(int(logged.get("step", 0)) for logged in history)
        return {0: "before", end: "after"}.get(step, f"after step {step}")
    earlier = [int(logged.get("step", 0)) for logged in history if not any(name.startswith("eval_") for name in logged)]
    first = max((other for other in earlier if other < step), default=0) + 1
    return f"step {step}" if first == step else f"steps {first} to {step}"
