"""A gold reward beside the trained one: the monitor by itself, and in real, tiny GRPO and PPO runs."""

import csv
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.device import PLAIN
from support.launching import Launched, alone, launch
from support.tiny import digit_reward, save_tiny, tiny_dataset, tiny_tokenizer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig, KLXPPOTrainer
from trl_klx.monitor.history import read_history
from trl_klx.monitor.overoptimisation.monitor import PICTURE, TABLE, OveroptimisationMonitor
from trl_klx.run import grpo
from trl_klx.trainers.checkpoints.whole import STATE_FILE
from trl_klx.trainers.errors import CheckpointError, RunError
from trl_klx.trainers.rewarding.gold import check_gold_reward
from trl_klx.trainers.session.prompts import prompt_number

PROMPTS = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(5) for b in range(5)]})
PEAK = 2  # the step after which the gold reward falls
ALGORITHMS = ["grpo", "ppo"]


def turning(prompts: list, completions: list, trainer_state: TrainerState, **kwargs: Any) -> list[float]:
    """A gold reward that rises for two steps and falls from then on, by far more than answers differ."""
    level = trainer_state.global_step if trainer_state.global_step <= PEAK else 2 * PEAK - trainer_state.global_step
    return [level + 0.1 * reward for reward in digit_reward(completions)]


def make_trainer(algorithm: str, folder: Path, model: str, gold: Any = turning, **changes: Any) -> Any:
    """Six steps with an evaluation before, and after each."""
    settings = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 10,  # the last batch is shorter
        **PLAIN,
        **changes,
    }
    data = {"train_dataset": tiny_dataset(), "eval_dataset": PROMPTS, "processing_class": tiny_tokenizer()}
    if algorithm == "grpo":
        own = {"num_generations": 4, "num_generations_eval": 1, "max_completion_length": 4, "beta": 0.1}
        args = KLXGRPOConfig(str(folder), **{**own, **settings})
        return KLXGRPOTrainer(model, digit_reward, args, gold_reward_func=gold, **data)
    args = KLXPPOConfig(str(folder), **{"response_length": 4, "num_ppo_epochs": 1, **settings})
    return KLXPPOTrainer(args, model=model, reward_funcs=digit_reward, gold_reward_func=gold, **data)


def evaluations(trainer: Any) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_runtime" in entry]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


