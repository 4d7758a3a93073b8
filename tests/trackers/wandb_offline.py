"""wandb, offline, gets the metrics of a run and its sampled answers. `make test-wandb` runs this, with wandb itself."""

import json
from pathlib import Path

import pytest
import wandb
from support.fault_tools import make


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo"])
def test_a_run(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "kl")
    trainer = make(algorithm, tmp_path / "run", max_steps=2, report_to=["wandb"], log_completions=True)
    trainer.train()
    run = wandb.run
    assert run is not None
    assert (run.project, run.config["kl_controller"]) == ("kl", "pid")
    shown, folder = dict(run.summary), Path(run.dir)
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    for name in ("kl/sequence", "kl/coef", "kl/target", "grad_norm"):
        assert shown[f"train/{name}"] == pytest.approx(last[name]), name
    wandb.finish()
    contents = [json.loads(path.read_text()) for path in (folder / "media" / "table").rglob("*.json")]
    wanted = {"completion", "digit_reward", "advantage"} if algorithm == "grpo" else {"answer", "rewards"}
    assert contents
    for table in contents:
        assert {"prompt", *wanted} <= set(table["columns"])
        assert table["data"]
