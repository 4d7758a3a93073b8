"""What users did with runs that ended, died, were copied or resumed."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from support.fault_tools import ALGORITHMS, make
from support.tiny import digit_reward, save_tiny, tiny_dataset, tiny_model
from support.tiny_dpo import LORA, SETTINGS
from support.tiny_dpo import make_trainer as make_dpo
from torch import Tensor
from transformers import TrainerCallback

from trl_klx.monitor.history import HISTORY_FILE, HistoryCallback, read_history
from trl_klx.run import dpo, grpo
from trl_klx.trainers.checkpoints.whole import STATE_FILE, rotate, write_state
from trl_klx.trainers.errors import CheckpointError, NonFiniteError, NotSavedError

pytestmark = pytest.mark.trl

all_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
SAMPLING = [algorithm for algorithm in ALGORITHMS if algorithm != "dpo"]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
STEPS = {"save_strategy": "steps", "save_steps": 2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Nothing is deleted that is not the run's own ------------------------------------------------------------------------

BUDGET = {"kl_budget": 100.0, "kl_controller": "fixed", "kl_target": None}


def a_kept_checkpoint(folder: Path, kept: str, **more: Any) -> None:
    """Let the state of checkpoint-2 say that another was written for the budget alone: the next one supersedes it."""
    path = folder / "checkpoint-2" / STATE_FILE
    state = json.loads(path.read_text())
    state["budget"] |= {"checkpoint": kept, "checkpoint_kl": 0.01, "is_extra": True, **more}
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of GRPO with a budget, and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("first") / "run"
    make("grpo", folder, max_steps=2, **EVERY_STEP, **BUDGET).train()
    return folder


def resume(folder: Path, **changes: Any) -> Any:
    trainer = make("grpo", folder, **{"max_steps": 4, **BUDGET, **EVERY_STEP, **changes})
    trainer.train(resume_from_checkpoint="last")
    return trainer


@pytest.mark.situation("copies a run and resumes the copy", "right")
@pytest.mark.parametrize("written", ["today", "with whole paths"])
def test_the_copied_run_keeps_its_checkpoints(written: str, first_run: Path, tmp_path: Path) -> None:
    mine, copy = tmp_path / "mine", tmp_path / "copy"
    shutil.copytree(first_run, mine)
    a_kept_checkpoint(mine, "checkpoint-1" if written == "today" else str(mine / "checkpoint-1"))
    shutil.copytree(mine, copy)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    trainer = resume(copy)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    assert names(copy) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]  # the first of the copy is superseded
    assert trainer.kl.budget.checkpoint == str(copy / "checkpoint-3")
    state = json.loads((copy / "checkpoint-4" / STATE_FILE).read_text())
    assert state["budget"]["checkpoint"] == "checkpoint-3"  # a name, wherever the run may be next


@pytest.mark.situation("resumes a checkpoint whose state file names a folder that is not the run's", "right")
@pytest.mark.parametrize("named", ["a folder", "a checkpoint of another run", "a link", "the folder above"])
def test_what_a_state_file_names_elsewhere_stays(named: str, first_run: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other" / "checkpoint-7"
    shutil.copytree(first_run, run)
    other.mkdir(parents=True)
    (other / STATE_FILE).write_text("{}")
    if named == "a link":
        (run / "checkpoint-7").symlink_to(other)
    (run / "thesis").mkdir()
    (run / "thesis" / "text").write_text("years of work")
    kept = {
        "a folder": str(run / "thesis"),
        "a checkpoint of another run": str(other),
        "a link": str(run / "checkpoint-7"),
        "the folder above": str(run / "checkpoint-1" / ".."),
    }[named]
    a_kept_checkpoint(run, kept, before_limit=[[kept, 0.01]])
    trainer = resume(run)
    assert trainer.state.global_step == 4
    assert (other / STATE_FILE).read_text() == "{}"
    assert (run / "thesis" / "text").read_text() == "years of work"
    assert (run / "checkpoint-7").is_symlink() == (named == "a link")
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-4"} <= set(names(run))


@pytest.mark.situation("continues one run's checkpoint in the folder of another", "right")
def test_names_of_another_run_mean_nothing_here(first_run: Path, tmp_path: Path) -> None:
    mine, here = tmp_path / "mine", tmp_path / "here"
    shutil.copytree(first_run, mine)
    a_kept_checkpoint(mine, str(mine / "checkpoint-1"))
    shutil.copytree(first_run, here)  # with a checkpoint-1 of its own
    trainer = make("grpo", here, **{"max_steps": 4, **BUDGET, **EVERY_STEP})
    trainer.train(resume_from_checkpoint=str(mine / "checkpoint-2"))
    assert names(mine) == ["checkpoint-1", "checkpoint-2"]
    assert names(here) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]


@pytest.mark.situation("has linked old checkpoints from another disk", "right")
def test_rotation_leaves_links_alone(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk" / "checkpoint-1", tmp_path / "run"
    for folder in (disk, run / "checkpoint-2", run / "checkpoint-3"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")
        write_state(folder, {})
    (run / "checkpoint-1").symlink_to(disk)
    rotate(run, 1, {run / "checkpoint-3"})
    assert names(run) == ["checkpoint-1", "checkpoint-3"]
    assert sorted(path.name for path in disk.iterdir()) == [STATE_FILE, "model.safetensors"]


@pytest.mark.situation("has a link where the run writes its next checkpoint", "refused")
def test_a_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / STATE_FILE).write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-2").symlink_to(disk)
    with pytest.raises(NotSavedError, match=r"checkpoint-2 is not a folder but a link or a file.*move it"):
        make("grpo", tmp_path / "run", max_steps=2, **STEPS).train()
    assert [path.name for path in disk.iterdir()] == [STATE_FILE]


@pytest.mark.situation("copies a run that keeps its best checkpoint, and resumes the copy", "right")
@pytest.mark.parametrize("first_is", ["there", "gone"])
def test_the_best_checkpoint_is_the_copys(first_is: str, tmp_path: Path) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **evaluates}
    make("dpo", tmp_path / "a", max_steps=2, **settings, load_best_model_at_end=True).train()
    kept = names(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    if first_is == "gone":
        shutil.rmtree(tmp_path / "a")
    trainer = make("dpo", tmp_path / "b", max_steps=4, learning_rate=0.0, **settings, load_best_model_at_end=True)
    state = json.loads((tmp_path / "b" / kept[-1] / "trainer_state.json").read_text())
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / kept[-1]))
    best = tmp_path / "b" / f"checkpoint-{state['best_global_step']}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert best.is_dir()
    assert "checkpoint-4" in names(tmp_path / "b")  # the last, from which the run can go on
    if first_is == "there":
        assert names(tmp_path / "a") == kept


# A run that had ended ------------------------------------------------------------------------------------------------


@pytest.mark.situation("resumes a run that was killed after its last step, or had ended", "right")
@pytest.mark.parametrize("save_total_limit", [1, None])
@all_algorithms
def test_a_run_that_is_over_trains_no_more(algorithm: str, save_total_limit: int | None, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": save_total_limit}
    first = make(algorithm, tmp_path, callbacks=[HistoryCallback()], **options)
    first.train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-3").rglob("*") if path.is_file()}
    history = read_history(tmp_path / HISTORY_FILE)
    again = make(algorithm, tmp_path, callbacks=[HistoryCallback()], **options)
    result = again.train(resume_from_checkpoint="last")
    assert result.global_step == again.state.global_step == 3
    assert names(tmp_path) == ["checkpoint-3"]
    assert {path: path.read_bytes() for path in before} == before
    assert same(weights(again), weights(first))
    assert read_history(tmp_path / HISTORY_FILE) == history


@pytest.mark.situation("resumes with fewer max_steps than the checkpoint has", "right")
def test_fewer_steps_than_it_has(tmp_path: Path) -> None:
    make("grpo", tmp_path, max_steps=4, **STEPS).train()
    trainer = make("grpo", tmp_path, max_steps=3, **STEPS)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 4
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.situation("resumes a run that its KL budget has ended", "right")
@all_algorithms
def test_a_run_that_used_its_budget_trains_no_more(algorithm: str, tmp_path: Path) -> None:
    options = {"kl_budget": 1e-9, "kl_controller": "fixed", "kl_target": None, **STEPS}
    first = make(algorithm, tmp_path, **options)
    first.train()
    ended = first.state.global_step
    assert ended < 6
    again = make(algorithm, tmp_path, **options)
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == ended
    assert again.kl.budget.message() == first.kl.budget.message()
    more = make(algorithm, tmp_path, **{**options, "kl_budget": 1e9, "max_steps": ended + 1})  # goes on
    more.train(resume_from_checkpoint="last")
    assert more.state.global_step == ended + 1


@pytest.mark.situation("resumes a run that ended because the gold reward had turned", "right")
def test_a_run_that_has_turned_trains_no_more(tmp_path: Path) -> None:
    options = {
        **GOLD,
        "gold_action": "stop",
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_eval_batch_size": 16,
    }
    first = gold_trainer(tmp_path, gold=falling, **options)
    first.train()
    ended = first.state.global_step
    assert ended < 6
    again = gold_trainer(tmp_path, gold=falling, **options)
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == ended


# The evaluation of the start -----------------------------------------------------------------------------------------

GOLD = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 8,
    "kl_controller": "fixed",
    "kl_target": None,
}


def falling(prompts: list, completions: list, trainer_state: Any, **kwargs: Any) -> list[float]:
    return [0.1 * reward - trainer_state.global_step for reward in digit_reward(completions)]


def gold_trainer(folder: Path, gold: Any = digit_reward, **changes: Any) -> Any:
    from support.fault_tools import COMMON, OWN
    from support.tiny import tiny_tokenizer

    from trl_klx import KLXGRPOConfig, KLXGRPOTrainer

    config = KLXGRPOConfig(str(folder), **{**COMMON, **OWN["grpo"], **GOLD, **changes})
    data = {"train_dataset": tiny_dataset(), "eval_dataset": tiny_dataset(16), "processing_class": tiny_tokenizer()}
    return KLXGRPOTrainer(tiny_model(), digit_reward, config, gold_reward_func=gold, **data)


@pytest.mark.situation("resumes a run with eval_on_start and a gold reward", "right")
def test_the_stored_evaluation_stays(tmp_path: Path) -> None:
    options = {"max_steps": 4, **STEPS}
    first = gold_trainer(tmp_path, **options)
    first.train()
    again = gold_trainer(tmp_path, **options)
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [evaluation.step for evaluation in again.overoptimisation.evaluations] == [0, 2, 4]
    assert again.overoptimisation.evaluations == first.overoptimisation.evaluations
    assert again.overoptimisation._planned == first.overoptimisation._planned


@pytest.mark.situation("resumes a run with eval_on_start", "right")
@all_algorithms
def test_the_start_is_evaluated_once(algorithm: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 4, **STEPS}
    options |= {"per_device_eval_batch_size": 4} | ({"num_generations_eval": 1} if algorithm == "grpo" else {})
    options |= {} if algorithm == "dpo" else {"eval_dataset": tiny_dataset(8)}
    trainer = make(algorithm, tmp_path, callbacks=[HistoryCallback()], **options)
    trainer.train()
    whole = [entry for entry in read_history(tmp_path / HISTORY_FILE) if "eval_runtime" in entry]
    again = make(algorithm, tmp_path, callbacks=[HistoryCallback()], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = [entry for entry in read_history(tmp_path / HISTORY_FILE) if "eval_runtime" in entry]
    assert [entry["step"] for entry in found] == [0, 2, 4]
    assert [entry["eval_kl/sequence"] for entry in found] == [entry["eval_kl/sequence"] for entry in whole]


# The reference of a resumed run --------------------------------------------------------------------------------------

REFUSED = (
    r"the reference is the checkpoint's own policy, and not the one that .*, to which the KL was [\d.]+ nats.*: pass"
)


def loaded(folder: Path, **settings: Any) -> Any:
    return type(tiny_model()).from_pretrained(folder, **settings)


@pytest.fixture(scope="module", params=ALGORITHMS)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A run of four steps with a checkpoint after two, whose KL to the reference is far from 0 there."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make(request.param, folder, max_steps=4, **STEPS, **FIXED)
    trainer.train()
    assert trainer.kl.budget.kl > 0.05
    return request.param, folder, trainer


FIXED = {"kl_controller": "fixed", "kl_target": None}


def resumed(algorithm: str, folder: Path, **changes: Any) -> Any:
    trainer = make(algorithm, folder / "more", max_steps=4, **FIXED, **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return trainer


@pytest.mark.situation("resumes with a policy loaded from the checkpoint", "refused")
def test_the_checkpoint_is_not_its_own_reference(half: tuple[str, Path, Any]) -> None:
    algorithm, folder, _ = half
    with pytest.raises(CheckpointError, match=REFUSED) as refused:
        resumed(algorithm, folder, model=loaded(folder / "checkpoint-2"))
    assert ("or as ref_model" in str(refused.value)) == (algorithm != "grpo")


@pytest.mark.situation("resumes with another model than the run started from", "refused")
def test_another_reference(half: tuple[str, Path, Any]) -> None:
    algorithm, folder, _ = half
    for model in (tiny_model(7), loaded(folder / "checkpoint-4")):
        with pytest.raises(CheckpointError, match="the reference is another model, and not the one that"):
            resumed(algorithm, folder, model=model)


def test_the_reference_may_be_given(half: tuple[str, Path, Any]) -> None:
    algorithm, folder, whole = half
    if algorithm == "grpo":
        trainer = resumed(algorithm, folder)  # it takes no ref_model: the start model it is
    else:
        trainer = resumed(algorithm, folder, model=loaded(folder / "checkpoint-2"), ref_model=tiny_model())
    assert same(weights(trainer), weights(whole))
    assert trainer.kl.budget.kl == whole.kl.budget.kl


@pytest.mark.situation("resumes in another precision, or from a checkpoint without a fingerprint", "right")
@pytest.mark.parametrize("how", ["bfloat16", "no fingerprint"])
def test_nothing_right_is_refused(how: str, half: tuple[str, Path, Any], tmp_path: Path) -> None:
    algorithm, folder, _ = half
    copy, model = tmp_path / "copy", tiny_model()
    shutil.copytree(folder, copy)
    path = copy / "checkpoint-2" / STATE_FILE
    if how == "no fingerprint":
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "reference"}))
    else:
        model = model.to(torch.bfloat16)
    trainer = make(algorithm, copy, model=model, max_steps=2, **FIXED)  # over: all is loaded and nothing trained
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert trainer.state.global_step == 2


def adapted(seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(), LoraConfig(**{**LORA, "init_lora_weights": True}))


@pytest.mark.parametrize("given", ["peft_config", "PeftModel"])
def test_a_run_with_an_adapter_goes_on(given: str, tmp_path: Path) -> None:
    """A fresh adapter is drawn at random in every start; it changes nothing, and is none of the reference's."""

    def trainer(seed: int, folder: str) -> Any:
        config = LoraConfig(**{**LORA, "init_lora_weights": True})
        policy = {"model": adapted(seed)} if given == "PeftModel" else {"peft_config": config}
        return make("dpo", tmp_path / folder, max_steps=4, **policy, **STEPS, **FIXED)

    whole = trainer(1, "whole")
    whole.train()
    again = trainer(2, "more")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.kl.budget.kl == pytest.approx(whole.kl.budget.kl, rel=1e-6)