# In the trainers


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_followed_over_its_turn(
    algorithm: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(algorithm, tmp_path, model)
    with caplog.at_level(logging.WARNING, logger="trl_klx.monitor.overoptimisation.monitor"):
        trainer.train()
    monitor = trainer.overoptimisation
    logs = evaluations(trainer)
    assert [entry["step"] for entry in logs] == [e.step for e in monitor.evaluations] == [0, 1, 2, 3, 4, 5, 6]
    for entry, evaluation in zip(logs, monitor.evaluations, strict=True):
        assert len(evaluation.by_prompt) == 25
        assert entry["eval_rewards/gold/mean"] == evaluation.gold
        assert entry["eval_rewards/gold/se"] == evaluation.gold_se
        assert entry["eval_kl/sequence"] == evaluation.kl
    assert logs[0]["eval_kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    # What the functions scored are the same answers: the gold reward is the level, and a tenth of the proxy.
    for step, evaluation in enumerate(monitor.evaluations):
        level = step if step <= PEAK else 2 * PEAK - step
        assert evaluation.gold == pytest.approx(level + 0.1 * evaluation.proxy, abs=1e-5)
    assert [entry["eval_overoptimisation/turned"] for entry in logs] == [0, 0, 0, 1, 1, 1, 1]
    assert monitor.best.step == PEAK
    messages = [record.message for record in caplog.records if "has turned" in record.message]
    assert len(messages) == 1
    assert f"at step {PEAK + 1}" in messages[0]
    assert f"at step {PEAK} (KL" in messages[0]
    assert "training continues" in messages[0]
    assert "no checkpoint of the best was written" in messages[0]
    assert not any("gold" in name for entry in trainer.state.log_history if "loss" in entry for name in entry)
    with (tmp_path / TABLE).open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["gold"]) for row in table] == [e.gold for e in monitor.evaluations]
    assert [float(row["d"]) for row in table] == pytest.approx([math.sqrt(max(e.kl, 0)) for e in monitor.evaluations])
    # The law is fitted up to the turn: four evaluations, and drawn no further.
    assert all(float(row["law_low"]) <= float(row["law"]) <= float(row["law_high"]) for row in table[: PEAK + 2])
    assert all(row["law"] == row["law_low"] == row["law_high"] == "" for row in table[PEAK + 2 :])
    assert (tmp_path / PICTURE).stat().st_size > 10_000
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gold_reward_is_not_trained_on(algorithm: str, model: str, tmp_path: Path) -> None:
    """Bit for bit the run without it."""
    with_gold = make_trainer(algorithm, tmp_path / "with", model, max_steps=3)
    with_gold.train()
    without = make_trainer(algorithm, tmp_path / "without", model, gold=None, max_steps=3)
    without.train()
    assert without.overoptimisation is None
    assert not (tmp_path / "without" / TABLE).exists()
    for a, b in zip(with_gold.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rewards = [[e["eval_reward"] for e in evaluations(trainer)] for trainer in (with_gold, without)]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_can_be_stopped_at_its_turn(
    algorithm: str, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"gold_action": "stop", "save_strategy": "best", "metric_for_best_model": "rewards/gold/mean"}
    trainer = make_trainer(algorithm, tmp_path, model, save_total_limit=1, **settings)
    with caplog.at_level(logging.WARNING, logger="trl_klx.monitor.overoptimisation.monitor"):
        trainer.train()
    assert trainer.state.global_step == PEAK + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{PEAK}")
    assert (tmp_path / f"checkpoint-{PEAK}" / STATE_FILE).exists()
    (message,) = [record.message for record in caplog.records if "has turned" in record.message]
    assert "training stops here" in message
    assert f"the best is kept in {tmp_path / f'checkpoint-{PEAK}'}" in message


def test_a_stopped_run_leaves_a_checkpoint_and_the_best_one(model: str, tmp_path: Path) -> None:
    """With checkpoints by steps: the last state is saved, and the best gold reward is kept beside the newest."""
    settings = {"gold_action": "stop", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_trainer("grpo", tmp_path, model, **settings)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{PEAK}", f"checkpoint-{PEAK + 1}"}
    assert trainer.args.metric_for_best_model == "eval_rewards/gold/mean"
    assert trainer.state.best_metric == pytest.approx(trainer.overoptimisation.best.gold)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_knows_what_went_before(algorithm: str, model: str, tmp_path: Path) -> None:
    """Six steps in one go, and four, a checkpoint and two more: one table, and the turn is not announced again."""
    settings = {"save_strategy": "steps", "save_steps": 4, "eval_on_start": False}
    whole = make_trainer(algorithm, tmp_path / "whole", model, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    half = make_trainer(algorithm, tmp_path / "half", model, **settings)
    half.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-4"))
    assert half.overoptimisation.evaluations == whole.overoptimisation.evaluations
    assert (tmp_path / "half" / TABLE).read_text() == (tmp_path / "whole" / TABLE).read_text()
    assert half.overoptimisation.turn == whole.overoptimisation.turn is not None
    assert half.overoptimisation.turned_at == PEAK + 1


def test_an_evaluation_made_again_replaces_the_first(model: str, tmp_path: Path) -> None:
    """A checkpoint may be older than the last evaluation of its step; and `train` begins a run."""
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer("grpo", tmp_path, model, **settings).train()
    again = make_trainer("grpo", tmp_path, model, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [evaluation.step for evaluation in again.overoptimisation.evaluations] == [0, 1, 2, 3, 4, 5, 6]
    again.train()
    assert [evaluation.step for evaluation in again.overoptimisation.evaluations] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_begins_with_train(model: str, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", tmp_path, model, max_steps=1, eval_on_start=False)
    trainer.evaluate()
    assert [evaluation.step for evaluation in trainer.overoptimisation.evaluations] == [0]
    trainer.train()
    assert [evaluation.step for evaluation in trainer.overoptimisation.evaluations] == [1]


def test_a_spoilt_state_is_named(model: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer("grpo", tmp_path, model, **settings).train()
    path = tmp_path / "checkpoint-1" / STATE_FILE
    state = json.loads(path.read_text())
    for spoilt in (
        {},
        {"evaluations": [{"step": 1}], "turned_at": None, "planned": 1},
        {"evaluations": 3, "turned_at": None, "planned": 1},
        [],
    ):
        path.write_text(json.dumps({**state, "overoptimisation": spoilt}))
        with pytest.raises(CheckpointError, match="is not a readable controller state"):
            make_trainer("grpo", tmp_path, model, **settings).train(resume_from_checkpoint=str(path.parent))
    path.write_text(json.dumps({name: value for name, value in state.items() if name != "overoptimisation"}))
    resumed = make_trainer("grpo", tmp_path, model, **{**settings, "max_steps": 2})
    resumed.train(resume_from_checkpoint=str(path.parent))  # of a run without a gold reward
    assert [evaluation.step for evaluation in resumed.overoptimisation.evaluations] == [1, 2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_answers_without_a_gold_reward_do_not_count(algorithm: str, model: str, tmp_path: Path) -> None:
    def sometimes(prompts: list, completions: list, **kwargs: Any) -> list[float | None]:
        return [None if prompt.startswith("0") else (math.inf if prompt.startswith("1") else 1.0) for prompt in prompts]

    trainer = make_trainer(algorithm, tmp_path, model, gold=sometimes, max_steps=1)
    trainer.train()
    assert [len(evaluation.by_prompt) for evaluation in trainer.overoptimisation.evaluations] == [15, 15]
    assert evaluations(trainer)[0]["eval_rewards/gold/mean"] == 1.0

    def never(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    with pytest.raises(RunError, match="at step 0 gold_reward_func gave no answer"):
        make_trainer(algorithm, tmp_path, model, gold=never).train()


def test_several_answers_to_a_prompt_are_one(model: str, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", tmp_path, model, num_generations_eval=2, max_steps=1)
    trainer.train()
    values = list(trainer.overoptimisation.evaluations[0].by_prompt.values())
    assert len(values) == 25
    assert trainer.overoptimisation.evaluations[0].gold_se == pytest.approx(np.std(values, ddof=1) / 5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_dataset_is_no_point_of_the_curve(algorithm: str, model: str, tmp_path: Path) -> None:
    trainer = make_trainer(algorithm, tmp_path, model, max_steps=1)
    trainer.train()
    before = list(trainer.overoptimisation.evaluations)
    metrics = trainer.evaluate(PROMPTS.select(range(5)), metric_key_prefix="other")
    assert trainer.overoptimisation.evaluations == before
    assert any(name.endswith("rewards/gold/mean") for name in metrics)


def test_a_gold_reward_that_cannot_be_followed_is_refused(model: str, tmp_path: Path) -> None:
    async def later(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    def gold(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    for changes, sentence in [
        ({"gold": None, "gold_action": "stop"}, "gold_action='stop' has no effect without a gold reward"),
        ({"gold_action": "halt"}, "gold_action='halt' does not exist"),
        ({"gold": later}, "must be one plain function"),
        ({"gold": [gold]}, "must be one plain function"),
        ({"gold": nn.Linear(1, 1)}, "must be one plain function"),
        ({"beta": 0.0}, "measure it by kl_placement='none', or give beta a positive value"),
        ({"eval_strategy": "no"}, "eval_strategy='no'"),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            make_trainer("grpo", tmp_path, "nowhere", **changes)  # no model is loaded
        assert str(error.value).endswith(".")
    args = KLXGRPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, beta=0.1, use_cpu=True, bf16=False)
    check_gold_reward(args, turning)
    data = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match="eval_dataset holds 2 datasets"):
        KLXGRPOTrainer(
            model, digit_reward, args, eval_dataset={"a": PROMPTS, "b": PROMPTS}, gold_reward_func=turning, **data
        )
    with pytest.raises(ValueError, match="a reward function is called 'gold'"):
        KLXGRPOTrainer(model, gold, args, eval_dataset=PROMPTS, gold_reward_func=turning, **data)


def test_a_recipe_names_its_gold_reward(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS["prompt"]]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_rewards.py").write_text(
        "def digits(completions, **kwargs):\n    return [float(sum(map(str.isdigit, text))) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = f"--model_name_or_path {model} --dataset_name data --output_dir run --max_steps 2 --eval_strategy steps "
    argv += (
        "--eval_steps 1 --eval_on_start --num_generations_eval 1 --num_generations 2 --per_device_train_batch_size 4 "
    )
    argv += (
        "--per_device_eval_batch_size 25 --max_completion_length 4 --beta 0.1 --use_cpu --bf16 false --report_to none "
    )
    argv += "--reward_funcs own_rewards.digits --gold_reward_func trl_klx.rewards.exact_match"
    assert grpo.main(argv.split()) == 0
    assert len((tmp_path / "run" / TABLE).read_text().splitlines()) == 4
    history = read_history(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in history if "eval_rewards/gold/mean" in entry] == [0, 1, 2]
    printed = capfd.readouterr().out
    assert "reward gold" in printed
    assert "Gold reward: 0." in printed
    assert "it has not turned." in printed


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 4}
STOPPED = {"gold": True, "gold_action": "stop", **EVALUATED}
TWO: dict[str, dict] = {
    "gold-grpo": {"algorithm": "grpo", "num_generations_eval": 1, **STOPPED},
    "gold-ppo": {"algorithm": "ppo", **STOPPED},
}


@pytest.mark.parametrize("launched", [launch("ddp", name, options) for name, options in TWO.items()], indirect=True)
def test_two_processes_decide_as_one(launched: Launched) -> None:
    """Both stop at the turn, with the same numbers; the gold reward of each prompt is that of one process."""
    one = alone(TWO[launched.name])
    first, second = launched.ranks
    assert first["gold"] == second["gold"]  # to the last bit
    assert [(step, gold, prompts) for step, _, gold, prompts in first["gold"]] == [
        (step, gold, prompts) for step, _, gold, prompts in one["gold"]
    ]
    assert [step for step, *_ in one["gold"]] == [0, 1, 2, 3]
    assert all(len(prompts) == 25 for *_, prompts in one["gold"])
    assert one["steps"] == first["steps"] == second["steps"] == 3  # of four


# The monitor by itself


def fed(gold: Any, kl: Any, *, action: str = "warn", planned: int = 5, prompts: int = 30) -> OveroptimisationMonitor:
    """A monitor after evaluations with these mean gold rewards and KLs."""
    monitor = OveroptimisationMonitor(action)
    begin(monitor, planned)
    rng = np.random.default_rng(0)
    for step, (level, value) in enumerate(zip(gold, kl, strict=True)):
        noise = torch.tensor(0.1 * rng.normal(size=prompts))
        monitor.measure(torch.arange(prompts), noise, level + noise)
        monitor.end_evaluation(step, value, 0.0)
    return monitor


def begin(monitor: OveroptimisationMonitor, planned: int) -> None:
    args = TrainingArguments("unused", eval_strategy="steps", eval_steps=2, eval_on_start=True, use_cpu=True)
    state = TrainerState(max_steps=2 * (planned - 1), eval_steps=2)
    monitor.on_train_begin(args, state, TrainerControl())


def test_planned_evaluations_are_counted() -> None:
    monitor = OveroptimisationMonitor()
    begin(monitor, 13)
    assert monitor._planned == 13
    args = TrainingArguments("unused", eval_strategy="epoch", use_cpu=True)
    monitor.on_train_begin(args, TrainerState(max_steps=100, num_train_epochs=3), TrainerControl())
    assert monitor._planned == 3


def test_standard_errors_count_prompts() -> None:
    monitor = OveroptimisationMonitor()
    values = torch.tensor([1.0, 2.0, 4.0])
    assert not monitor.is_measuring
    for _ in range(4):  # four equal answers to each prompt tell no more than one
        monitor.measure(torch.tensor([5, 6, 7]), -values, values)
    assert monitor.is_measuring
    metrics = monitor.end_evaluation(0, 0.0, None)
    assert metrics["rewards/gold/mean"] == pytest.approx(7 / 3)
    assert metrics["rewards/gold/se"] == pytest.approx(float(values.std()) / math.sqrt(3))
    (evaluation,) = monitor.evaluations
    assert (evaluation.proxy, evaluation.proxy_se) == pytest.approx((-7 / 3, float(values.std()) / math.sqrt(3)))
    assert "overoptimisation/alpha" not in metrics
    assert not monitor.is_measuring


def test_an_evaluation_without_a_kl_is_logged_only() -> None:
    monitor = OveroptimisationMonitor()
    monitor.measure(torch.tensor([1, 2]), torch.ones(2), torch.tensor([1.0, 3.0]))
    assert monitor.end_evaluation(0, None, None) == {"rewards/gold/mean": 2.0, "rewards/gold/se": 1.0}
    assert monitor.evaluations == []
    assert monitor.summary() == "Over-optimisation: there was no evaluation."


def test_the_budget_appears_when_the_peak_is_known() -> None:
    kl = np.linspace(0, 6, 7) ** 2
    d = np.sqrt(kl)
    with np.errstate(divide="ignore", invalid="ignore"):
        gold = np.nan_to_num(d * (0.5 - 0.2 * np.log(d)))
    early, late = fed(gold[:3], kl[:3]), fed(gold, kl)
    assert early.fit is None
    assert early.safe_budget is None
    peak = math.exp(2 * (0.5 / 0.2 - 1))
    assert late.safe_budget == pytest.approx(peak / 2, rel=0.1)
    assert late._metrics()["overoptimisation/safe_budget"] == late.safe_budget
    assert late._metrics()["overoptimisation/peak_kl"] == 2 * late.safe_budget
    assert "a safe budget is" in late.summary()
    assert late.turn is None


def test_a_turn_that_heals_is_announced_again_when_it_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with caplog.at_level(logging.WARNING, logger="trl_klx.monitor.overoptimisation.monitor"):
        monitor, found = OveroptimisationMonitor("stop"), []
        for step, level in enumerate((0.0, 1.0, 0.5, 0.4, 1.5, 0.2)):
            monitor.measure(torch.arange(30), torch.zeros(30), torch.full((30,), level))
            monitor.end_evaluation(step, 0.1 * step, 0.0)
            control = TrainerControl()
            monitor.on_evaluate(args, TrainerState(global_step=step, is_world_process_zero=True), control)
            assert control.should_training_stop == control.should_save == (monitor.turn is not None)
            found.append(len([record for record in caplog.records if "has turned" in record.message]))
    assert found == [0, 0, 1, 1, 1, 2]


def test_a_monitor_survives_a_checkpoint(tmp_path: Path) -> None:
    monitor = fed([0.0, 1.0, 1.2, 1.1, 0.4], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert monitor.turn is not None
    again = OveroptimisationMonitor()
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again._planned == 5
    assert again.evaluations == monitor.evaluations
    assert again.turn == monitor.turn
    assert again.fit is not None
    assert monitor.fit is not None
    assert again.fit.alpha == monitor.fit.alpha


def test_a_full_disk_costs_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    monitor = fed([0.0, 1.0], [0.0, 1.0])
    args = TrainingArguments(str(tmp_path / "file"), use_cpu=True)
    monitor.on_evaluate(args, TrainerState(is_world_process_zero=True), TrainerControl())
    assert "could not be written" in caplog.text


def test_a_prompts_number_is_its_own() -> None:
    message = [{"role": "user", "content": "1+1="}]
    assert prompt_number("1+1=") == prompt_number("1+1=") != prompt_number("1+2=")
    assert prompt_number(message) == prompt_number([{"content": "1+1=", "role": "user"}]) != prompt_number("1+1=")
    picture = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    assert prompt_number(picture) == prompt_number(picture)
    assert 0 <= prompt_number("1+1=") < 2**63


# A budget that the monitor finds


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_auto_budget_is_the_monitors_safe_budget(
    algorithm: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known from the third evaluation on, far below the KL that the run has by then: it ends at the next step."""
    known = property(lambda monitor: 1e-6 if len(monitor.evaluations) >= 3 else None)
    monkeypatch.setattr(OveroptimisationMonitor, "safe_budget", known)
    options = {"kl_budget": "auto", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(algorithm, tmp_path, model, **options)
    trainer.train()
    assert [e.step for e in trainer.overoptimisation.evaluations] == [0, 1, 2, 3]
    assert trainer.state.global_step == 3
    assert trainer.kl.budget.limit == 1e-6
    assert trainer.kl.budget.ends_run
    resumed = make_trainer(algorithm, tmp_path, model, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.kl.budget.limit == 1e-6
    assert resumed.state.global_step == 3  # it had ended


def test_an_auto_budget_needs_a_gold_reward(model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kl_budget='auto' is half the KL at which a gold reward peaks"):
        make_trainer("grpo", tmp_path, model, gold=None, kl_budget="auto")
