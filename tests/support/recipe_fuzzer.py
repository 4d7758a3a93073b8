"""Recipes gone wrong, from a seed: each is run and dry-run in a process of its own, and what happens is judged.

`PYTHONPATH=tests python -m support.recipe_fuzzer --seed 7 --cases 1000` hunts; `test_fuzz_recipes.py` keeps what it
found found.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

STARTER = Path(__file__).parent.parent.parent / "recipes" / "starter"
TIMEOUT = 60  # seconds, of one run or dry run

# What makes a starter recipe run in one small step on the tiny model.
_SMALL = {
    "model_name_or_path": "../model",
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "warmup_steps": 0,
    "report_to": [],
    "disable_tqdm": True,
}
_NO_EVALUATION = ("eval_on_start", "eval_strategy", "eval_steps", "num_generations_eval", "per_device_eval_batch_size")
_SMALL_BY = {
    "grpo": {"dataset_name": "../data", "num_generations": 2, "max_completion_length": 4},
    "ppo": {"dataset_name": "../data", "response_length": 4, "local_rollout_forward_batch_size": 4},
    "dpo": {"dataset_name": "../pairs", "max_length": 32},
}
_REWARDS = """
import sys
def good(completions, **kwargs): return [float(len(text)) for text in completions]
def no_kwargs(completions): return [1.0 for _ in completions]
def wrong_length(completions, **kwargs): return [1.0]
def strings(completions, **kwargs): return ["good" for _ in completions]
def nothing(completions, **kwargs): return None
def nones(completions, **kwargs): return [None for _ in completions]
def scalar(completions, **kwargs): return 1.0
def mapping(completions, **kwargs): return {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
def lists(completions, **kwargs): return [[1.0] for _ in completions]
def wants_messages(completions, **kwargs): return [len(c[0]["content"]) for c in completions]
def needs_column(completions, solution, **kwargs): return [1.0 for _ in completions]
def raises(completions, **kwargs): raise RuntimeError("the reward's own fault")
def exits(completions, **kwargs): sys.exit(3)
def row(example): return {"prompt": example["prompt"], "answer": "2"}
def row_none(example): return None
def row_raises(example): raise KeyError("question")
def row_text(example): return "text"
NUMBER = 3
"""


class Case(NamedTuple):
    """One recipe, and what must happen: it is refused where it means nothing, and runs where it means something."""

    algorithm: str
    name: str
    text: str
    words: tuple[str, ...] = ()
    must_refuse: bool = False
    must_run: bool = False


class Outcome(NamedTuple):
    """What one process did."""

    status: int | None  # None: it had to be killed
    printed: str
    loaded: bool  # whether a model's weights were about to be loaded
    seconds: float


# The workplace


def prepare(folder: Path) -> None:
    """A tiny model, data good and bad, and a module of rewards, for every case to use."""
    from support.tiny import save_tiny

    save_tiny(folder / "model")
    (folder / "fuzz_rewards.py").write_text(_REWARDS)
    (folder / "fuzz_broken.py").write_text("def reward(:\n")
    (folder / "fuzz_exits.py").write_text("import sys\nsys.exit(0)\n")
    for name, lines in datasets().items():
        for split in ("train", "test"):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    shutil.copytree(folder / "model", folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(folder / "model", folder / "cut_weights")
    weights = (folder / "cut_weights" / "model.safetensors").read_bytes()
    (folder / "cut_weights" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(folder / "model", folder / "other_shape")
    config = json.loads((folder / "other_shape" / "config.json").read_text())
    (folder / "other_shape" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    (folder / "empty_folder").mkdir()
    (folder / "a_file").write_text("text")


def datasets() -> dict[str, list]:
    """Rows by the name of their folder; the names of those that can teach nothing begin with bad_."""
    row = {"prompt": "1+1=", "answer": "2"}
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    rows = [{**row, "prompt": f"{i}+1="} for i in range(8)]
    pairs = [{**pair, "prompt": f"{i}+1="} for i in range(8)]
    return {
        "data": rows,
        "pairs": pairs,
        "bad_none": [{**row, "prompt": None}] * 8,
        "bad_number": [{**row, "prompt": 3}] * 8,
        "bad_mapping": [{**row, "prompt": {"a": "b"}}] * 8,
        "bad_empty_text": [{**row, "prompt": ""}] * 8,
        "bad_file": [],
        "bad_syntax": ['{"prompt": \n'],
        "bad_long": [{**row, "prompt": "1" * 500}] * 8,
        "bad_column": [{"question": "1+1=", "answer": "2"}] * 8,
        "bad_equal": [{**pair, "chosen": "2", "rejected": "2"}] * 8,
        "bad_both_empty": [{**pair, "chosen": "", "rejected": ""}] * 8,
        "bad_chosen_none": [{**pair, "chosen": None}] * 8,
        "bad_chosen_number": [{**pair, "chosen": 2}] * 8,
        "bad_mixed": [{"prompt": "1+1=", "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3"}] * 8,
        "some_none": [*rows[:7], {**row, "prompt": None}],
        "one_row": rows[:1],
        "reserved": [{**row, "completions": "2", "prompts": "1"}] * 8,
    }


# The cases


def base_recipes() -> dict[str, dict[str, Any]]:
    """The starter recipes, small."""
    found = {}
    for path in sorted(STARTER.glob("*.yaml")):
        algorithm = path.stem.split("_")[0]
        fields = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in _NO_EVALUATION}
        if algorithm != "dpo":
            fields["reward_funcs"] = ["fuzz_rewards.good"]
        fields.pop("kl_probe_steps", None), fields.pop("kl_probe_prompts", None)
        fields.pop("kl_probe_max_new_tokens", None)
        found[path.stem] = {**fields, **_SMALL, **_SMALL_BY[algorithm]}
    return found


# Values by kind; what a field of that kind may never be.
_NOT_A_NUMBER = [float("nan"), True, "many", [1], [1, 2], {"a": 1}, "", "1:30", "nan"]
_ALWAYS_NEGATIVE = [-1, -0.5, float("-inf")]
_WRONG_BY_FIELDS: list[tuple[str, list[Any]]] = [
    ("temperature", [0, float("inf"), None]),
    ("top_p", [0, 1.5, float("inf"), None]),
    ("min_p", [1.5]),
    ("repetition_penalty", [0, float("inf"), None]),
    ("learning_rate", [float("inf"), None]),
    ("weight_decay max_grad_norm epsilon epsilon_high router_aux_loss_coef adam_epsilon lora_dropout", []),
    ("adam_beta1 adam_beta2 lora_dropout label_smoothing_factor", [1, 1.5, float("inf")]),
    ("delta lora_alpha sapo_temperature_neg discopop_tau", [0, float("inf")]),
    ("label_smoothing", [0.9, 1]),
    ("ld_alpha top_entropy_quantile ref_model_mixup_alpha", [1.5]),
    ("gamma lam", [1.5]),
    ("per_device_train_batch_size gradient_accumulation_steps num_generations max_completion_length", [0, 1.5, None]),
    ("num_iterations lora_r num_ppo_epochs num_mini_batches response_length", [0, 1.5, None]),
    ("local_rollout_forward_batch_size per_device_eval_batch_size", [0, 1.5, None]),
    ("steps_per_generation generation_batch_size max_length", [0, 1.5]),
    ("logging_steps", [0, 1.5, None, float("inf")]),
    ("save_steps", [1.5, None]),
    ("seed warmup_steps dataloader_num_workers", [1.5, None]),
    ("num_generations", [1]),
    ("vf_coef cliprange cliprange_value entropy_coef beta kl_coef", [float("inf")]),
]
_MAY_BE_FRACTION = "warmup_steps"
_MAY_BE_NEGATIVE = ("max_steps",)
_NOT_BOOLEAN = ["maybe", 2, -1, 0.5, [True], {"a": True}, "", "ja"]
_BOOLEANS = (
    "bf16 fp16 use_cpu gradient_checkpointing push_to_hub eval_on_start logging_first_step use_peft disable_dropout"
    " remove_unused_columns log_completions mask_truncated_completions sync_ref_model whiten_rewards padding_free"
    " precompute_ref_log_probs allow_biased_kl kl_health dataset_streaming use_dora load_in_4bit full_determinism"
    " dataloader_drop_last average_tokens_across_devices save_only_model trust_remote_code use_vllm"
)
_ENUMS = (
    "loss_type scale_rewards importance_sampling_level lr_scheduler_type optim eval_strategy save_strategy hub_strategy"
    " logging_strategy vllm_mode vllm_importance_sampling_mode multi_objective_aggregation f_divergence_type log_level"
    " truncation_mode dtype attn_implementation train_sampling_strategy kl_estimator kl_placement kl_credit"
    " kl_controller kl_target_unit kl_direction kl_is_mode ddp_backend"
)
_MISSPELLED = ["grpoo", "sigmoidd", "", "Group", ["nothing"], {"a": 1}, 3, True, float("nan")]
# What only transformers, torch or peft know.
_SETTINGS: list[tuple[str, Any]] = [
    *(("optim_args", value) for value in ("fast", "betas=2", "speed=3", "betas=(2,0.9)")),
    *(
        ("lr_scheduler_kwargs", value)
        for value in ({"speed": 1}, {"num_cycles": "many"}, {"num_cycles": 1}, "fast", [1])
    ),
    *(("lr_scheduler_type", value) for value in ("reduce_lr_on_plateau", "cosine_with_min_lr")),
    *(("generation_kwargs", {name: -1}) for name in ("temperature", "top_p", "repetition_penalty", "speed", "min_p")),
    *(("generation_kwargs", {name: value}) for name, value in (("top_p", 2), ("temperature", "warm"))),
    *(("report_to", value) for value in ("tensorbord", ["nothing"], [3], {"a": 1}, 3)),
    *(("attn_implementation", value) for value in ("flash", "flash_attention_9", "SDPA", 3)),
    *(("lora_task_type", value) for value in ("CASUAL_LM", 3, None)),
    *(("lora_target_modules", value) for value in ([], [3], 3, ["nothing_proj"], "nothing_proj", {"a": 1})),
    *(("cache_implementation", value) for value in ("nothing", 3)),
    *(("model_init_kwargs", value) for value in ({"speed": 1}, {"dtype": "float33"}, "fast", [1])),
    *(("accelerator_config", value) for value in ({"speed": 1}, "nowhere.json", [1], 3)),
    *(("chat_template_kwargs", value) for value in ("fast", [1])),
    *(("gradient_checkpointing_kwargs", value) for value in ({"speed": 1}, "fast", [1])),
    ("bf16_full_eval", "maybe"),
    ("bnb_4bit_quant_storage", "nothing"),
    ("include_num_input_tokens_seen", "some"),
    ("loss_weights", [1.0, 2.0]),
    ("loss_type", ["sigmoid", "sigmoidd"]),
    ("num_generations", 3),
    ("generation_batch_size", 6),
    ("num_mini_batches", 3),
    ("stop_token", "stop"),
    ("kl_group_targets", {"a": -1}),
    ("kl_monitor", ["k5"]),
    ("metric_for_best_model", 3),
    ("max_steps", -7),
]
_LEGAL: list[tuple[str, Any]] = [
    ("learning_rate", "1e-5"),
    ("learning_rate", 0),
    ("max_grad_norm", float("inf")),
    ("bf16", "false"),
    ("max_steps", "1"),
    ("warmup_steps", 0.1),
    ("lr_scheduler_type", "cosine"),
    ("optim", "sgd"),
    ("report_to", "none"),
    ("scale_rewards", False),
    ("loss_type", "hinge"),
    ("loss_type", "dr_grpo"),
    ("top_k", 5),
    ("generation_kwargs", {"do_sample": True}),
    ("attn_implementation", "eager"),
    ("lora_target_modules", "all-linear"),
    ("lora_r", 2),
    ("save_strategy", "no"),
    ("seed", 0),
    ("gradient_checkpointing", True),
    ("run_name", "3"),
]
_TEXTS = "dataset_name dataset_train_split run_name hub_model_id model_revision stop_token output_dir dataset_config"
_NOT_TEXT = [["a"], {"a": 1}, True, float("nan"), 3]
_PATHS = [
    ("output_dir", ["", 3, "../a_file", "/proc/nowhere/run", ["run"], True], True),
    ("model_name_or_path", ["../no_weights", "../cut_weights", "../other_shape", "../empty_folder"], True),
    ("model_name_or_path", ["", 3, "../a_file", None, ["../model"], "../nowhere"], True),
    ("dataset_name", ["", 3, "../a_file", None, "../empty_folder", "../nowhere"], True),
    ("resume_from_checkpoint", ["../empty_folder", "nowhere", "checkpoint-1"], True),
    ("dataset_train_split", ["training", "", "test"], False),
]
_REWARD_NAMES = (
    "no_kwargs wrong_length strings nothing nones scalar mapping lists wants_messages needs_column raises exits NUMBER"
    " nowhere"
)


def _field_case(rng: random.Random, fields: dict[str, Any], known: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """One field with a value that it cannot have: what was changed, the fields, whether it must be refused."""
    kind = rng.choice(["number", "number", "number", "boolean", "enum", "text", "any"])
    if kind == "number":
        name, wrong = rng.choice([(n, w) for names, w in _WRONG_BY_FIELDS for n in names.split() if n in known])
        wrong = [*wrong, *_NOT_A_NUMBER, *([] if name in _MAY_BE_NEGATIVE else _ALWAYS_NEGATIVE)]
    elif kind == "boolean":
        name, wrong = rng.choice([n for n in _BOOLEANS.split() if n in known]), _NOT_BOOLEAN
    elif kind == "enum":
        name, wrong = rng.choice([n for n in _ENUMS.split() if n in known]), _MISSPELLED
    elif kind == "text":
        name, wrong = rng.choice([n for n in _TEXTS.split() if n in known]), _NOT_TEXT
    else:
        name = rng.choice(sorted(set(known) - _NOT_FUZZED))
        value = rng.choice([None, -1, 0, 0.5, float("nan"), float("inf"), "text", "", [], [1], {}, {"a": 1}])
        return f"{name}: {value!r}", {**fields, name: value}, False
    value = rng.choice(wrong)
    if kind == "enum" and (name, value) in (("scale_rewards", True), ("attn_implementation", "")):
        value = "grpoo"
    needed = {"use_peft": True} if name.startswith("lora_") else {}
    return f"{name}: {value!r}", {**fields, **needed, name: value}, True


# Fields that reach outside the case's folder or start something of their own.
_NOT_FUZZED = {"env", "deepspeed", "fsdp", "fsdp_config", "torch_compile", "torch_compile_mode", "dry_run", "debug"}
_NOT_FUZZED |= {"torch_compile_backend", "push_to_hub", "accelerate_config", "num_processes"}
_NOT_FUZZED |= {"parallelism_config", "output_dir"}


def _key_case(rng: random.Random, fields: dict[str, Any], known: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """One key left out, misspelled or in other letters."""
    name = rng.choice(sorted(fields))
    value = fields.pop(name)
    kind = rng.choice(["drop", "misspell", "upper", "number", "space"])
    if kind == "drop":
        return f"without {name}", fields, name in ("model_name_or_path", "dataset_name", "reward_funcs")
    key: Any = {"misspell": name[:-2] + name[-1], "upper": name.upper(), "number": 3, "space": f"{name} "}[kind]
    return f"{name} as {key!r}", {**fields, key: value}, True


def _data_case(rng: random.Random, algorithm: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    if rng.random() < 0.4:
        option, values, refuse = rng.choice(_PATHS)
        value = rng.choice(values)
        return f"{option}: {value!r}", {**fields, option: value}, refuse
    if rng.random() < 0.2:
        value = rng.choice(["row_none", "row_raises", "row_text", "NUMBER", "nowhere", "row"])
        wrong = value != "row" or algorithm == "dpo"
        return f"dataset_prepare: {value}", {**fields, "dataset_prepare": f"fuzz_rewards.{value}"}, wrong
    name = rng.choice(sorted(datasets()))
    return f"dataset_name: {name}", {**fields, "dataset_name": f"../{name}"}, _is_bad_data(algorithm, name)


def _is_bad_data(algorithm: str, name: str) -> bool:
    if algorithm == "dpo":
        return name in ("bad_equal", "bad_both_empty", "bad_chosen_none", "bad_chosen_number", "bad_file", "data")
    return name in ("bad_none", "bad_number", "bad_mapping", "bad_empty_text", "bad_file", "bad_syntax", "bad_column")


def _reward_case(rng: random.Random, fields: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    value: Any = f"fuzz_rewards.{rng.choice(_REWARD_NAMES.split())}"
    if rng.random() < 0.4:
        value = rng.choice(["fuzz_broken.reward", "fuzz_exits.reward", "good", "", 3, [], "fuzz_rewardz.good", ".good"])
    value = value if rng.random() < 0.3 else [value] if not isinstance(value, list) else value
    if rng.random() < 0.2:
        weights: Any = rng.choice([[float("nan")], [float("inf")], [0], [1, 2], [], 1, "one", [True], ["x"]])
        return f"reward_weights: {weights!r}", {**fields, "reward_weights": weights}, weights != ["x"]
    return f"reward_funcs: {value!r}", {**fields, "reward_funcs": value}, True


def _syntax_case(rng: random.Random, fields: dict[str, Any]) -> tuple[str, str, bool]:
    """The recipe's text, not quite YAML or not quite what its writer meant."""
    text = yaml.safe_dump(fields)
    name = rng.choice(sorted(fields))
    changed = {
        "a key twice": f"{text}{name}: {json.dumps(fields[name])}\n",
        "an octal number": f"{text}save_total_limit: 010\n",
        "a base-60 number": f"{text}save_total_limit: 1:30\n",
        "a tab": f"{text}\t{name}: 1\n",
        "an open bracket": f"{text}run_name: [1\n",
        "a list": "- 1\n- 2\n",
        "nothing": "",
        "a word": "recipe",
        "two documents": f"{text}---\n{text}",
        "a Python object": f"{text}run_name: !!python/object/apply:os.getcwd []\n",
        "a date": f"{text}run_name: 2026-01-01\n",
        "no, unquoted": f"{text}eval_strategy: no\n",
        "no colon": f"{text}run_name\n",
        "an unknown alias": f"{text}run_name: *other\n",
        "a null key": f"{text}? \n: 1\n",
        "control characters": f"{text}run_name: \x00\n",
    }
    kind = rng.choice(sorted(changed))
    return kind, changed[kind], True


def _word_case(rng: random.Random, known: dict[str, Any]) -> tuple[str, tuple[str, ...], bool]:
    """Words of the command line."""
    name = rng.choice([n for names, _ in _WRONG_BY_FIELDS for n in names.split() if n in known])
    words = rng.choice(
        [
            ("nan",),
            ("many",),
            (),
            ("-3.5",),
            ("1", "2"),
            ("True",),
        ]
    )
    if rng.random() < 0.3:
        name, words = rng.choice([n for n in _BOOLEANS.split() if n in known]), rng.choice([("maybe",), ("2",)])
    if rng.random() < 0.2:
        name, words = rng.choice([n for n in _ENUMS.split() if n in known and n != "loss_type"]), ("grpoo",)
    extra = ("--use_peft", "true") if name.startswith("lora_") else ()
    return f"--{name} {' '.join(words)}", (*extra, f"--{name}", *words), True


def make_cases(seed: int, count: int, algorithms: tuple[str, ...]) -> Iterator[Case]:
    """Cases of a seed, each of one change to a starter recipe."""
    rng = random.Random(seed)
    recipes = {name: fields for name, fields in base_recipes().items() if name.split("_")[0] in algorithms}
    known = {algorithm: fields_of(algorithm) for algorithm in algorithms}
    for _ in range(count):
        name = rng.choice(sorted(recipes))
        algorithm, fields = name.split("_")[0], dict(recipes[name])
        kinds = {"field": 10, "key": 2, "data": 3, "reward": 2, "syntax": 2, "word": 3, "setting": 3, "legal": 1}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "reward" and algorithm == "dpo":
            kind = "field"
        text, words = None, ()
        if kind == "field":
            what, fields, refuse = _field_case(rng, fields, known[algorithm])
        elif kind == "key":
            what, fields, refuse = _key_case(rng, fields, known[algorithm])
        elif kind == "data":
            what, fields, refuse = _data_case(rng, algorithm, fields)
        elif kind == "reward":
            what, fields, refuse = _reward_case(rng, fields)
        elif kind in ("setting", "legal"):
            options = _SETTINGS if kind == "setting" else _LEGAL
            option, value = rng.choice([(n, v) for n, v in options if n in known[algorithm] and _fits(algorithm, n, v)])
            needed = {"use_peft": True} if option.startswith("lora_") else {}
            what, fields, refuse = f"{option}: {value!r}", {**fields, **needed, option: value}, kind == "setting"
        elif kind == "word":
            what, words, refuse = _word_case(rng, known[algorithm])
        else:
            what, text, refuse = _syntax_case(rng, fields)
        yield Case(
            algorithm,
            f"{name}, {what}",
            yaml.safe_dump(fields) if text is None else text,
            words,
            refuse,
            kind == "legal",
        )


def _fits(algorithm: str, name: str, value: Any) -> bool:
    """Two algorithms call different things loss_type."""
    return name != "loss_type" or (value == "dr_grpo") == (algorithm == "grpo")


def fields_of(algorithm: str) -> dict[str, Any]:
    from trl_klx.run.recipe.algorithms import ALGORITHMS
    from trl_klx.run.recipe.parse import known_fields

    return dict.fromkeys(known_fields(ALGORITHMS[algorithm].config))


# Running one


def attempt(case: Case, folder: Path, *words: str) -> Outcome:
    """What `trl-klx` does with a case, in a forked process that starts with everything imported."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(case.text)
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        os._exit(_child(case, folder, words))
    status: int | None = None
    while time.monotonic() - start < TIMEOUT:
        done, waited = os.waitpid(process, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(waited)
            break
        time.sleep(0.005)
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    printed = (folder / "printed").read_text(errors="replace")
    return Outcome(status, printed, (folder / "loaded").exists(), time.monotonic() - start)


def _child(case: Case, folder: Path, words: tuple[str, ...]) -> int:
    """The status of the command, in this process; everything printed goes to a file."""
    os.chdir(folder)
    handle = os.open("printed", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    from transformers import PreTrainedModel

    from trl_klx.cli import commands as cli

    load = PreTrainedModel.from_pretrained.__func__

    def seen(cls: type, *args: Any, **kwargs: Any) -> Any:
        (folder / "loaded").touch()
        return load(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(seen)
    try:
        status = cli.main([case.algorithm, "--config", "recipe.yaml", *case.words, *words])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


# Judging what happened


def judge(case: Case, run: Outcome, dry: Outcome) -> list[str]:
    """What is wrong with the answers to a case; an empty list where nothing is."""
    faults = []
    for name, outcome in (("run", run), ("dry run", dry)):
        if outcome.status is None:
            faults.append(f"{name}: hangs")
        elif outcome.status not in (0, 1, 2) or ("Traceback (most" in outcome.printed and not _is_own(outcome)):
            faults.append(f"{name}: traceback")
        elif outcome.status and name == "run" and len(sentences(outcome.printed)) != 1:
            faults.append(f"{name}: refused without one sentence")
    if run.status != 0 and dry.status == 0:
        faults.append("the dry run misses it")
    if run.status == 0 and case.must_refuse:
        faults.append("runs and means nothing")
    if (run.status, dry.status) != (0, 0) and case.must_run:
        faults.append("is refused and means something")
    if run.status == 2 and run.loaded:
        faults.append("refused after the model was loaded")
    if str(Path(tempfile.gettempdir(), "tmp")) in dry.printed:
        faults.append("dry run: shows a temporary file")
    return faults


def _is_own(outcome: Outcome) -> bool:
    """Whether what was raised is the user's, and was said in a sentence first."""
    _, sentence, shown = outcome.printed.partition("\nerror: " if "\nerror: " in outcome.printed else "error: ")
    return bool(sentence) and re.search(r'File ".*fuzz_\w+\.py"', shown) is not None


def sentences(printed: str) -> list[str]:
    """The complaints of a run."""
    return re.findall(r"^error: .+$", printed, flags=re.MULTILINE)


def warm_up(folder: Path) -> tuple[str, ...]:
    """Import all that a run imports, so that forked processes need not; returns the algorithms that there are."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import datasets as _  # noqa: F401

    from trl_klx.run import dpo, grpo, ppo  # noqa: F401

    sys.path.insert(0, str(folder))
    prepare(folder)
    algorithms = ("grpo", "ppo", "dpo")
    _look_once(algorithms, folder / "warm")
    return algorithms


def _look_once(algorithms: tuple[str, ...], folder: Path) -> None:
    """One dry run of each algorithm in this process, which imports what is imported when it is needed."""
    from trl_klx.cli import commands as cli

    folder.mkdir()
    recipes = {name.split("_")[0]: fields for name, fields in base_recipes().items()}
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        for algorithm in algorithms:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipes[algorithm]))
            cli.main([algorithm, "--config", "recipe.yaml", "--dry_run"])


def hunt(seed: int, count: int, folder: Path, *, only: str = "") -> Iterator[tuple[Case, Outcome, Outcome, list[str]]]:
    """Every case of a seed with its outcomes and what is wrong with them."""
    algorithms = warm_up(folder)
    for case in make_cases(seed, count, algorithms):
        if only not in case.name:
            continue
        dry = attempt(case, folder / "case", "--dry_run")
        run = attempt(case, folder / "case")
        yield case, run, dry, judge(case, run, dry)


def main() -> int:
    parser = argparse.ArgumentParser(description="Hunt for recipes that are neither run nor refused properly.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--tail", type=int, default=3, help="lines to print of what a faulty case printed")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        for case, run, dry, faults in hunt(options.seed, options.cases, Path(name), only=options.only):
            counts["cases"] += 1
            counts[{0: "ran", 1: "failed", 2: "refused", None: "hung"}.get(run.status, "traceback")] += 1
            for fault in faults:
                counts[f"  {fault}"] += 1
            if faults:
                print(f"{case.name} {' '.join(case.words)}: {'; '.join(faults)} (run {run.status}, dry {dry.status})")
                for outcome in (run, dry) if any(f.startswith("dry run:") for f in faults) else (run,):
                    for line in outcome.printed.strip().splitlines()[-options.tail :]:
                        print(f"    {line[:220]}")
                sys.stdout.flush()
    counts["seconds"] = round(time.monotonic() - start)
    print("\n".join(f"{count:5} {name}" for name, count in counts.items()))
    return 1 if any(name.startswith("  ") for name in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