@pytest.mark.situation("resumes with the checkpoint's adapter as the policy", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_checkpoints_adapter_is_no_reference(algorithm: str, tmp_path: Path) -> None:
    config = LoraConfig(**{**LORA, "init_lora_weights": True})
    options: dict[str, Any] = {"max_steps": 2, **STEPS, **FIXED, "kl_estimator": "exact"}
    if algorithm == "ppo":
        options["kl_estimator"] = "k1"
    make(algorithm, tmp_path, peft_config=config, **options).train()
    policy = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "checkpoint-2"), is_trainable=True)
    with pytest.raises(CheckpointError, match="the reference is another model"):
        make(algorithm, tmp_path, model=policy, **{**options, "max_steps": 4}).train(resume_from_checkpoint="last")


@pytest.mark.situation("resumes DPO with precomputed log-probs of the reference", "right")
def test_precomputed_log_probs(tmp_path: Path) -> None:
    options = {**SETTINGS, "precompute_ref_log_probs": True}
    make_dpo(tiny_model(), tmp_path, **{**options, "max_steps": 2, **STEPS}).train()
    make_dpo(tiny_model(), tmp_path, **options).train(resume_from_checkpoint="last")
    with pytest.raises(CheckpointError, match="the reference is another model"):
        make_dpo(loaded(tmp_path / "checkpoint-2"), tmp_path, **options).train(resume_from_checkpoint="last")


