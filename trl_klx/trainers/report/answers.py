"""`SampledAnswers`: a few answers of the policy with their rewards, in the run's folder and in its trackers."""

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame
from torch import Tensor
from transformers.integrations import TensorBoardCallback

from ...monitor.history import append_entries, read_history, write_entries
from ..parts import Part
from ..session.prompts import prompt_number

logger = logging.getLogger(__name__)
ANSWERS_FILE = "completions/samples.jsonl"  # of what is in this folder nothing is pushed
SHOWN = 4  # answers of a log, each to another prompt
TIMES = 100  # that a run shows answers of training, spread evenly; of evaluations it shows all
TABLES = ("wandb", "trackio")


class _Rollout(NamedTuple):
    """Of this process: prompts, their answers, and (at least as many, F) rewards by their names, or none."""

    prompts: Sequence[Any]
    answers: Sequence[Any]
    names: Sequence[str]
    rewards: Tensor | None


class SampledAnswers(Part):
    """Shows answers at each log: the latest of training, the first of an evaluation, whose prompts are always the same.

    Args:
        trainer: the trainer, of whose first process the answers are.
        sends_tables: whether tables go to wandb and trackio; TRL's own trainer may send them already.
    """

    def __init__(self, trainer: Any, *, sends_tables: bool = True) -> None:
        self._trainer, self._sends_tables = trainer, sends_tables
        self._rollouts: dict[str, _Rollout] = {}
        self._resumed_at, self._last_time, self._is_open = 0, -1, False

    def add(
        self,
        mode: str,
        prompts: Sequence[Any],
        answers: Sequence[Any],
        names: Sequence[str] = (),
        rewards: Tensor | None = None,
    ) -> None:
        """Take a rollout of this process; behind its rows, `rewards` may have those of the others."""
        if mode == "train" or mode not in self._rollouts:
            self._rollouts[mode] = _Rollout(prompts, answers, names, rewards)

    def begin(self) -> None:
        self._rollouts.clear()
        self._resumed_at, self._last_time, self._is_open = 0, -1, False

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        self._resumed_at = self._trainer.state.global_step

    def log(self, mode: str, found: dict[str, float], evaluation: str | None) -> dict[str, float]:
        rollout, trainer = self._rollouts.pop(mode, None), self._trainer
        step = trainer.state.global_step
        if rollout is None or not trainer.accelerator.is_main_process:
            return {}
        if evaluation is None:
            time = step * TIMES // max(trainer.state.max_steps, 1)
            if time == self._last_time:
                return {}
            self._last_time = time
        rows = list(islice(_rows(rollout), SHOWN))
        if trainer.args.kl_report:
            self._write([{"step": step, "phase": evaluation or "train", **row} for row in rows])
        if trainer.args.log_completions:
            self._send(f"{evaluation or 'train'}/answers", rows, step)
        return {}

    def _write(self, entries: list[dict[str, Any]]) -> None:
        path = Path(self._trainer.args.output_dir) / ANSWERS_FILE
        if not self._is_open:  # a new run begins a new file; a resumed one keeps what comes before its checkpoint
            earlier = read_history(path) if self._resumed_at else []
            entries = [entry for entry in earlier if entry["step"] <= self._resumed_at] + entries
        try:
            (append_entries if self._is_open else write_entries)(path, entries)
            self._is_open = True
        except OSError as error:  # a full disk must not end the run here; the next checkpoint reports it
            logger.warning("answers of step %d are missing in %s (%s)", entries[-1]["step"], path, error)

    def _send(self, title: str, rows: list[dict[str, Any]], step: int) -> None:
        flat = [{**row, "rewards": " ".join(f"{k} {v:.3g}" for k, v in row["rewards"].items())} for row in rows]
        table = DataFrame([{name: str(value) for name, value in row.items()} for row in flat])
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(title, "\n\n".join(map(_markdown, flat)), step)
        for name in TABLES if self._sends_tables else ():
            if name in self._trainer.args.report_to:
                tracker: Any = import_module(name)
                tracker.log({title: tracker.Table(dataframe=table), "train/global_step": step})


def _markdown(row: dict[str, Any]) -> str:
    indented = [str(row[name]).replace("\n", "\n    ") for name in ("prompt", "answer")]
    return "prompt\n\n    {}\n\nanswer\n\n    {}\n\n{rewards}".format(*indented, **row)


def _rows(rollout: _Rollout) -> Iterator[dict[str, Any]]:
    """One answer to each prompt."""
    rewards = [] if rollout.rewards is None else rollout.rewards[: len(rollout.prompts)].tolist()
    seen: set[int] = set()
    for row, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        if (number := prompt_number(prompt)) in seen:
            continue
        seen.add(number)
        by_name = dict(zip(rollout.names, rewards[row], strict=True)) if rewards else {}
        yield {"prompt": prompt, "answer": answer, "rewards": {n: v for n, v in by_name.items() if v == v}}  # not NaN
