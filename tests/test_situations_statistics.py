"""Situations of users: numbers in the logs, tables and cards of a run, and a KL that something outside changes."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from support.fault_tools import make
from support.tiny import Arguments, save_tiny, tiny_dataset, tiny_model
from support.tiny_dpo import preferences
from torch import Tensor
from transformers import TrainerCallback

from trl_klx.monitor.history import HistoryCallback, read_history
from trl_klx.trainers.errors import RunError
from trl_klx.trainers.session.session import KLSession

ALL = ["grpo", "dpo", "ppo"]


# Standard errors

WINDOWS, PROMPTS, ANSWERS, TOKENS = 1000, 128, 4, 6


def window(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """KL per token and mask (P, A, T) of a rollout, with a level per prompt and per answer, and prompt numbers."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    level = 0.6 * uniform(PROMPTS, 1, 1) + 0.4 * uniform(PROMPTS, ANSWERS, 1)
    noise = 0.3 * torch.randn(PROMPTS, ANSWERS, TOKENS, generator=generator)
    lengths = 1 + (4 * level + 2 * uniform(PROMPTS, ANSWERS, 1)).long()
    mask = torch.arange(TOKENS) < lengths
    numbers = torch.randint(2**50, (PROMPTS,), generator=generator).repeat_interleave(ANSWERS)
    return (level + noise).flatten(0, 1), mask.flatten(0, 1), numbers


def logged_window(kl: KLSession, generator: torch.Generator, iterations: int, parts: int) -> dict[str, float]:
    """What is logged of one rollout whose shuffled answers are read in `parts` steps, and that `iterations` times."""
    values, mask, numbers = window(generator)
    for iteration in range(iterations):
        for rows in torch.randperm(len(values), generator=generator).chunk(parts):
            measured = (1 + 0.1 * iteration) * values[rows]
            kl.measure("train", dict.fromkeys(kl.names, measured), mask[rows], numbers[rows])
            kl.end_step()
    return kl.metrics("train")