def test_no_reference_is_none(tmp_path: Path) -> None:
    options = {"beta": 0.0, "kl_estimator": "k3", "kl_placement": "loss", **FIXED}
    make("grpo", tmp_path, max_steps=2, **options, **STEPS).train()
    assert "reference" not in json.loads((tmp_path / "checkpoint-2" / STATE_FILE).read_text())
    trainer = make("grpo", tmp_path, model=loaded(tmp_path / "checkpoint-2"), max_steps=3, **options)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3


@pytest.mark.situation("resumes a recipe with model_name_or_path: its checkpoint", "refused")
@pytest.mark.parametrize("dry", [False, True])
def test_a_recipe_that_starts_from_its_checkpoint(
    dry: bool, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(Path(recipe["output_dir"]) / "checkpoint-2")
    assert run_recipe(grpo, recipe, max_steps=2) == 0
    capsys.readouterr()
    changes = {"model_name_or_path": checkpoint, "resume_from_checkpoint": "last"}
    assert run_recipe(grpo, recipe, **changes, **({"dry_run": True} if dry else {})) == (1 if dry else 2)
    out, error = capsys.readouterr()
    said = " ".join((out + error).split())
    assert "is the checkpoint that is resumed from, which would become its own reference" in said
    assert "give the model that the run started from (./model)" in said
    assert "Traceback" not in said


# A reference that moves


SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, **FIXED}
MOVED_KINDS = {"full": None, "fresh adapter": {**LORA, "init_lora_weights": True}, "trained adapter": LORA}


