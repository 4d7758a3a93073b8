"""PPO is one body on every TRL: its base, its options, its checkpoints, and the versions that are let in."""

import subprocess
import sys
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.fault_tools import make
from support.processes import environment

from trl_klx import KLXPPOConfig, KLXPPOTrainer
from trl_klx.monitor.history import HISTORY_FILE, HistoryCallback, read_history
from trl_klx.trainers import seams
from trl_klx.trainers.seams import TRL_HAS_PPO, TRL_VERSION

pytestmark = pytest.mark.trl
needs_stock = pytest.mark.skipif(not TRL_HAS_PPO, reason="TRL has a PPO trainer up to 1.12")


def test_base() -> None:
    stock = [cls.__name__ for cls in KLXPPOTrainer.__mro__ if cls.__module__.startswith("trl.")]
    assert stock == [*["PPOTrainer"] * TRL_HAS_PPO, "_BaseTrainer"]


@needs_stock
def test_nothing_of_the_stock_trainer_runs() -> None:
    from trl.experimental.ppo import PPOTrainer

    own = {name for name, value in vars(PPOTrainer).items() if callable(value) or isinstance(value, property)}
    reached = {name for name in own if getattr(KLXPPOTrainer, name) is vars(PPOTrainer)[name]}
    assert reached == {"null_ref_context"}  # which nothing else calls
    assert KLXPPOTrainer._paper == PPOTrainer._paper


@needs_stock
def test_options_are_those_of_the_stock_config() -> None:
    """All that is a choice, with the same defaults but for those that the docs name."""
    from trl.experimental.ppo import PPOConfig

    stock, ours = ({field.name: field for field in fields(config)} for config in (PPOConfig, KLXPPOConfig))
    results = {"num_total_batches", "micro_batch_size", "local_batch_size", "local_mini_batch_size"}
    assert set(stock) - set(ours) == results | {"world_size", "batch_size", "mini_batch_size"}
    others = {"stop_token", "num_sample_generations", "reward_model_path", "sft_model_path", "remove_unused_columns"}
    defaults = [
        {name: f.default if f.default is not MISSING else f.default_factory for name, f in config.items()}
        for config in (stock, ours)
    ]
    assert {name for name in set(stock) & set(ours) if defaults[0][name] != defaults[1][name]} == others


def test_defaults() -> None:
    args = KLXPPOConfig("x", use_cpu=True, bf16=False)
    assert (args.learning_rate, args.num_ppo_epochs, args.response_length, args.temperature) == (3e-6, 4, 53, 0.7)
    assert (args.kl_coef, args.cliprange, args.cliprange_value, args.vf_coef) == (0.05, 0.2, 0.2, 0.1)
    assert (args.gamma, args.lam, args.whiten_rewards, args.missing_eos_penalty) == (1.0, 0.95, False, None)
    assert args.world_size == 1
    assert args.logging_steps == 10
    assert args.gradient_checkpointing is True


VERSIONS = [
    ("1.11.2", "refused"),
    ("1.12.0", "runs"),
    ("1.14.1", "runs"),
    ("1.15.0", "refused"),
    ("1.15.3", "refused"),
    ("1.16.0", "runs"),
    ("1.16.2", "runs"),
    ("1.17.0", "warned"),
    ("2.0.0", "warned"),
]


@pytest.mark.parametrize(("version", "answer"), VERSIONS)
def test_which_trl_is_let_in(version: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "TRL_VERSION", Version(version))
    if answer == "refused":
        with pytest.raises(ImportError, match=rf"trl {version} is installed .*: pip install 'trl==1.16.0'"):
            seams.check_trl_version()
    elif answer == "warned":
        with pytest.warns(UserWarning, match=rf"trl {version} is newer .* \(1.12.0 and 1.16.0\)"):
            seams.check_trl_version()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seams.check_trl_version()


def test_a_newer_trl_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "TRL_VERSION", Version("1.17.0"))
    monkeypatch.delitem(vars(seams), "__warningregistry__", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()  # Python's own filters: a warning of a place is shown once
        for _ in range(3):
            seams.check_trl_version()
    assert len(seen) == 1


def test_the_installed_trl_is_one_that_is_tested() -> None:
    assert TRL_VERSION in seams.TESTED_TRL


# Checkpoints of the other version

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "kl_estimator": "exact", "kl_placement": "both"}


def other_python() -> Path | None:
    """The interpreter of the environment with the other version of TRL, beside this one."""
    here = Path(sys.prefix)
    for name in (".venv", ".venv-trl112"):
        python = here.parent / name / "bin" / "python"
        if here.name != name and python.exists():
            return python
    return None


def history(folder: Path) -> list[dict]:
    timing = ("runtime", "per_second", "step_time", "train_loss", "total_flos")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in read_history(folder / HISTORY_FILE)
    ]


OTHERS_RUNS = """
import sys
from support.fault_tools import main
from trl_klx.trainers.seams import TRL_VERSION
ours, theirs, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
main("ppo", theirs + "/whole", dict(options))
main("ppo", theirs + "/resumed", {**options, "resume": ours + "/checkpoint-3"})
print(TRL_VERSION)
"""


@pytest.mark.processes
@pytest.mark.skipif(other_python() is None, reason="no environment with another TRL: make .venv-trl112/installed")
def test_a_checkpoint_resumes_on_the_other_version(tmp_path: Path) -> None:
    """Both ways, bit for bit: in float32 on a CPU a run does not depend on TRL's version."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    whole = make("ppo", ours, callbacks=[HistoryCallback()], **STEPS)
    whole.train()
    command = [str(other_python()), "-c", OTHERS_RUNS, str(ours), str(theirs), repr(STEPS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Version(done.stdout.split()[-1]) in set(seams.TESTED_TRL) - {TRL_VERSION}
    resumed = make("ppo", tmp_path / "resumed", callbacks=[HistoryCallback()], **STEPS)
    resumed.train(str(theirs / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    unbroken = history(ours)
    assert history(theirs / "whole") == unbroken
    assert history(theirs / "resumed")[-4:] == history(tmp_path / "resumed")[-4:] == unbroken[-4:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {path.name for path in (ours / "checkpoint-3").iterdir()} == {
        path.name for path in (theirs / "whole" / "checkpoint-3").iterdir()
    }
