"""The KL budget: which checkpoint is the last within it, and what becomes of the others."""

import logging
import math
from pathlib import Path

import pytest
from test_grpo import make_trainer, save_tiny

from trl_klx.trainers.checkpoints.whole import STATE_FILE
from trl_klx.trainers.session.budget import KLBudget

BUDGET = {
    "beta": 1e-4,
    "kl_budget": 0.5,
    "max_steps": 80,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def budget(limit: float | None = 1.0, *, ends_run: bool = True) -> KLBudget:
    return KLBudget(limit, ends_run=ends_run)


def test_compares_a_mean_over_about_five_readings() -> None:
    one = budget()
    for kl in (0.5, math.nan, 3.0, math.inf):
        one.read(kl)
    assert one.kl == pytest.approx((0.2 * 3.0 + 0.16 * 0.5) / 0.36)
    assert one.exceeded
    assert one.ends_run
    assert not budget(ends_run=False).ends_run


def test_a_checkpoint_is_within_only_when_the_next_reading_is() -> None:
    one = budget()
    one.read(0.1)
    one.wrote(Path("first"), extra=False)
    assert one.checkpoint is None
    one.read(0.2)
    assert one.checkpoint == "first"
    one.wrote(Path("second"), extra=True)
    one.read(9.0)
    assert one.exceeded
    assert one.checkpoint == "first"
    for _ in range(30):
        one.read(0.1)  # back within: a checkpoint that was not, is not
    assert one.checkpoint == "first"


def test_a_checkpoint_is_due_every_twentieth_of_the_budget() -> None:
    one, due = budget(), []
    for kl in (0.01, 0.04, 0.06, 0.08, 0.2, 0.2, 0.2):
        one._sum, one._weight = kl, 1.0
        due.append(one.checkpoint_is_due())
    assert due == [False, False, True, False, True, False, False]
    assert not budget(None).checkpoint_is_due()


def test_only_checkpoints_made_for_the_budget_are_superseded() -> None:
    one = budget()
    for name, extra in (("regular", False), ("extra", True), ("last", True)):
        one.wrote(Path(name), extra=extra)
        one.read(0.1)
    assert one.superseded == ["extra"]
    assert one.checkpoint == "last"


def test_state_goes_on(tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint-1"
    kept.mkdir()
    one = budget()
    one.wrote(kept, extra=True)
    one.read(0.4)
    again = budget()
    again.load(one.state(), tmp_path)
    again.wrote(Path("next"), extra=False)
    for each in (one, again):
        each.read(0.5)
    assert again.kl == one.kl
    assert again.superseded == [str(kept)]
    with pytest.raises(ValueError, match="budget="):
        budget().load({"sum": math.nan, "weight": 1.0, "checkpointed": 0.0}, tmp_path)


def test_a_budget_that_is_found_in_the_run_keeps_an_earlier_checkpoint(tmp_path: Path) -> None:
    one = budget(None)
    for number, kl in enumerate((0.1, 0.5, 2.0, 4.0)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        one.wrote(folder, extra=False)
        for _ in range(60):  # until the mean has followed
            one.read(kl)
    again = budget(None)
    again.load(one.state(), tmp_path)
    assert not again.exceeded
    again.set_limit(0.75)
    assert again.checkpoint == str(tmp_path / "checkpoint-1")
    assert again.checkpoint_kl == pytest.approx(0.8 * 0.1 + 0.2 * 0.5, rel=1e-3)  # of the reading after it
    assert again.read(4.0)
    assert again.ends_run


def whole_checkpoints_of(folder: Path) -> list[str]:
    return sorted(str(path.parent) for path in folder.glob(f"checkpoint-*/{STATE_FILE}"))


def test_run_stops_and_keeps_the_last_checkpoint_within(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(model_path, tmp_path, **BUDGET)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    steps, kept = trainer.state.global_step, trainer.kl.budget.checkpoint
    assert 2 < steps < 80
    assert kept is not None
    assert f"the last checkpoint within the budget is {kept}" in caplog.text
    assert whole_checkpoints_of(tmp_path) == sorted({kept, str(tmp_path / f"checkpoint-{steps}")})
    history = {entry["step"]: entry["kl/sequence"] for entry in trainer.state.log_history if "kl/sequence" in entry}
    place = int(kept.rsplit("-", 1)[1])
    # What the kept checkpoint's own answers show, at the step after it, less smoothed than what the budget compares.
    assert history[place + 1] < 0.5 * 1.5
    assert trainer.kl.budget.checkpoint_kl <= 0.5 < trainer.kl.budget.kl


def test_regular_checkpoints_stay(model_path: str, tmp_path: Path) -> None:
    """Also those that the budget asked for too."""
    options = {**BUDGET, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model_path, tmp_path, **options)
    trainer.train()
    steps = range(1, trainer.state.global_step + 1)
    assert len(steps) > 3
    assert whole_checkpoints_of(tmp_path) == sorted(str(tmp_path / f"checkpoint-{step}") for step in steps)


def test_rotation_keeps_it(model_path: str, tmp_path: Path) -> None:
    options = {**BUDGET, "kl_budget_action": "warn", "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trainer = make_trainer(model_path, tmp_path, **{**options, "max_steps": 40})
    trainer.train()
    assert trainer.kl.budget.exceeded
    kept = str(trainer.kl.budget.checkpoint)
    assert int(kept.rsplit("-", 1)[1]) < 30
    assert whole_checkpoints_of(tmp_path) == sorted({kept, str(tmp_path / "checkpoint-40")})
