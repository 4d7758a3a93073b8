"""Health alarms in real, tiny PPO runs; GRPO's and DPO's are in test_health.py."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.ppo_tools import trainer
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from test_health import alarms, always_half, events, logged, perturb, quiet, share_of_h

pytestmark = pytest.mark.trl

RUN: dict[str, Any] = {"given": False, "max_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-3, "kl_coef": 0.2}


def run(folder: Path, **changes: Any) -> Any:
    made = trainer(folder, **{**RUN, **changes})
    made.train()
    return made


def test_runaway_and_mode_collapse(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.1, "kl_coef": 1e-6, "max_steps": 14, "response_length": 16, "lam": 1.0}
    made = run(tmp_path, reward_funcs=share_of_h, **settings)
    assert {"runaway", "mode_collapse"} == logged(made)
    assert "raise kl_coef" in alarms(tmp_path)["runaway"]["remedy"]


def test_collapse(tmp_path: Path) -> None:
    """All rewards are the same; at this learning rate nothing else moves the policy."""
    options = {"kl_coef": 1000.0, "learning_rate": 1e-9, "max_steps": 60, "logging_steps": 5}
    made = run(tmp_path, reward_funcs=always_half, **options)
    event = alarms(tmp_path)["collapse"]
    assert "rewards do not differ" in event["cause"]
    assert logged(made) == {"collapse"}


def test_collapse_under_a_penalty_that_outweighs_the_reward(tmp_path: Path) -> None:
    """In the reward's own units: PPO does not normalise it."""
    made = run(tmp_path, kl_coef=100.0, learning_rate=3e-4, max_steps=80, logging_steps=5)
    event = alarms(tmp_path)["collapse"]
    assert event["remedy"].startswith("lower kl_coef; ")
    spread = next(e["reward_std"] for e in made.state.log_history if e["step"] == event["step"])
    assert f"threshold {spread:.2g}, the reward's deviation" in event["evidence"]


def test_wrong_reference(tmp_path: Path) -> None:
    made = trainer(tmp_path, **{**RUN, "max_steps": 1})
    perturb(made.ref_model)
    made.train()
    (event,) = events(tmp_path)
    assert event["alarm"] == "wrong_reference"
    assert f"{made.state.log_history[0]['kl/start']:.2g} nats per token" in event["evidence"]


def test_reference_with_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyz"])
    path = save_tiny(tmp_path / "other")
    tokenizer.save_pretrained(path)
    run(tmp_path / "run", ref_model=path, max_steps=1)
    (event,) = events(tmp_path / "run")  # the same weights: no KL at step 0
    assert event["alarm"] == "wrong_reference"
    assert "tokens are different for the reference" in event["evidence"]


def test_stale_sampler(tmp_path: Path) -> None:
    """Many large updates for one rollout: the weights on the KL loss rest on few samples."""
    settings = {"kl_estimator": "k3", "kl_placement": "loss", "num_ppo_epochs": 16, "learning_rate": 3e-2}
    made = run(tmp_path, cliprange=10.0, **settings)
    event = alarms(tmp_path)["stale_sampler"]
    assert "num_ppo_epochs" in event["remedy"]
    entry = next(entry for entry in made.state.log_history if entry["step"] == event["step"])
    assert entry["kl/ess"] < 0.5


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "exact", "kl_placement": "both", "bf16": True}], ids=str)
def test_a_healthy_run_is_silent(tmp_path: Path, options: dict, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, model=tiny_model(), **{**RUN, "max_steps": 12, "num_ppo_epochs": 2, **options})
    with caplog.at_level(logging.WARNING):
        quiet(made, tmp_path, caplog)
