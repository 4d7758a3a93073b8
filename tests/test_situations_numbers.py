"""Numbers, truth values, names and YAML that mean nothing: one sentence, in a recipe, on a command line, in Python."""

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.tiny import save_tiny
from trl import ModelConfig

from trl_klx.config.types import RANGES, convert
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.recipe.algorithms import ALGORITHMS
from trl_klx.run.recipe.arguments import RunArguments
from trl_klx.run.recipe.parse import parse

MODULES = {"grpo": grpo, "dpo": dpo, "ppo": ppo}
NAN, INF = math.nan, math.inf
NUMBER, WHOLE = "must be a finite number", "must be a whole number"
POSITIVE, NOT_NEGATIVE, ONE = "must be a number, more than 0", "must be a number, at least 0", "a number, at least 1"
BOOLEAN, LISTED, TEXT = "must be true or false", "does not exist; ", "must be text: put it in quotes"

# algorithm, field, value as YAML gives it, part of the sentence
NUMBERS: list[tuple[str, str, Any, str]] = [
    *(("grpo", "temperature", value, POSITIVE) for value in (0, -1.0)),
    *(("grpo", "temperature", value, NUMBER) for value in (NAN, INF, True, [1.0], "warm")),
    ("grpo", "temperature", None, "must be a finite number: give it a value, or remove the field"),
    ("grpo", "top_p", 0, "more than 0 and at most 1"),
    ("grpo", "top_p", 1.5, "more than 0 and at most 1"),
    ("grpo", "top_k", 1.5, WHOLE),
    ("grpo", "top_k", -2, "at least -1"),
    ("grpo", "min_p", 1.5, "at least 0 and at most 1"),
    ("grpo", "min_p", -0.1, "at least 0 and at most 1"),
    ("grpo", "repetition_penalty", 0, POSITIVE),
    ("grpo", "repetition_penalty", -1, POSITIVE),
    *(("grpo", "learning_rate", value, NUMBER) for value in (NAN, INF, True, "fast", "nan", [1e-5])),
    *((name, "learning_rate", -1e-5, NOT_NEGATIVE) for name in ("grpo", "dpo", "ppo")),
    ("grpo", "epsilon", -0.2, NOT_NEGATIVE),
    ("grpo", "epsilon_high", -0.2, NOT_NEGATIVE),
    ("grpo", "delta", -1, POSITIVE),
    ("grpo", "sapo_temperature_neg", -1, POSITIVE),
    *(
        ("dpo", f"adam_beta{number}", value, "at least 0 and less than 1")
        for number in (1, 2)
        for value in (-0.1, 1, 2)
    ),
    ("ppo", "adam_epsilon", -1e-8, NOT_NEGATIVE),
    ("dpo", "label_smoothing", -0.1, "at least 0 and at most 0.5"),
    ("dpo", "label_smoothing", 0.9, "at least 0 and at most 0.5"),
    ("dpo", "label_smoothing", [0.1], NUMBER),
    ("dpo", "ld_alpha", 1.5, "at least 0 and at most 1"),
    ("dpo", "discopop_tau", 0, POSITIVE),
    ("grpo", "label_smoothing_factor", NAN, NUMBER),
    *(("ppo", "weight_decay", value, part) for value, part in ((-0.1, NOT_NEGATIVE), (NAN, NUMBER))),
    *(("grpo", "max_grad_norm", value, part) for value, part in ((-1, NOT_NEGATIVE), (NAN, NUMBER))),
    *(("grpo", "warmup_steps", value, part) for value, part in ((-1, NOT_NEGATIVE), (1.5, "a whole number of steps"))),
    *(("grpo", "max_steps", value, WHOLE) for value in (1.5, True, [1], "1:30")),
    *(("grpo", "max_steps", value, "max_steps=") for value in (0, -2)),
    *(("dpo", "num_train_epochs", value, "num_train_epochs=") for value in (0, -1, NAN, True)),
    *(("dpo", "per_device_train_batch_size", value, ONE) for value in (0, -1)),
    *(("dpo", "per_device_train_batch_size", value, WHOLE) for value in (1.5, True, [4], None, "four")),
    ("dpo", "per_device_eval_batch_size", 0, ONE),
    *((name, "gradient_accumulation_steps", 0, ONE) for name in ("grpo", "dpo", "ppo")),
    *(("grpo", "num_generations", value, "at least 2") for value in (0, 1, -8)),
    *(("grpo", "num_generations", value, WHOLE) for value in ([8], 2.5, True)),
    ("grpo", "num_generations", 3, "must be divisible by num_generations (3)"),
    ("grpo", "max_completion_length", 0, ONE),
    ("grpo", "generation_batch_size", 0, ONE),
    ("grpo", "steps_per_generation", -1, ONE),
    ("grpo", "num_iterations", 0, ONE),
    ("ppo", "response_length", 0, ONE),
    ("ppo", "num_ppo_epochs", 1.5, WHOLE),
    ("ppo", "gamma", NAN, NUMBER),
    ("dpo", "max_length", 0, ONE),
    *(("grpo", "logging_steps", value, POSITIVE) for value in (0, -1)),
    ("grpo", "logging_steps", NAN, NUMBER),
    ("grpo", "save_steps", 1.5, "a whole number of steps"),
    ("grpo", "save_steps", [1, 2], NUMBER),
    *(("grpo", "seed", value, "seed=") for value in (-1, 1.5, 2**32)),
    *(("grpo", "lora_r", value, "lora_r=") for value in (0, -1, 1.5, [1])),
    ("dpo", "lora_alpha", -1, POSITIVE),
    ("ppo", "lora_dropout", 1.5, "at least 0 and less than 1"),
    ("grpo", "reward_weights", [NAN], "reward_weights"),
    ("grpo", "reward_weights", 1, "must be a list of finite numbers"),
]
OTHERS: list[tuple[str, str, Any, str]] = [
    *((name, "bf16", value, BOOLEAN) for name in ("grpo", "dpo", "ppo") for value in ("maybe", 2, 0.5, [True])),
    ("grpo", "push_to_hub", "nope", BOOLEAN),
    ("grpo", "fp16", None, BOOLEAN),
    ("dpo", "use_peft", "ja", BOOLEAN),
    ("ppo", "dataset_streaming", -1, BOOLEAN),
    ("ppo", "whiten_rewards", "", BOOLEAN),
    ("grpo", "loss_type", "grpoo", "loss_type='grpoo' does not exist; did you mean 'grpo'?"),
    ("grpo", "loss_type", ["grpo"], "must be text"),
    ("grpo", "scale_rewards", "groups", "did you mean 'group'?"),
    ("grpo", "importance_sampling_level", "tokens", "did you mean 'token'?"),
    ("grpo", "multi_objective_aggregation", "sum", LISTED),
    ("grpo", "vllm_mode", "servers", "did you mean 'server'?"),
    ("grpo", "vllm_importance_sampling_mode", "sequence", LISTED),
    ("dpo", "loss_type", "sigmod", "loss_type='sigmod' does not exist; did you mean 'sigmoid'?"),
    ("dpo", "loss_type", ["sigmoid", "hing"], "loss_type='hing' does not exist; did you mean 'hinge'?"),
    ("dpo", "loss_type", [], LISTED),
    ("dpo", "loss_type", 3, "loss_type=3"),
    ("dpo", "f_divergence_type", "reverse", LISTED),
    ("dpo", "truncation_mode", "end", LISTED),
    *((name, "lr_scheduler_type", "cosin", "did you mean 'cosine'?") for name in ("grpo", "dpo", "ppo")),
    ("grpo", "optim", "adamw", "optim='adamw' does not exist"),
    ("grpo", "eval_strategy", "step", "did you mean 'steps'?"),
    ("grpo", "save_strategy", False, "Put it in quotes, because YAML reads a bare yes, no, on or off as"),
    ("dpo", "log_level", "warn", "did you mean 'warning'?"),
    ("dpo", "log_level", ["info"], "log_level=['info']"),
    ("dpo", "train_sampling_strategy", NAN, LISTED),
    ("dpo", "ddp_backend", "glo", "did you mean 'gloo'?"),
    ("grpo", "dtype", "bf16", "dtype='bf16' does not exist; did you mean 'bfloat16'?"),
    ("grpo", "run_name", 3, TEXT),
    ("grpo", "run_name", True, TEXT),
    ("grpo", "run_name", ["a"], "must be text."),
    ("grpo", "dataset_name", 3, TEXT),
    ("grpo", "dataset_train_split", None, "must be text: give it a value"),
    ("grpo", "model_name_or_path", ["model"], "must be text."),
    ("grpo", "model_revision", 1.0, TEXT),
    ("grpo", "output_dir", True, TEXT),
    ("grpo", "reward_funcs", [3], "reward_funcs=[3] must be a list of texts"),
]
_OF_NO_CONFIG = ("lora_", "dataset_", "model_", "reward_funcs", "use_peft", "dtype")
IN_RECIPES_ONLY = [row for row in NUMBERS + OTHERS if row[1].startswith(_OF_NO_CONFIG)]
# The recipe's last lines, and part of the sentence.
YAML = [
    ("learning_rate: 1.0e-5\nlearning_rate: 1.0e-4", "'learning_rate' is given a second time in line"),
    ("generation_kwargs: {top_k: 1, top_k: 2}", "'top_k' is given a second time in line"),
    ("max_steps: 010", "010 in line LAST is read as 8: write 8, or '010' in quotes"),
    ("seed: -017", "-017 in line LAST is read as -15"),
    ("max_steps: 1:30", "1:30 in line LAST is read as 90: write 90, or '1:30' in quotes"),
    ("learning_rate: 1:30.5", "1:30.5 in line LAST is read as 90.5"),
    ("reward_weights: [010]", "010 in line LAST is read as 8"),
    ("save_strategy: no", "Put it in quotes, because YAML reads a bare yes, no, on or off as"),
    ("run_name: on", "run_name=True must be text: put it in quotes"),
    ("run_name: 2026-01-01", "must be text: put it in quotes"),
    ("run_name: 2026-13-01", "is not valid YAML"),
    ("max_steps:", "max_steps=None must be a whole number: give it a value, or remove the field"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    save_tiny(folder / "model")
    rows = [{"prompt": f"{i}+1=", "answer": "2", "chosen": "2", "rejected": "3"} for i in range(8)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(inputs: Path, tmp_path: Path, algorithm: str, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "model_name_or_path": str(inputs / "model"),
        "dataset_name": str(inputs),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    if algorithm != "dpo":
        fields["reward_funcs"] = ["trl_klx.rewards.exact_match"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**fields, **changes}))
    return path


def params(rows: list[tuple[str, str, Any, str]], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(*row, marks=marks, id=f"{row[0]}-{row[1]}={row[2]!r}") for row in rows]


def refusal(algorithm: str, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The sentence that a command ends with before it loads a model."""
    module: ModuleType = MODULES[algorithm]
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    assert module.main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.count("error: ") == printed.count("\n") == 1
    return printed.removeprefix("error: ").strip()


WRONG_NUMBER = pytest.mark.situation("gives a number that means nothing in a recipe", "refused")
WRONG_VALUE = pytest.mark.situation("gives a truth value, a name or a text that is none", "refused")


@pytest.mark.parametrize(
    ("algorithm", "field", "value", "part"),
    [*params(NUMBERS[::5] + IN_RECIPES_ONLY, WRONG_NUMBER), *params(OTHERS[::3], WRONG_VALUE)],
)
def test_a_value_that_means_nothing(
    algorithm: str,
    field: str,
    value: Any,
    part: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = recipe(inputs, tmp_path, algorithm, **{field: value})
    sentence = refusal(algorithm, ["--config", str(path)], monkeypatch, capsys)
    assert field in sentence
    assert part in sentence


@pytest.mark.situation("writes YAML that means something else: 010, 1:30, a key twice, a bare no", "refused")
@pytest.mark.parametrize(("lines", "part"), YAML)
def test_yaml_that_means_something_else(
    lines: str, part: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(inputs, tmp_path, "grpo")
    text = path.read_text() + lines + "\n"
    path.write_text(text)
    sentence = refusal("grpo", ["--config", str(path)], monkeypatch, capsys)
    assert part.replace("LAST", str(text.count("\n"))) in sentence


@pytest.mark.situation("gives a value that means nothing on the command line", "refused")
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--temperature", "nan"], "temperature=nan must be a finite number"),
        (["--learning_rate=-1e-5"], "learning_rate=-1e-05 must be a number, at least 0"),
        (["--max_steps", "1.5"], "max_steps='1.5' must be a whole number"),
        (["--bf16", "maybe"], "bf16='maybe' must be true or false"),
        (["--lr_scheduler_type", "cosin"], "did you mean 'cosine'?"),
        (["--loss_type", "grpoo"], "did you mean 'grpo'?"),
        (["--dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["--reward_weights", "1", "x"], "reward_weights=['1', 'x'] must be a list of finite numbers"),
        (["--num_generations", "8", "9"], "'9' on the command line belongs to no field"),
        (["--beta"], "--beta needs a value: write --beta VALUE."),
        (["--learning_rat", "1"], "did you mean 'learning_rate'?"),
    ],
)
def test_words_that_mean_nothing(
    words: list[str],
    part: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = recipe(inputs, tmp_path, "grpo")
    assert part in refusal("grpo", ["--config", str(path), *words], monkeypatch, capsys)


@pytest.mark.situation("gives a value that means nothing to a config in Python", "refused")
@pytest.mark.parametrize(
    ("algorithm", "field", "value", "part"),
    params([row for row in NUMBERS + OTHERS if row not in IN_RECIPES_ONLY]),
)
def test_a_config_in_python(algorithm: str, field: str, value: Any, part: str, tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, field: value}
    with pytest.raises(ValueError, match=field) as error:
        ALGORITHMS[algorithm].config(**settings)
    assert part in str(error.value)


@pytest.mark.situation("gives several values that mean nothing, to a dry run", "refused")
def test_a_dry_run_says_all_of_it(inputs: Path, tmp_path: Path) -> None:
    wrong = {"temperature": 0, "bf16": "maybe", "loss_type": "grpoo", "num_generations": 1, "lora_r": 0, "seed": 1.5}
    path = recipe(inputs, tmp_path, "grpo", **wrong)
    problems = make_plan("grpo", ["--config", str(path)]).problems
    assert {name for name in wrong for problem in problems if problem.startswith(f"{name}=")} == set(wrong)
    assert len(problems) == len(wrong)


# algorithm, fields, part of the sentence
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"optim_args": "fast"}, "optim_args='fast' has no effect with optim='adamw_torch_fused': remove it."),
    ("ppo", {"lr_scheduler_kwargs": {"speed": 1}}, "lr_scheduler_kwargs={'speed': 1}"),
    (
        "grpo",
        {"lr_scheduler_kwargs": {"speed": 1}, "lr_scheduler_type": "constant_with_warmup"},
        "lr_scheduler_kwargs={'speed': 1} has no effect with 'constant_with_warmup'",
    ),
    ("dpo", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
    ("dpo", {"lr_scheduler_type": "cosine_with_min_lr"}, "cannot work with lr_scheduler_kwargs=None"),
    ("grpo", {"generation_kwargs": {"top_p": "1e-1"}}, "generation_kwargs: top_p='1e-1' must be a finite number"),
    ("grpo", {"generation_kwargs": {"min_p": 2}}, "generation_kwargs: min_p=2 must be a number, at least 0 and at"),
    ("grpo", {"generation_kwargs": {"repetition_penalty": -1}}, "generation_kwargs: repetition_penalty=-1 must be"),
    ("ppo", {"report_to": ["tensorbord"]}, "report_to='tensorbord' does not exist; did you mean 'tensorboard'?"),
    ("dpo", {"attn_implementation": "spda"}, "attn_implementation='spda' does not exist; did you mean 'sdpa'?"),
    ("grpo", {"use_peft": True, "lora_task_type": "CASUAL_LM"}, "Invalid task type: 'CASUAL_LM'"),
    ("grpo", {"bnb_4bit_quant_storage": "bfloat"}, "'bfloat' does not exist; did you mean 'bfloat16'?"),
    ("dpo", {"gradient_checkpointing_kwargs": {"reentrant": True}}, "did you mean 'use_reentrant'?"),
]


@pytest.mark.situation("gives settings that only transformers, torch or peft know, and that cannot work", "refused")
@pytest.mark.parametrize(
    ("algorithm", "fields", "part"),
    [row for row in SETTINGS if row[0] in MODULES],
    ids=lambda value: str(value)[:50],
)
def test_settings_of_other_packages(
    algorithm: str,
    fields: dict[str, Any],
    part: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = str(recipe(inputs, tmp_path, algorithm, **fields))
    sentence = refusal(algorithm, ["--config", path], monkeypatch, capsys)
    assert part in sentence
    assert make_plan(algorithm, ["--config", path]).problems[:1] == [sentence]


@pytest.mark.situation("gives a truth value that is none for use_cpu, to a dry run", "refused")
def test_a_dry_run_reads_use_cpu(inputs: Path, tmp_path: Path) -> None:
    path = str(recipe(inputs, tmp_path, "grpo", use_cpu="maybe"))
    assert "use_cpu='maybe' must be true or false." in make_plan("grpo", ["--config", path]).problems


@pytest.mark.situation("gives a mapping where a plain value belongs, or a number as a field's name", "refused")
@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("learning_rate: {start: 1}", "learning_rate must be a plain value, not a mapping"),
        ("3: 4", "has 3 where a field's name belongs"),
        ("no: 1", "has False where a field's name belongs"),
    ],
)
def test_a_dry_run_shows_no_file_of_its_own(
    lines: str, part: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = recipe(inputs, tmp_path, "grpo")
    path.write_text(path.read_text() + lines + "\n")
    assert MODULES["grpo"].main(["--config", str(path), "--dry_run"]) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert part in printed
    assert "recipe.yaml" not in printed.replace(str(path), "")


# What must not be refused

LEGAL = {
    "all": {
        "learning_rate": ["1e-5", 0, "0"],
        "max_grad_norm": [INF, 0],
        "num_train_epochs": [0.5, 3],
        "warmup_steps": [0.1, 10],
        "max_steps": [-1, 100, "100"],
        "bf16": [0, "false", "no", None],
        "save_strategy": ["no"],
        "save_total_limit": [0, None],
        "report_to": ["none", [], ["tensorboard"]],
        "logging_steps": [0.5],
        "lr_scheduler_type": ["constant_with_warmup"],
        "neftune_noise_alpha": [None],
        "model_init_kwargs": [None, {"a": 1}],
        "seed": [0],
        "weight_decay": [1],
        "accelerator_config": [None, {"split_batches": False}],
    },
    "grpo": {
        "top_k": [0, 50],
        "min_p": [None, 0],
        "epsilon_high": [None, 0.28, 5],
        "scale_rewards": [True, False, "batch"],
        "reward_weights": [None, [1, "1e-1"]],
        "per_device_train_batch_size": [8.0],
        "pad_to_multiple_of": [None, 8],
    },
    "dpo": {"loss_type": ["hinge", ["sigmoid", "sft"]], "max_length": [None], "loss_weights": [None]},
    "ppo": {"missing_eos_penalty": [None, 1.0], "gamma": [1], "stop_token_id": [None, 0]},
}


@pytest.mark.parametrize("algorithm", list(MODULES))
def test_what_trl_takes_is_not_refused(algorithm: str, tmp_path: Path) -> None:
    """In Python and in YAML: every default, whole numbers for floats, text for numbers, None where it may be."""
    make = ALGORITHMS[algorithm].config
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    if algorithm != "grpo":  # which TRL itself does not copy
        dataclasses.replace(make(**settings))  # with every field as TRL has resolved it
    legal = {**LEGAL["all"], **LEGAL[algorithm]}
    for turn in range(max(map(len, legal.values()))):
        fields = {**settings, **{field: values[turn % len(values)] for field, values in legal.items()}}
        made = make(**fields)
        assert made.learning_rate == float(fields["learning_rate"])
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
        parsed = parse(make, ["--config", str(tmp_path / "recipe.yaml")]).whole().args
        assert {name: str(getattr(parsed, name)) for name in legal} == {
            name: str(getattr(made, name)) for name in legal
        }


def test_every_range_is_of_a_field() -> None:
    """And every default lies in it: a field that TRL renames would go unchecked."""
    known: set[str] = set()
    for make in (*(ALGORITHMS[name].config for name in MODULES), ModelConfig, RunArguments):
        made = make(output_dir="x", use_cpu=True) if make not in (ModelConfig, RunArguments) else make()
        assert convert(made, made.choices() if hasattr(made, "choices") else None) == {}
        known |= {field.name for field in dataclasses.fields(make)}
    named = {name for names in RANGES.values() for name in names.split()}
    assert not named - known
