"""Nothing is lost when it dies: SIGKILL, half-written checkpoints, full disks, spoilt files, steps not finite."""

import errno
import json
import math
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import fault_tools
from support.fault_tools import ALGORITHMS, make
from support.processes import end_ranks
from support.tiny import Arguments, digit_reward, save_tiny, tiny_model
from torch import Tensor
from transformers import TrainerCallback

from trl_klx.monitor.history import HISTORY_FILE, HistoryCallback, read_history
from trl_klx.run import grpo
from trl_klx.trainers.checkpoints import whole as checkpoints
from trl_klx.trainers.checkpoints.whole import (
    STATE_FILE,
    missing_file,
    resolve_checkpoint,
    rotate,
    whole_checkpoints,
    write_state,
)
from trl_klx.trainers.errors import CheckpointError, NonFiniteError, NotSavedError
from trl_klx.trainers.session.session import KLSession

SAVES = {"save_strategy": "steps", "save_steps": 2}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
SAMPLING = [algorithm for algorithm in ALGORITHMS if algorithm != "dpo"]
all_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def forked(algorithm: str, folder: Path, options: dict, ranks: int = 1) -> tuple[list[int], str]:
    """A run of `fault_tools.py` in processes of its own: the exit status of each, and their stderr."""
    return end_ranks(folder.parent, ranks, fault_tools.main, algorithm, str(folder), options)


def steps(folder: Path) -> list[dict]:
    """The metrics file of a run, without what depends on the clock."""
    timing = ("runtime", "per_second", "step_time", "train_loss", "total_flos")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in read_history(folder / HISTORY_FILE)
    ]


def weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Death ---------------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@all_algorithms
def test_killed_twice_a_run_is_the_unbroken_one(algorithm: str, tmp_path: Path) -> None:
    """kill -9 in the middle of step 3, then in the middle of writing checkpoint-4, with one checkpoint kept."""
    options = {**SAVES, "save_total_limit": 1}
    whole, folder = make(algorithm, tmp_path / "whole", callbacks=[HistoryCallback()], **options), tmp_path / "dies"
    whole.train()
    assert forked(algorithm, folder, {**options, "kill": "step", "at": 3})[0] == [-signal.SIGKILL]
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2"]
    again = {**options, "kill": "save", "at": 4, "resume": "last"}
    assert forked(algorithm, folder, again)[0] == [-signal.SIGKILL]
    assert (folder / "checkpoint-4" / "optimizer.pt").exists()  # half of it is there
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2"]
    with (folder / HISTORY_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # and the last line of the metrics is cut short
    torch.manual_seed(1234)
    last = make(algorithm, folder, callbacks=[HistoryCallback()], **options)
    last.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(last))
    assert last.kl.coef == whole.kl.coef
    assert last.kl.controller.state_dict() == whole.kl.controller.state_dict()
    assert len(steps(folder)) == 7  # six steps and the summary, each once
    assert steps(folder) == steps(tmp_path / "whole")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.processes
