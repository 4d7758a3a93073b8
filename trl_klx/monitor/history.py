"""Every logged metric as one JSON line, written as it is logged: a crash loses nothing that was printed."""

import json
import logging
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import whole

HISTORY_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


class HistoryCallback(TrainerCallback):
    """Appends each log entry to `<output_dir>/metrics.jsonl`, from the main process; a new run starts a new file."""

    _end: dict | None = None  # the last entry of a run that had ended, until it trains on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir or ".") / HISTORY_FILE
        # On resume, drop what an interrupted run logged past its last checkpoint: those steps are run again. So is the
        # end of a run that continues after all.
        known = [e for e in read_history(path) if state.global_step > 0 and e.get("step", 0) <= state.global_step]
        kept = [entry for entry in known if "train_runtime" not in entry]
        self._end = known[-1] if known and known[-1] not in kept and known[-1]["step"] == state.global_step else None
        write_entries(path, kept)

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
            append_entries(Path(args.output_dir or ".") / HISTORY_FILE, [entry])


def write_entries(path: Path, entries: list[dict]) -> None:
    """Write a file of entries, one JSON line each."""
    with whole(path) as partial:
        partial.write_text(_lines(entries))


def append_entries(path: Path, entries: list[dict]) -> None:
    """Add entries, which have a `step`, to such a file; where it cannot be written, warn."""
    try:
        with path.open("a") as file:
            file.write(_lines(entries))
    except OSError as error:  # a full disk must not end the run here; the next checkpoint reports it
        logger.warning("step %d is missing in %s (%s)", entries[-1]["step"], path, error)


def _lines(entries: list[dict]) -> str:
    return "".join(json.dumps(entry, default=str) + "\n" for entry in entries)


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
