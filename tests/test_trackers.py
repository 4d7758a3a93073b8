"""TensorBoard and trackio get every metric of a run, under names that group well there."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_grpo import make_trainer, save_tiny

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


def test_tensorboard_and_trackio_get_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage  # reads the folder from the environment when it is imported

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