@pytest.mark.situation("reads error bars where one rollout feeds several steps (iterations, shuffled answers)", "right")
@pytest.mark.parametrize(("iterations", "parts"), [(2, 1), (4, 1), (1, 4), (1, 8)])
def test_95_percent_intervals_hold_the_truth(iterations: int, parts: int) -> None:
    kl = KLSession(Arguments(kl_estimator="k1", kl_health=False), Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(0)
    found = [logged_window(kl, generator, iterations, parts) for _ in range(WINDOWS)]
    for name in ("kl", "kl/sequence"):
        values, errors = (torch.tensor([window[key] for window in found]) for key in (name, f"{name}_se"))
        hits = ((values - values.mean()).abs() < 1.96 * errors).float().mean()
        assert 0.93 < hits < 0.97, (name, hits)


def errors_of(folder: Path, algorithm: str, steps: int, **changes: Any) -> dict[str, float]:
    """The standard errors of one log of a whole run, at learning rate 0 and with another model as reference."""
    same: dict[str, Any] = {"max_steps": steps, "logging_steps": steps, "learning_rate": 0.0, "save_strategy": "no"}
    same |= {"ref_model": tiny_model(1), "callbacks": [HistoryCallback()], **changes}
    if algorithm == "ppo":
        from support import ppo_tools

        trainer = ppo_tools.trainer(folder, **same)  # the rollout function decides the answers
    else:
        trainer = make(algorithm, folder, kl_controller="fixed", kl_target=None, **same)
    trainer.train()
    first = read_history(folder / "metrics.jsonl")[0]
    return {name: value for name, value in first.items() if name.endswith("_se")}


@pytest.mark.situation("logs once in several passes over the same prompts or pairs", "right")
@pytest.mark.parametrize(
    ("algorithm", "once", "again"),
    [
        ("grpo", {"steps": 1}, {"steps": 4, "num_iterations": 4}),
        ("dpo", {"steps": 4, "kl_probe_steps": 9}, {"steps": 8, "kl_probe_steps": 9}),
        ("ppo", {"steps": 2}, {"steps": 6}),
    ],
)
def test_what_is_read_again_makes_no_error_smaller(algorithm: str, once: dict, again: dict, tmp_path: Path) -> None:
    one, more = (errors_of(tmp_path / str(number), algorithm, **run) for number, run in enumerate((once, again)))
    assert one["kl_se"] > 0 or one["kl/data_exact_se"] > 0
    assert {name: more[name] for name in one} == pytest.approx(one, rel=1e-5)


@pytest.mark.situation("draws a prompt again in another rollout before the next log", "right")
def test_a_prompt_is_known_again(tmp_path: Path) -> None:
    """By its content, pictures too; not where an environment makes it, for which rows say nothing."""
    from trl_klx.trainers.session.prompts import RolloutPrompts

    numbered = RolloutPrompts(Accelerator(cpu=True))
    rows = [{"prompt": "1+1=", "image": picture} for picture in (b"a", b"a", b"b", b"b")]
    first = numbered.numbers(rows, 2, made_by_environments=False)
    again = numbered.numbers(rows[::-1], 2, made_by_environments=False)
    assert len(first.unique()) == 2 and first.tolist() == again.tolist()[::-1]
    made = [numbered.numbers(rows, 2, made_by_environments=True).tolist() for _ in range(2)]
    assert made == [[0, 0, 1, 1], [2, 2, 3, 3]]


# A beta that is set from outside

FIXED: dict[str, Any] = {"kl_controller": "fixed", "kl_target": None}
NAMES = {"grpo": "beta", "ppo": "kl_coef", "dpo": "kl_coef"}


class Annealing(TrainerCallback):
    """As public callbacks do it: `trainer.beta` by the step, on either side of it."""

    def __init__(self, name: str, event: str = "on_step_begin") -> None:
        self.name, self.trainer = name, None
        setattr(self, event, self._set)

    def _set(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        setattr(self.trainer, self.name, 0.2 / (1 + state.global_step))


def annealed(algorithm: str, folder: Path, event: str = "on_step_begin", **changes: Any) -> Any:
    callback = Annealing(NAMES[algorithm], event)
    callback.trainer = make(algorithm, folder, callbacks=[callback, HistoryCallback()], **{**FIXED, **changes})
    return callback.trainer


def logged(folder: Path, name: str = "kl/coef") -> list[float]:
    return [entry[name] for entry in read_history(folder / "metrics.jsonl") if name in entry]


@pytest.mark.situation("anneals beta by a callback that sets trainer.beta or trainer.kl_coef", "warned")
@pytest.mark.parametrize("algorithm", ALL)
def test_a_beta_set_by_a_callback_is_logged(algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = annealed(algorithm, tmp_path, max_steps=3)
    seen: list[float] = []
    step = trainer._end_step
    trainer._end_step = lambda: (seen.append(getattr(trainer, NAMES[algorithm])), step())[1]
    with caplog.at_level("WARNING"):
        trainer.train()
    assert seen == pytest.approx([0.2, 0.1, 0.2 / 3]) == logged(tmp_path)
    assert caplog.text.count("was set to 0.1 from outside (the config has 0.2)") == 1


@pytest.mark.situation("resumes a run whose callback sets beta after each step", "right")
@pytest.mark.parametrize("algorithm", ALL)
def test_a_beta_set_by_a_callback_is_resumed(algorithm: str, tmp_path: Path) -> None:
    saving = {"event": "on_step_end", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    annealed(algorithm, tmp_path, **saving).train()
    whole = logged(tmp_path)
    resumed = annealed(algorithm, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(tmp_path) == whole == pytest.approx([0.2, 0.2 / 2, 0.2 / 3])


@pytest.mark.situation("sets trainer.beta or trainer.kl_coef before train()", "warned")
@pytest.mark.parametrize("algorithm", ALL)
def test_a_beta_set_before_training_is_kept(algorithm: str, tmp_path: Path) -> None:
    trainer = make(algorithm, tmp_path, callbacks=[HistoryCallback()], max_steps=2, **FIXED)
    setattr(trainer, NAMES[algorithm], 0.7)
    trainer.train()
    assert logged(tmp_path) == [0.7, 0.7] and getattr(trainer, NAMES[algorithm]) == 0.7


@pytest.mark.situation("sets DPO's own beta, before training and by a callback", "right")
def test_dpos_own_beta_is_the_users(tmp_path: Path) -> None:
    trainer = make("dpo", tmp_path, callbacks=[HistoryCallback()], max_steps=2, **FIXED)
    trainer.beta = 0.7
    trainer.train()
    assert logged(tmp_path, "beta") == [0.7, 0.7] and logged(tmp_path) == [0.2, 0.2]
    with pytest.raises(ValueError, match=r"trainer.beta=0 was set: it must be more than zero"):
        trainer.beta = 0


@pytest.mark.situation(
    "sets beta where a controller sets it, where no KL is applied, or to what is not a number", "refused"
)
@pytest.mark.parametrize("algorithm", ALL)
def test_a_beta_that_cannot_be_set(algorithm: str, tmp_path: Path) -> None:
    name = NAMES[algorithm]
    steered = make(algorithm, tmp_path / "steered")
    with pytest.raises(ValueError, match=r"kl_controller='pid' sets it too.*'linear' and 'cosine'"):
        setattr(steered, name, 0.3)
    none = {"grpo": {"kl_placement": "none"}, "ppo": {"kl_placement": "none"}, "dpo": {}}[algorithm]
    without = make(algorithm, tmp_path / "without", **FIXED, **none, **{name: 0.0})
    with pytest.raises(ValueError, match="built without a KL in loss or reward"):
        setattr(without, name, 0.3)
    fixed = make(algorithm, tmp_path / "fixed", **FIXED)
    for value in (-0.1, float("nan"), "0.1", None, True):
        with pytest.raises(ValueError, match="must be a finite number, zero or more"):
            setattr(fixed, name, value)
    assert getattr(fixed, name) == 0.2


@pytest.mark.situation("changes beta in the config after the trainer was built", "refused")
@pytest.mark.parametrize("algorithm", ALL)
def test_a_config_changed_too_late(algorithm: str, tmp_path: Path) -> None:
    trainer = make(algorithm, tmp_path, max_steps=2, **FIXED)
    setattr(trainer.args if trainer.given_args is None else trainer.given_args, NAMES[algorithm], 0.3)
    with pytest.raises(ValueError, match=r"was changed to 0.3 after the trainer was built with 0.2"):
        trainer.train()


@pytest.mark.situation("sets beta by a callback on one process of several only", "refused")
def test_a_beta_of_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    kl = KLSession(Arguments(kl_estimator="k1"), accelerator)
    other = lambda rows: torch.cat([rows, torch.cat([rows[:, :-1], rows[:, -1:] / 2], dim=1)])  # noqa: E731
    monkeypatch.setattr(accelerator, "gather", other)
    ones = torch.ones(2, 3)
    kl.measure("train", dict.fromkeys(kl.names, ones), ones, torch.arange(2))
    with pytest.raises(RuntimeError, match=r"beta is 0.05 on one process and 0.1 on another"):
        kl.end_step()


# A library that patches TRL, or a subclass, that passes our KL by


def foreign_grpo_loss(self: Any, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
    """Its own loss with its own k3, as Unsloth's trainer has it."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].size(1)
    logps = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
    log_ratio = inputs["ref_per_token_logps"] - logps
    return (self.beta * (log_ratio.exp() - log_ratio - 1) - logps * inputs["advantages"].view(-1, 1)).mean()


def foreign_dpo_loss(self: Any, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.square().mean()


def foreign_scoring(self: Any, *args: Any, **kwargs: Any) -> tuple[None, None]:
    """As Unsloth's, which scores later by itself."""
    return None, None


def foreign_rollout(self: Any, inputs: list) -> dict:
    """A rollout that never comes by the trainer's own."""
    ids = torch.randint(3, 20, (len(inputs), 4))
    ones = torch.ones_like(ids)
    batch = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
    return {**batch, "advantages": torch.zeros(len(inputs)), "num_items_in_batch": ones.sum()}


def foreign_loss_without_scoring(self: Any, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=inputs["completion_ids"], attention_mask=inputs["completion_mask"]).logits.square().mean()


NEVER = (
    r"the KL that was asked for \(\w+=0.2, kl_placement='\w+'\) was not applied: .*test_situations_statistics.foreign_"
)
MEASURED_ONLY = {"beta": 0.0, "kl_placement": "none", "kl_estimator": "k3"}


@pytest.mark.situation("runs with a library that patches TRL's loss, rollout or scoring (Unsloth)", "refused")
@pytest.mark.parametrize(
    "changes", [{}, {"kl_placement": "reward", "kl_estimator": "k1"}, MEASURED_ONLY], ids=["both", "reward", "none"]
)
@pytest.mark.parametrize(
    ("method", "foreign"),
    [
        ("compute_loss", foreign_grpo_loss),
        ("_compute_loss", foreign_loss_without_scoring),
        ("_generate_and_score_completions", foreign_rollout),
        ("_get_per_token_logps_and_entropies", foreign_scoring),
    ],
)
def test_a_patched_grpo_ends_with_a_sentence(
    method: str, foreign: Any, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl.GRPOTrainer, method, foreign)
    if method == "_generate_and_score_completions":  # found where the KL is first needed
        changes = {"kl_placement": "loss", "kl_estimator": "k3", **changes}
    trainer = make("grpo", tmp_path, max_steps=2, **FIXED, **changes)
    with pytest.raises(RunError, match=NEVER.replace("0.2", r"[0.2]+")):
        trainer.train()
    assert trainer.state.global_step <= 1 and not logged(tmp_path)


@pytest.mark.situation("runs with a library that patches DPO's loss", "refused")
@pytest.mark.parametrize("changes", [{}, {"kl_coef": 0.0, "kl_placement": "none"}], ids=["loss", "none"])
def test_a_patched_dpo_ends_with_a_sentence(changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.DPOTrainer, "compute_loss", foreign_dpo_loss)
    trainer = make("dpo", tmp_path, max_steps=2, **FIXED, **changes)
    with pytest.raises(RunError, match=NEVER.replace("0.2", r"[0.2]+")):
        trainer.train()


@pytest.mark.situation("patches what DPO's loss does beneath our KL", "right")
def test_a_patch_beneath_the_kl_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL is added to whatever TRL's `_compute_loss` gives."""
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", foreign_dpo_loss)
    policy = tiny_model(1)
    trainer = make("dpo", tmp_path, max_steps=1, callbacks=[HistoryCallback()], **FIXED, ref_model=policy)
    trainer.train()
    (kl,), (loss,) = logged(tmp_path, "kl/data_exact"), logged(tmp_path, "kl/loss")
    assert 0 < loss == pytest.approx(0.2 * kl, rel=1e-4)


@pytest.mark.situation("subclasses the PPO trainer with a loss, rewards or a step of its own", "refused")
@pytest.mark.parametrize("method", ["_loss", "_shape_rewards", "training_step"])
def test_a_ppo_subclass_without_the_kl(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_klx import KLXPPOTrainer
    from trl_klx.trainers.ppo.rollout import LossOutputs

    def foreign_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "_shape_rewards":
            return torch.zeros_like(args[0].sampler_logps), torch.zeros_like(args[0].sampler_logps)
        loss = sum(parameter.square().sum() for parameter in self.model.parameters())
        return LossOutputs(loss, torch.ones(()), {}) if method == "_loss" else loss

    monkeypatch.setattr(KLXPPOTrainer, method, foreign_method)
    trainer = make("ppo", tmp_path, max_steps=2, **FIXED, kl_placement="both")
    with pytest.raises(RunError, match=r"was not applied: .*foreign_method"):
        trainer.train()


@pytest.mark.situation("runs without a KL, and a library patches TRL's loss", "right")
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_without_a_kl_patches_are_the_users(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"grpo": foreign_loss_without_scoring, "dpo": foreign_dpo_loss}[algorithm]
    monkeypatch.setattr({"grpo": trl.GRPOTrainer, "dpo": trl.DPOTrainer}[algorithm], "compute_loss", foreign)
    none = {"beta": 0.0, "kl_estimator": "k3", "kl_placement": "loss"} if algorithm == "grpo" else {"kl_coef": 0.0}
    probe = {} if algorithm == "grpo" else dict.fromkeys(("kl_probe_steps",))
    probe |= {} if algorithm == "grpo" else {"kl_probe_prompts": 64, "kl_probe_max_new_tokens": 128}
    trainer = make(algorithm, tmp_path, max_steps=2, **FIXED, **none, **probe)
    trainer.train()
    assert trainer.state.global_step == 2


# Names and tables


def last_digit(completions: list, **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


class Constant:
    """A reward with a state."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, completions: list, **columns: Any) -> list[float]:
        return [self.value] * len(completions)


def of_value(completions: list, value: float, **columns: Any) -> list[float]:
    return [value] * len(completions)


SAME_NAMES = {
    "lambdas": [lambda completions, **_: [0.25] * len(completions), lambda completions, **_: [0.5] * len(completions)],
    "partials": [functools.partial(of_value, value=0.25), functools.partial(of_value, value=0.5)],
    "objects": [Constant(0.25), Constant(0.5)],
}


@pytest.mark.situation("trains on two rewards of one name: lambdas, partials, objects of one class", "right")
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("kind", SAME_NAMES)
def test_every_reward_is_logged(kind: str, algorithm: str, tmp_path: Path) -> None:
    rewards = list(SAME_NAMES[kind])
    make(algorithm, tmp_path, max_steps=1, reward=rewards, callbacks=[HistoryCallback()], **FIXED).train()
    name = {"lambdas": "<lambda>", "partials": "of_value", "objects": "Constant"}[kind]
    assert logged(tmp_path, f"rewards/{name}/mean") == [0.25]
    assert logged(tmp_path, f"rewards/{name}_2/mean") == [0.5]


@pytest.mark.situation("trains on two reward models whose paths end in one name", "right")
def test_reward_models_of_one_name() -> None:
    from trl_klx.trainers.rewarding.functions import distinct_names

    model = torch.nn.Linear(1, 1)
    assert distinct_names(["model", "model", "model_2", ""], [model] * 4) == ["model", "model_3", "model_2", "Linear"]


@pytest.mark.situation("evaluates on several datasets, and keeps the best model by one of them", "right")
@pytest.mark.parametrize("algorithm", ALL)
def test_each_evaluation_set_has_its_own_keys(algorithm: str, tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    own, best, data = ("kl/data_exact", "log_ratio/margin"), "eval_hard_log_ratio/margin", preferences
    if algorithm != "dpo":
        own, data = ("kl/sequence", "kl/k3", "reward", "rewards/digit_reward/mean"), tiny_dataset
        best = "eval_hard_kl/sequence"
    sets = {"easy": data(8), "hard": data(16).select(range(8, 16))}
    kept = {"load_best_model_at_end": True, "metric_for_best_model": best, "per_device_eval_batch_size": 4}
    trainer = make(algorithm, tmp_path, callbacks=[HistoryCallback()], eval_dataset=sets, **FIXED, **steps, **kept)
    trainer.train()
    history = read_history(tmp_path / "metrics.jsonl")
    for name in own:
        for prefix in ("eval_easy_", "eval_hard_"):
            assert len(logged(tmp_path, prefix + name)) == 2, prefix + name
        assert not logged(tmp_path, f"eval_{name}")
    assert trainer.state.best_metric == max(logged(tmp_path, best))
    if algorithm == "dpo":  # the probe answers the prompts of all of them together, once per evaluation
        assert len(logged(tmp_path, "eval_kl/sequence")) == len(logged(tmp_path, "eval_probe/entropy")) == 2
        assert not any("kl/sequence" in name and "easy" in name for entry in history for name in entry)


def table_of(history: list[dict]) -> list[list[str]]:
    """The summary table, by columns with their headers."""
    from trl_klx.trainers.report.outcome import summary_table

    table = summary_table(history, Arguments(kl_estimator="k3"))
    return [[str(column.header), *(str(cell) for cell in column.cells)] for column in table.columns]


def numbers(step: int, value: float, prefix: str = "") -> dict[str, float]:
    names = ("reward", "rewards/f/mean", "kl/sequence", "kl/k3")
    return {"step": step, **{f"{prefix}{name}": value for name in names}}


TRAINED = [numbers(step, step / 100) for step in (10, 20, 30)]
END = {"step": 30, "train_runtime": 7.0}


@pytest.mark.situation(
    "reads 'before' in the table or the model card of a run without an evaluation at step 0", "right"
)
@pytest.mark.parametrize(
    ("history", "first", "last"),
    [
        (TRAINED, "steps 1 to 10", "steps 21 to 30"),
        ([numbers(1, 0.1), numbers(2, 0.3)], "step 1", "step 2"),
        ([*TRAINED, numbers(10, 0.1, "eval_"), numbers(20, 0.2, "eval_")], "after step 10", "after step 20"),
        ([numbers(0, 0.1, "eval_"), *TRAINED, numbers(30, 0.2, "eval_")], "before", "after"),
    ],
)
def test_first_and_last_say_of_which_steps_they_are(history: list[dict], first: str, last: str) -> None:
    from trl_klx.hub.facts import results as results_of

    columns = table_of([*history, END])
    assert [column[0] for column in columns] == ["", first, last, "target"]
    results = results_of([*history, END])
    assert (results.first, results.last) == (first, last)
    assert (columns[1][1], columns[2][1]) in [row[1:] for row in results.rows]


@pytest.mark.situation("reads the table, the card and the pictures of a run with several evaluation sets", "right")
def test_tables_and_pictures_show_every_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_klx.monitor import plots

    history = [*TRAINED, END]
    for step, value in ((0, 0.1), (30, 0.4)):
        history += [numbers(step, value, "eval_easy_"), numbers(step, value + 0.5, "eval_hard_")]
    labels, before, after, _ = table_of(history)
    rows = {label: (one, two) for label, one, two in zip(labels, before, after, strict=True)}
    assert rows["reward f (easy)"] == ("0.100", "0.400") and rows["reward f (hard)"] == ("0.600", "0.900")
    assert rows["KL, nats per sequence (hard)"] == ("0.600", "0.900")
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.setdefault(path.name, figure))
    plots.plot_run(history, tmp_path, target_unit="sequence")
    for name in (plots.KL_CONTROL, plots.REWARD_VS_KL):
        lines = {line.get_label(): list(line.get_ydata()) for line in figures[name].axes[0].lines}
        assert lines["held out: easy"] == [0.1, 0.4] and lines["held out: hard"] == [0.6, 0.9]


@pytest.mark.situation("gives reward_funcs as one plain name, in YAML or on the command line", "right")
@pytest.mark.parametrize("place", ["yaml", "command line"])
def test_one_reward_needs_no_brackets(place: str, tmp_path: Path) -> None:
    from trl_klx.hub.card import write_card
    from trl_klx.run.recipe.parse import parse
    from trl_klx.run.train import resolved_recipe
    from trl_klx.trainers.grpo.config import KLXGRPOConfig

    name = "trl_klx.rewards.exact_match"
    recipe = tmp_path / "recipe.yaml"
    line = f"reward_funcs: {name}\n" if place == "yaml" else ""
    recipe.write_text(f"{line}output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n")
    more = [] if place == "yaml" else ["--reward_funcs", name]
    parsed = parse(KLXGRPOConfig, ["--config", str(recipe), *more]).whole()
    assert parsed.run.reward_funcs == [name]
    settings = resolved_recipe(parsed)
    for given in (settings, {**settings, "reward_funcs": name}):  # the second: a run of an older version
        text = write_card(tmp_path, given, is_adapter=False).read_text()
        assert f"Rewards: `{name}`." in text


# Prompts beside messages

ASKED, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "1+1="), ("assistant", "2"), ("assistant", "3"))
)
NOT_BESIDE = {
    "UltraFeedback's shape": (
        {"prompt": "1+1=", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "its prompt is text, and chosen and rejected are messages: they hold it already, so remove the column prompt",
    ),
    "answers alone": (
        {"prompt": "1+1=", "chosen": [GOOD], "rejected": [BAD]},
        "its prompt is text, and chosen and rejected are messages: make the prompt messages, too",
    ),
    "messages beside text": (
        {"prompt": [ASKED], "chosen": "2", "rejected": "3"},
        "its prompt is messages, and chosen and rejected are text",
    ),
    "the prompt twice": (
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "begin with the messages of the prompt, which would stand there twice: remove the column prompt",
    ),
}


@pytest.mark.situation("has preference data whose prompt does not fit chosen and rejected (UltraFeedback)", "refused")
@pytest.mark.parametrize("kind", NOT_BESIDE)
def test_a_prompt_that_does_not_fit_the_answers(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trl_klx.run.dpo import main

    row, sentence = NOT_BESIDE[kind]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    places = ["--model_name_or_path", save_tiny(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    argv = [*places, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false"]
    for more in ([], ["--dry_run", "true"]):
        assert main([*argv, *more])
        shown = capsys.readouterr()
        assert sentence in " ".join((shown.out + shown.err).split())
        assert "Traceback" not in shown.err
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make("dpo", tmp_path, train_dataset=Dataset.from_list([row, row]))


@pytest.mark.situation("has text pairs whose answers begin with the prompt", "warned")
def test_answers_that_begin_with_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}=", "chosen": f"{i}={i}", "rejected": f"{i}=a"} for i in range(4)]
    with pytest.warns(UserWarning, match="begin with the prompt, which is then there twice"):
        make("dpo", tmp_path, train_dataset=Dataset.from_list(rows))