def moving(algorithm: str, folder: Path, kind: str, model: Any = None, **options: Any) -> Any:
    """A trainer of five steps whose reference moves after the second and the fourth."""
    given: dict[str, Any] = {"model": tiny_model() if model is None else model}
    if kind == "fresh adapter":
        given["peft_config"] = LoraConfig(**MOVED_KINDS[kind])
    elif kind == "trained adapter" and model is None:
        given["model"] = get_peft_model(tiny_model(), LoraConfig(**MOVED_KINDS[kind]))
    return make(algorithm, folder, max_steps=5, **given, **{**SYNC, **options})


def moved_weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.reference._parameters().values()]


@pytest.mark.situation("resumes a run with sync_ref_model", "right")
@pytest.mark.parametrize("kind", MOVED_KINDS)
@all_algorithms
def test_a_moved_reference_is_put_back(algorithm: str, kind: str, tmp_path: Path) -> None:
    whole = moving(algorithm, tmp_path, kind, save_strategy="steps", save_steps=3)
    start = moved_weights(whole)
    whole.train()
    moved, origin = moved_weights(whole), whole.reference.moving._origin
    assert not same(moved, start)
    assert same(origin, start)
    again = moving(algorithm, tmp_path / "more", kind)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(moved_weights(again), moved)
    assert same(again.reference.moving._origin, origin)
    assert same(weights(again), weights(whole))
    assert again.kl.budget.kl == whole.kl.budget.kl
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in (again, whole)]
    kls = [[{k: v for k, v in entry.items() if k.startswith("kl")} for entry in log[-2:]] for log in logs]
    assert kls[0] == kls[1]
    assert kls[0][0]["kl/origin"] != kls[0][0]["kl/sequence"]