def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    """DDP; and a loss that is not finite on one process only makes both skip the step."""
    options = {**SAVES, "max_steps": 4, "per_device_train_batch_size": 4, "bad_loss": 2}
    dies = {**options, "unbroken": str(tmp_path / "whole"), "kill": "step", "at": 3, "rank": 1}
    statuses, errors = forked("grpo", tmp_path / "dies", dies, ranks=2)
    assert statuses[1] == -signal.SIGKILL, errors
    assert statuses[0] != 0
    assert missing_file(tmp_path / "dies" / "checkpoint-2") is None
    statuses, errors = forked("grpo", tmp_path / "dies", {**options, "resume": "last"}, ranks=2)
    assert statuses == [0, 0], errors
    results = [
        json.loads((tmp_path / run / f"result{rank}.json").read_text()) for run in ("whole", "dies") for rank in (0, 1)
    ]
    for result in results[1:]:
        assert result["skipped"] == 1
        assert result["coef"] == pytest.approx(results[0]["coef"], rel=1e-6)
        for mine, theirs in zip(result["weights"], results[0]["weights"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for mine, theirs in zip(steps(tmp_path / "dies")[:4], steps(tmp_path / "whole")[:4], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_resumed_between_two_steps_of_a_rollout_the_prompts_keep_their_order(tmp_path: Path) -> None:
    """Each rollout is used for two steps. TRL alone uses the first of a resumed run for one step too many."""
    options = {**SAVES, "save_steps": 3, "num_iterations": 2}
    runs: dict[str, list[tuple[int, tuple]]] = {"whole": [], "resumed": []}

    def watching(name: str) -> Any:
        def reward(prompts: list, completions: list, trainer_state: Any, **kwargs: Any) -> list[float]:
            runs[name].append((trainer_state.global_step, tuple(prompts)))
            return digit_reward(completions)

        return reward

    make("grpo", tmp_path, reward=watching("whole"), **options).train()
    make("grpo", tmp_path, reward=watching("resumed"), **options).train(str(tmp_path / "checkpoint-3"))
    prompts = dict(runs["whole"])
    assert list(prompts) == [0, 2, 4]
    assert runs["resumed"] == [(3, prompts[2]), (4, prompts[4])]


# Which folder is a checkpoint ----------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if whole:
        write_state(path, {})
    return path


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    for wanted in (None, False, "false"):
        assert resolve_checkpoint(wanted, tmp_path) is None
    with pytest.raises(CheckpointError, match="finds no complete checkpoint"):
        resolve_checkpoint("last", tmp_path)
    checkpoint(tmp_path, 9)
    ten, half = checkpoint(tmp_path, 10), checkpoint(tmp_path, 11, whole=False)
    for wanted in (True, "true", "last", str(ten)):
        assert resolve_checkpoint(wanted, tmp_path) == str(ten)
    with pytest.raises(CheckpointError) as refused:
        resolve_checkpoint(str(half), tmp_path)
    assert str(refused.value) == (
        f"resume_from_checkpoint='{half}' is not a complete checkpoint, because it has no {STATE_FILE}: resume from "
        f"{ten}, "
        "the last complete one."
    )
    early = checkpoint(tmp_path, 3)  # of a run that started afresh in the same folder
    assert resolve_checkpoint("last", tmp_path) == str(early)
    (early / "model.safetensors").unlink()  # a copy that was not finished, say
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        resolve_checkpoint(str(early), tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def test_rotation_deletes_half_written_ones_first_and_keeps_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    half, new = checkpoint(tmp_path, 9, whole=False), checkpoint(tmp_path, 4)
    rotate(tmp_path, 3, {new, tmp_path / "checkpoint-1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert not half.exists()
    rotate(tmp_path, 1, {new, tmp_path / "checkpoint-1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, None, {new})
    assert len(list(tmp_path.iterdir())) == 2


def test_the_best_checkpoint_stays_and_is_loaded(tmp_path: Path) -> None:
    options = {**EVERY_STEP, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = make("dpo", tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert missing_file(trainer.state.best_model_checkpoint) is None


def test_written_over_an_earlier_run_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    make("grpo", tmp_path, max_steps=1, **EVERY_STEP).train()
    trainer, seen = make("grpo", tmp_path, max_steps=1, **EVERY_STEP), []
    trainer._save_scaler = lambda folder: seen.append(missing_file(folder))  # half-way
    trainer.train()
    assert seen == [STATE_FILE]
    assert missing_file(tmp_path / "checkpoint-1") is None


def test_a_run_that_goes_on_after_its_end_has_one_end(tmp_path: Path) -> None:
    make("grpo", tmp_path, max_steps=2, callbacks=[HistoryCallback()], **EVERY_STEP).train()
    make("grpo", tmp_path, max_steps=3, callbacks=[HistoryCallback()]).train("last")
    history = read_history(tmp_path / HISTORY_FILE)
    assert [entry["step"] for entry in history] == [1, 2, 3, 3]
    assert [index for index, entry in enumerate(history) if "train_runtime" in entry] == [3]


def test_what_goes_to_the_hub_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_klx.trainers.checkpoints import pushes as hub

    seen: list[str | None] = []
    done: Future = Future()
    done.set_result(None)

    def push_checkpoint(checkpoint: Path, *_: object, **__: object) -> Future:
        seen.append(missing_file(checkpoint))
        return done

    monkeypatch.setattr(hub, "push_checkpoint", push_checkpoint)
    trainer = make("grpo", tmp_path, max_steps=1, **EVERY_STEP)
    trainer.args.push_to_hub = True
    trainer.train()
    assert seen == [None]


@all_algorithms
def test_a_spoilt_state_file_is_named_and_refused(algorithm: str, tmp_path: Path) -> None:
    trainer = make(algorithm, tmp_path, max_steps=1, **EVERY_STEP)
    trainer.train()
    path = tmp_path / "checkpoint-1" / STATE_FILE
    state = json.loads(path.read_text())
    assert state["controller"]["kind"] == "pid"
    nan, unknown = {**state["controller"], "beta": math.nan}, {**state["controller"], "kind": "pdi"}
    spoilt = [
        *("", path.read_text()[:80], "no JSON", "[]", "null"),
        *(json.dumps({**state, "controller": wrong}) for wrong in (nan, unknown, "pid", {"kind": "pid"})),
        *(json.dumps({**state, "budget": wrong}) for wrong in ([math.nan, 0.0], [0.0], None)),
        json.dumps({"budget": [0, 0]}),
    ]
    before = trainer.kl.state()
    for content in spoilt:
        path.write_text(content)
        with pytest.raises(CheckpointError, match="not a readable controller state") as refused:
            trainer._continue_from(path.parent)
        assert str(path) in str(refused.value), content
        assert trainer.kl.state() == before
    for content in ("", spoilt[1], spoilt[5], json.dumps({**state, "skipped_steps": math.nan})):
        path.write_text(content)
        with pytest.raises(CheckpointError, match="not a readable controller state"):
            trainer.train(resume_from_checkpoint=str(path.parent))
    path.write_text("{}")  # the remedy that the message names
    make(algorithm, tmp_path, max_steps=2).train(resume_from_checkpoint=str(path.parent))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of four steps with a checkpoint every two."""
    save_tiny(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": "2"}) + "\n" for i in range(8))
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows)
    fields = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"),
        "reward_funcs": ["support.tiny.digit_reward"],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "beta": 0.1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        **SAVES,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
    return tmp_path / "recipe.yaml"


def test_resuming_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(resume: object) -> int:
        fields = {**json.loads(recipe.read_text()), "resume_from_checkpoint": resume}
        recipe.with_name("resumed.yaml").write_text(json.dumps(fields))
        return grpo.main(["--config", str(recipe.with_name("resumed.yaml"))])

    assert run("last") == 2
    assert "finds no complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert grpo.main(["--config", str(recipe)]) == 0
    unbroken = steps(tmp_path / "run")
    half = tmp_path / "run" / "checkpoint-4"
    for wanted in (True, "last"):
        (half / STATE_FILE).unlink()
        assert run(wanted) == 0
        assert steps(tmp_path / "run") == unbroken
    (half / STATE_FILE).unlink()
    assert run(str(half)) == 2
    error = capsys.readouterr().err
    assert f"resume from {tmp_path / 'run' / 'checkpoint-2'}, the last complete one." in error
    assert "Traceback" not in error


# Full disks ----------------------------------------------------------------------------------------------------------


@all_algorithms
@pytest.mark.parametrize("where", ["optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoint_before(
    algorithm: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way, and at the very last file: with save_total_limit=1 nothing may be deleted before."""
    trainer = make(algorithm, tmp_path, **EVERY_STEP, save_total_limit=1)
    real = {"optimizer": torch.save, "state": checkpoints.write_state}[where]

    def full(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(*{"optimizer": (torch, "save"), "state": (checkpoints, "write_state")}[where], full)
    with pytest.raises(NotSavedError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "No space left on device" in message
    assert f"resume from {tmp_path / 'checkpoint-2'}, the last complete one" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    at_three = weights(trainer)
    monkeypatch.undo()
    again = make(algorithm, tmp_path, max_steps=6)
    again.train(resume_from_checkpoint="last")
    whole = make(algorithm, tmp_path / "whole", **SAVES | {"save_steps": 3})
    whole.train()
    assert same(weights(again), weights(whole))
    third = make(algorithm, tmp_path / "third")
    third._load_from_checkpoint(str(tmp_path / "whole" / "checkpoint-3"))
    assert same(at_three, weights(third))  # what was in memory was not touched


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount") or "mount"
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # weights read from it stay mapped


class Filler(TrainerCallback):
    """After the first checkpoint, leaves room for half of another."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 1:
            size = sum(path.stat().st_size for path in Path(args.output_dir, "checkpoint-1").rglob("*"))
            room = shutil.disk_usage(args.output_dir).free - size // 2
            Path(args.output_dir, "other").write_bytes(bytes(max(room, 0)))


@all_algorithms
def test_a_disk_that_is_really_full(algorithm: str, small_disk: Path) -> None:
    trainer = make(algorithm, small_disk, **EVERY_STEP, callbacks=[Filler(), HistoryCallback()])
    with pytest.raises(NotSavedError, match="could not be written") as stopped:
        trainer.train()
    assert f"resume from {small_disk / 'checkpoint-1'}" in str(stopped.value)
    (small_disk / "other").unlink()
    again = make(algorithm, small_disk, max_steps=2, **EVERY_STEP)
    again.train(resume_from_checkpoint="last")
    assert same(weights(again), weights(trainer))


def test_a_recipe_on_a_full_disk(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_state", full)
    assert grpo.main(["--config", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert "error: the checkpoint" in error
    assert "No space left on device" in error
    assert "Traceback" not in error


# Steps that are not finite -------------------------------------------------------------------------------------------


class Spoiler(TrainerCallback):
    """Makes a gradient or a weight not finite at given steps, and keeps the weights before and after each step."""

    def __init__(self, what: str, at: set[int], value: float = math.nan) -> None:
        self.what, self.at, self.value = what, at, value
        self.before: dict[int, list[Tensor]] = {}
        self.after: dict[int, list[Tensor]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state = state
        if self.what == "gradient":
            parameter = list(model.parameters())[-1]
            spoil = lambda gradient: gradient * self.value if state.global_step + 1 in self.at else gradient  # noqa: E731
            parameter.register_hook(spoil)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step + 1] = [parameter.detach().clone() for parameter in model.parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = [parameter.detach().clone() for parameter in model.parameters()]
        if self.what == "weight" and state.global_step in self.at:
            with torch.no_grad():
                list(model.parameters())[3].view(-1)[2] = self.value


@all_algorithms
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(
    algorithm: str, value: float, max_grad_norm: float, tmp_path: Path
) -> None:
    spoiler = Spoiler("gradient", {3}, value)
    options = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1}
    trainer = make(algorithm, tmp_path, callbacks=[spoiler], **options, **SAVES)
    trainer.train()
    moved = {step: not same(spoiler.before[step], spoiler.after[step]) for step in range(1, 7)}
    assert moved == {1: True, 2: True, 3: False, 4: True, 5: True, 6: True}
    assert all(weight.isfinite().all() for weight in weights(trainer))
    assert all(moment.isfinite().all() for state in trainer.optimizer.state.values() for moment in state.values())
    skipped = 2 if algorithm == "ppo" else 1  # PPO takes two optimizer steps of each rollout
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logs] == [None, None, *[skipped] * 4]
    assert all(math.isfinite(number) for entry in logs for number in entry.values() if number is not None)
    assert "grad_norm" not in logs[2]
    assert trainer.kl.controller.readings == 6  # the KL was finite
    again = make(algorithm, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.guard.skipped == skipped
    assert same(weights(again), weights(trainer))


@all_algorithms
def test_after_too_many_in_a_row_the_run_ends(algorithm: str, tmp_path: Path) -> None:
    spoiler = Spoiler("gradient", {2, 4, 5, 6})
    options = {"max_steps": 8, "max_skipped_steps": 2, "num_ppo_epochs": 1} if algorithm == "ppo" else {"max_steps": 8}
    trainer = make(algorithm, tmp_path, callbacks=[spoiler], **EVERY_STEP, **{**options, "max_skipped_steps": 2})
    with pytest.raises(NonFiniteError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "not finite at step 6: the gradient norm (3 in a row, beyond max_skipped_steps=2)" in message
    assert "lower learning_rate" in message
    assert f"resume from {tmp_path / 'checkpoint-5'}" in message
    again = make(algorithm, tmp_path, max_steps=8)
    again.train(resume_from_checkpoint="last")
    assert all(weight.isfinite().all() for weight in weights(again))


@all_algorithms
def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(algorithm: str, tmp_path: Path) -> None:
    """Before the checkpoint of the same step is written; and without checkpoints, at the next step."""
    for folder, options in ((tmp_path / "saves", EVERY_STEP), (tmp_path / "never", {})):
        trainer = make(algorithm, folder, callbacks=[Spoiler("weight", {3})], **options)
        with pytest.raises(NonFiniteError, match=r"at step 4 the weights of the model are not finite \(first .*layers"):
            trainer.train()
        assert trainer.state.global_step == 3
        names = sorted(path.name for path in folder.glob("checkpoint-*"))
        assert names == (["checkpoint-1", "checkpoint-2"] if options else [])


@pytest.mark.parametrize("algorithm", SAMPLING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_counts_as_none(algorithm: str, value: float, tmp_path: Path) -> None:
    """Without group scaling TRL makes a gradient of it that is not finite; here it is a reward that does not apply."""

    def reward(completions: list, trainer_state: Any, **kwargs: Any) -> list:
        return [
            given[0] if trainer_state.global_step == 1 else digit_reward(completions)[0],
            *digit_reward(completions)[1:],
        ]

    runs, options = {}, {"scale_rewards": "none"} if algorithm == "grpo" else {}
    for name, wrong in (("none", None), ("wrong", value)):
        given = [wrong]
        runs[name] = make(algorithm, tmp_path / name, reward=reward, max_steps=3, **options)
        runs[name].train()
    assert same(weights(runs["none"]), weights(runs["wrong"]))
    assert runs["wrong"].guard.skipped == 0
    counts = [entry.get("rewards/reward/infinite") for entry in runs["wrong"].state.log_history[:3]]
    assert counts == [None, 1.0 if math.isinf(value) else None, None]


@pytest.mark.parametrize("algorithm", SAMPLING)
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_rollout_without_any_reward_is_skipped(algorithm: str, value: float | None, tmp_path: Path) -> None:
    def broken(completions: list, trainer_state: Any, **kwargs: Any) -> list:
        return digit_reward(completions) if trainer_state.global_step in (0, 2) else [value] * len(completions)

    spoiler = Spoiler("nothing", set())
    trainer = make(algorithm, tmp_path, reward=broken, callbacks=[spoiler], max_skipped_steps=2, **EVERY_STEP)
    with pytest.raises(NonFiniteError) as stopped:
        trainer.train()
    assert "not finite at step 6: the rewards of all answers (of 'broken') (3 in a row" in str(stopped.value)
    assert "look at what the reward functions return" in str(stopped.value)
    moved = {step: not same(spoiler.before[step], after) for step, after in spoiler.after.items()}
    assert moved == {1: True, 2: False, 3: True, 4: False, 5: False}
    assert missing_file(tmp_path / "checkpoint-5") is None


def forbid(trainer: Any, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference give some tokens no probability, as TRL's scoring would say it."""
    if algorithm == "grpo":
        score = trainer._score_reference

        def scored(batch: dict) -> None:
            score(batch)
            batch["ref_per_token_logps"][:, 0] = -torch.inf

        monkeypatch.setattr(trainer, "_score_reference", scored)
    elif algorithm == "dpo":
        ref_log_probs = trainer.compute_ref_log_probs

        def impossible(*args: Any) -> tuple[Tensor, Tensor]:
            chosen, rejected = ref_log_probs(*args)
            return chosen, torch.full_like(rejected, -torch.inf)

        monkeypatch.setattr(trainer, "compute_ref_log_probs", impossible)
    else:
        forbidden = torch.arange(4, 12)
        forbidding = lambda module, args, output: output.index_fill(-1, forbidden, -torch.inf)  # noqa: E731
        trainer.ref_model.lm_head.register_forward_hook(forbidding)


FORBIDDEN = {
    "grpo-k3-loss": ("grpo", {"kl_estimator": "k3", "kl_placement": "loss"}),
    "grpo-k1-reward": ("grpo", {"kl_estimator": "k1", "kl_placement": "reward"}),
    "ppo-k1-reward": ("ppo", {}),
    "ppo-k3-loss": ("ppo", {"kl_estimator": "k3", "kl_placement": "loss"}),
    "dpo": ("dpo", {}),
}


@pytest.mark.parametrize("name", [name for name, (algorithm, _) in FORBIDDEN.items() if algorithm in ALGORITHMS])
def test_a_reference_without_probability_spoils_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite KL reaches neither weights nor controller nor the logged KL; the message says where it comes from."""
    algorithm, options = FORBIDDEN[name]
    trainer = make(algorithm, tmp_path, max_steps=2, max_skipped_steps=20, **options)
    forbid(trainer, algorithm, monkeypatch)
    trainer.train()
    assert trainer.guard.skipped > 0
    assert all(weight.isfinite().all() for weight in weights(trainer))
    state = trainer.kl.controller.state_dict()
    assert all(math.isfinite(number) for number in state.values() if isinstance(number, float))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(number) for entry in logs for number in entry.values() if number is not None)
    trainer.args.max_skipped_steps = 0
    with pytest.raises(NonFiniteError, match=r"the reference's log-probs|the KL"):
        trainer.train()


def test_an_infinite_kl_does_not_hide_those_of_other_steps() -> None:
    """Logged are means over several steps; the controller counts the reading that it did not take."""
    kl = KLSession(Arguments(beta=0.2, kl_controller="pid", kl_target=0.1), Accelerator(cpu=True))
    kl.start(10)
    mask, prompts = torch.ones(2, 3), torch.tensor([0, 1])
    for value in (0.5, math.inf, math.nan, 0.7):
        values = torch.full((2, 3), 0.25)
        values[0, 1] = value
        kl.measure("train", {"k1": values, "k3": values}, mask, prompts)
        assert all(math.isfinite(number) for number in kl.end_step().values())
    assert kl.metrics("train")["kl/k3"] == pytest.approx((10 * 0.25 + 0.5 + 0.7) / 12)
    assert (kl.controller.readings, kl.controller.skipped) == (2, 2)  # type: ignore[union-attr]


def test_a_kl_that_is_only_measured_may_be_infinite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(
        "grpo",
        tmp_path,
        max_steps=2,
        beta=0.0,
        kl_controller="fixed",
        kl_target=None,
        kl_placement="none",
        kl_estimator="k3",
    )
    forbid(trainer, "grpo", monkeypatch)
    trainer.train()
    assert trainer.guard.skipped == 0
    assert not any(name.startswith("kl/k") for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize("algorithm", SAMPLING)
def test_logits_that_cannot_be_sampled_from_are_named(algorithm: str, tmp_path: Path) -> None:
    """The weights are finite and the logits overflow."""
    model = tiny_model()
    trainer = make(algorithm, tmp_path, model=model, max_steps=3)
    model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(NonFiniteError, match="at step 1 the policy's logits are not finite"):
        trainer.train()


def test_a_recipe_that_is_not_finite(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import tiny

    monkeypatch.setattr(tiny, "digit_reward", lambda completions, **kwargs: [math.nan] * len(completions))
    assert grpo.main(["--config", str(recipe), "--max_skipped_steps", "1"]) == 1
    error = capsys.readouterr().err
    assert "error: not finite at step 2: the rewards of all answers" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many", None])
def test_max_skipped_steps_is_checked(wrong: Any) -> None:
    assert Arguments().max_skipped_steps == 10
    assert Arguments(max_skipped_steps=0).max_skipped_steps == 0
    wanted = "a number, at least 0" if wrong == -1 else "a whole number"
    with pytest.raises(ValueError, match=f"max_skipped_steps={wrong!r} must be {wanted}"):
        Arguments(max_skipped_steps=wrong)
