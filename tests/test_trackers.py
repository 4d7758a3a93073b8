"""TensorBoard and trackio get every metric of a run, under names that group well there, and a few of its answers.

wandb: tests/trackers/wandb_offline.py.
"""

import sys
from pathlib import Path

import pytest
from support.fault_tools import make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_grpo import make_trainer, save_tiny
from trackio.sqlite_storage import SQLiteStorage

from trl_klx.monitor.history import read_history
from trl_klx.trainers.report.answers import ANSWERS_FILE

WANTED = (
    "reward",
    "kl",
    "kl_se",
    "kl/exact",
    "kl/exact_se",
    "kl/k3",
    "kl/sequence",
    "kl/sequence_se",
    "kl/coef",
)
WANTED += ("kl_groups/0/sequence", "kl_groups/0/coef", "kl_groups/0/target")
OPTIONS = {
    "kl_estimator": "exact",
    "kl_controller": "pid",
    "kl_target": 0.1,
    "kl_group_column": "answer",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(autouse=True)
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules have read the folder from the environment when they were imported, and TRL imports them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and "TRACKIO_DIR" in vars(module):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


def test_tensorboard_and_trackio_get_the_metrics(tmp_path: Path) -> None:
    options = {**OPTIONS, "report_to": ["tensorboard", "trackio"], "project": "kl", "run_name": "tiny"}
    trainer = make_trainer(save_tiny(tmp_path / "model"), tmp_path / "run", **options)
    trainer.train()

    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for name in WANTED:
        shown = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert shown == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logged if name in entry], (
            name
        )
        assert shown, name
    assert board.Scalars("eval/kl/sequence")[0].step == 3

    rows = SQLiteStorage.get_logs("kl", "tiny")
    for name in WANTED:
        shown_at = {row["train/global_step"]: row[f"train/{name}"] for row in rows if f"train/{name}" in row}
        assert shown_at == {entry["step"]: entry[name] for entry in logged if name in entry}, name
    assert any("eval/kl/sequence" in row for row in rows)


@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "grpo"])
def test_trackers_get_answers_where_they_are_asked_for(algorithm: str, tmp_path: Path) -> None:
    options = {"max_steps": 2, "report_to": ["tensorboard", "trackio"], "project": algorithm, "run_name": "tiny"}
    make(algorithm, tmp_path / "asked", log_completions=True, **options).train()
    kept = read_history(tmp_path / "asked" / ANSWERS_FILE)
    (events,) = (tmp_path / "asked").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("train/answers/text_summary")]
    assert len(texts) == 2
    for step, text in enumerate(texts, 1):
        for entry in kept:
            assert (f"    {entry['answer']}\n" in text) or entry["step"] != step
    rows = [row for row in SQLiteStorage.get_logs(algorithm, "tiny") if {"train/answers", "completions"} & set(row)]
    assert len(rows) == (3 if algorithm == "grpo" else 2)  # TRL's table comes with the summary, too
    if algorithm != "grpo":
        assert [row["train/global_step"] for row in rows] == [1, 2]

    make(algorithm, tmp_path / "not", **options | {"run_name": "not", "report_to": ["tensorboard"]}).train()
    (events,) = (tmp_path / "not").rglob("events.out.tfevents.*")
    assert not any("answers" in tag for tag in EventAccumulator(str(events.parent)).Reload().Tags()["tensors"])