@pytest.mark.situation("resumes with sync_ref_model and a policy loaded from the checkpoint", "refused")
@all_algorithms
def test_the_start_is_not_the_checkpoint(algorithm: str, tmp_path: Path) -> None:
    """What moved is in the checkpoint, and the start is not: without the KL to it, any policy will do."""
    for options in ({}, {"kl_origin": False}):
        moving(algorithm, tmp_path, "full", save_strategy="steps", save_steps=3, **options).train()
        again = moving(algorithm, tmp_path / "more", "full", loaded(tmp_path / "checkpoint-3"), **options)
        if options:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
            assert again.state.global_step == 5
        else:
            with pytest.raises(CheckpointError, match="the reference is the checkpoint's own policy, and not the one"):
                again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.situation("trains with a reference that moves under FSDP1", "refused")
def test_a_moved_reference_that_is_flattened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("moving", "resumed"):
        monkeypatch.setattr(f"trl_klx.trainers.reference.{module}.is_flattened", lambda accelerator: True)
    with pytest.raises(ValueError, match="moves the reference weight by weight, and fsdp_version=1"):
        moving("grpo", tmp_path, "full")
    callback = Moves()  # nothing of ours moves this one
    callback.trainer = make("grpo", tmp_path, max_steps=1, callbacks=[callback], **FIXED, **EVERY_STEP)
    callback.trainer.train()
    assert "checkpoint-1 cannot be resumed from: the reference has moved" in caplog.text


@pytest.mark.situation("resumes a run with a reference that moves from there on", "right")
def test_a_reference_that_moves_from_a_checkpoint_on(tmp_path: Path) -> None:
    make("grpo", tmp_path, max_steps=5, **STEPS, **FIXED).train()
    again = moving("grpo", tmp_path / "more", "full", ref_model_sync_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    half = [0.4 * old + 0.6 * new for old, new in zip(tiny_model().parameters(), weights(again), strict=True)]
    torch.testing.assert_close(moved_weights(again), half, rtol=0, atol=1e-6)  # once, after the fifth step


class Moves(TrainerCallback):
    """A user's own way to move the reference, after every step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        policy = list(self.trainer._saved_model.parameters())
        with torch.no_grad():
            for parameter, target in zip(self.trainer.ref_model.parameters(), policy, strict=True):
                parameter.lerp_(target, 0.5)


@pytest.mark.situation("resumes a run whose reference a callback of the user's moves", "right")
def test_a_reference_that_the_user_moves(tmp_path: Path) -> None:
    runs = []
    for folder, checkpoint in (("whole", None), ("more", str(tmp_path / "whole" / "checkpoint-2"))):
        callback = Moves()
        callback.trainer = make("ppo", tmp_path / folder, callbacks=[callback], max_steps=3, **STEPS, **FIXED)
        callback.trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(callback.trainer)
    assert same(*(list(run.ref_model.parameters()) for run in runs))
    assert runs[0].kl.budget.kl == runs[1].kl.budget.kl
    (tmp_path / "whole" / "checkpoint-2" / "reference.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"reference\.pt is not the reference of this run"):
        runs[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.situation("resumes with sync_ref_model from a checkpoint that does not hold the reference", "refused")
def test_a_moved_reference_that_is_lost(tmp_path: Path) -> None:
    make("grpo", tmp_path, max_steps=2, **EVERY_STEP, **SYNC).train()
    folder = tmp_path / "checkpoint-2"
    path = folder / STATE_FILE
    state = json.loads(path.read_text())
    os.remove(folder / "reference.pt")
    for left_out in (["files"], ["files", "reference"]):
        path.write_text(json.dumps({k: v for k, v in state.items() if k not in left_out}))
        with pytest.raises(CheckpointError, match=r"had moved the reference by step 2.*before step 2, or"):
            make("grpo", tmp_path, max_steps=3, **SYNC).train(resume_from_checkpoint=str(folder))
    early = make("grpo", tmp_path / "more", max_steps=3, **SYNC)  # where it had not moved yet
    early.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert early.state.global_step == 3


def test_what_a_fingerprint_sees() -> None:
    from trl_klx.trainers.reference.fingerprint import differ, fingerprint, lasting_parameters

    model, accelerator = tiny_model(), Accelerator(cpu=True)
    whole = fingerprint(lasting_parameters(model, (), None), accelerator)
    assert whole == fingerprint(lasting_parameters(tiny_model().to(torch.bfloat16), (), None), accelerator)
    assert whole != fingerprint(lasting_parameters(tiny_model(1), (), None), accelerator)
    moved = tiny_model()
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight[0, 0] *= 1.01
    assert differ(whole, fingerprint(lasting_parameters(moved, (), None), accelerator))
    half = fingerprint(lasting_parameters(tiny_model().to(torch.float16), (), None), accelerator)
    assert not differ(whole, half)
    wider = tiny_model()
    wider.resize_token_embeddings(32)  # drawn at random, in every start
    assert whole == fingerprint(lasting_parameters(wider, (), None), accelerator)


# A model that the last step spoilt -----------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Puts a NaN into the weights after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = math.nan


@pytest.mark.situation("trains with too large a learning rate, and the last step spoils the weights", "refused")
@all_algorithms
def test_a_model_that_the_last_step_spoilt_is_none(algorithm: str, tmp_path: Path) -> None:
    trainer = make(algorithm, tmp_path, max_steps=3, callbacks=[Spoil(3)], **STEPS, save_total_limit=1)
    trainer.args.save_steps = 2
    with pytest.raises(NonFiniteError, match=r"step \d the weights of the model are not finite.*checkpoint-2"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    never = make(algorithm, tmp_path / "never", max_steps=2, callbacks=[Spoil(2)])
    with pytest.raises(NonFiniteError, match="after step 2 the weights of the model are not finite"):
        never.train()


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe of four steps with a checkpoint every two."""
    save_tiny(tmp_path / "model")
    (tmp_path / "data").mkdir()
    row = {"prompt": "1+1=", "answer": "2", "chosen": "2", "rejected": "a"}
    rows = "".join(json.dumps({**row, "prompt": f"{i}+{i}="}) + "\n" for i in range(8))
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows)
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        **STEPS,
    }


OWN_FIELDS = {
    grpo: {
        "reward_funcs": ["support.tiny.digit_reward"],
        "num_generations": 4,
        "max_completion_length": 4,
        "beta": 0.1,
    },
    dpo: {},
}
commands = pytest.mark.parametrize("command", OWN_FIELDS, ids=lambda module: module.__name__.rsplit(".", 1)[1])


def run_recipe(command: Any, fields: dict[str, Any], **changes: Any) -> int:
    path = Path(fields["output_dir"]).with_name("recipe.yaml")
    path.write_text(json.dumps({**fields, **OWN_FIELDS[command], **changes}))
    return command.main(["--config", str(path)])


@pytest.mark.situation("runs a recipe whose last step spoils the weights", "refused")
@commands
def test_a_recipe_whose_last_step_spoils_the_weights(
    command: Any, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl_klx.run import train

    real = train._train

    def spoilt(trainer: Any, *args: Any) -> None:
        trainer.add_callback(Spoil(4))
        real(trainer, *args)

    monkeypatch.setattr(train, "_train", spoilt)
    assert run_recipe(command, recipe, save_strategy="no") == 1
    assert "error: after step 4 the weights of the model are not finite" in capsys.readouterr().err
    assert not (Path(recipe["output_dir"]) / "model.safetensors").exists()


@pytest.mark.situation("runs a recipe again that had ended, with resume_from_checkpoint: last", "right")
@commands
def test_a_recipe_that_had_ended(command: Any, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(recipe["output_dir"])
    assert run_recipe(command, recipe) == 0
    history, said = read_history(run / HISTORY_FILE), capsys.readouterr().out
    model = (run / "model.safetensors").read_bytes()
    os.remove(run / "model.safetensors")
    assert run_recipe(command, recipe, resume_from_checkpoint="last", save_total_limit=1) == 0
    assert names(run) == ["checkpoint-2", "checkpoint-4"]
    assert read_history(run / HISTORY_FILE) == history
    assert (run / "model.safetensors").read_bytes() == model
    rows = [line for line in said.splitlines() if "KL, nats per" in line]
    assert rows == [line for line in capsys.readouterr().out.splitlines() if "KL, nats per" in line] != []
