"""Every command in the docs, the recipes' headers and the scripts' docstrings is run, or its cheaper form in `RULES`.

`tests/support/commands.py` finds them. They run in a folder that looks like a checkout after `trl-klx starter`, with
stand-ins for the models that the docs name.
"""

import argparse
import functools
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from support.commands import PAGES, ROOT, commands, fenced, words
from support.first_run import write_first_run
from support.tiny import Arguments
from trl import ModelConfig
from trl.scripts import vllm_serve

import trl_klx
from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig
from trl_klx.cli import commands as cli
from trl_klx.recipe_files import accelerate_file
from trl_klx.rewards import exact_match
from trl_klx.run.recipe.arguments import RunArguments
from trl_klx.run.recipe.parse import parse
from trl_klx.tasks import starter

CONFIGS: dict[str, type] = {"grpo": KLXGRPOConfig, "ppo": KLXPPOConfig, "dpo": KLXDPOConfig}
DEMO = "recipes/starter/grpo_exact_both_pid.yaml"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `trl-klx starter`, whose starter is trained for 20 steps, not 90."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "recipe.yaml").symlink_to(ROOT / DEMO)
    for name in ("scripts", "recipes", "examples", "tests", "docs", "Makefile", ".ci"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = starter._train
        patch.setattr(starter, "_train", lambda *args: train(*args[:3], 20, False))
        patch.setattr(starter, "PAIR_TRAIN_PROMPTS", 64)
        patch.setattr(starter, "PAIR_TEST_PROMPTS", 32)
        assert cli.main(["starter"]) == 0
    stand_ins = ("runs/sft", "runs/grpo/checkpoint-1", "runs/grpo/checkpoint-2", "runs/stories/model")
    for name in stand_ins:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "runs" / "starter" / "model")
    rows = [
        {"prompt": "21=", "response": text, "correct": text == "12", "model": "dpo"} for text in ("12", "21", "22", "1")
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_first_run(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


def as_it_is(command: str) -> None:
    """In this process: importing torch and TRL again would take most of the time."""
    _, (program, *argv) = words(command)
    with pytest.MonkeyPatch.context() as patch:
        try:
            if program == "trl-klx":
                assert cli.main(argv) == 0
            else:
                patch.setattr(sys, "argv", argv)
                patch.syspath_prepend(str(Path(argv[0]).parent))
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def looked_at(command: str) -> None:
    """A command that trains nothing and whose status is a verdict: 0 or 1."""
    _, (_, *argv) = words(command.replace("…", DEMO))
    assert cli.main(argv) in (0, 1)


class Parsed(Exception):
    """Raised in place of what comes after a script has understood its arguments."""


def parsed(command: str) -> None:
    """As far as its arguments: all of them must be known, and have the type that they should have."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list]:
        known, unknown = original(self, *args, **kwargs)
        if self.add_help:  # `trl-klx` itself has none, and passes on what it does not know
            assert not unknown
            raise Parsed
        return known, unknown

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        with pytest.raises(Parsed):
            as_it_is(command)


def recipe_parsed(command: str) -> None:
    """The recipe and its overrides, with every rule that is checked before models are loaded."""
    _, parts = words(command.replace("…", DEMO))
    algorithm = Path(parts[1]).stem
    argv = parts[2:]
    if "--accelerate_config" in argv:
        position = argv.index("--accelerate_config")
        assert accelerate_file(argv[position + 1])
        del argv[position : position + 2]
    parse(CONFIGS[algorithm], argv, use_cpu=True).whole()  # a recipe for GPUs has to be told


def launch_parsed(command: str) -> None:
    """accelerate's own options, then the script as if it were called without it."""
    _, parts = words(command)
    args = launch_command_parser().parse_args(parts[2:])
    load_config_from_file(args.config_file)
    script = " ".join(["python", args.training_script, *(f"'{part}'" for part in args.training_script_args)])
    (recipe_parsed if "--config" in args.training_script_args else parsed)(script)


def launched(command: str) -> None:
    """The real launch, for two of the recipe's steps."""
    short = "--max_steps 2 --per_device_train_batch_size 16 --eval_strategy no --eval_on_start false --report_to none"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words(command)[1][2:]]  # also off the PATH
    run = subprocess.run([*launch, *short.split()], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert Path("runs/grpo_exact_both_pid/metrics.jsonl").read_text()


def named(command: str) -> None:
    """Only a name, in a sentence: of a command of ours or of accelerate's."""
    program, name = command.split()
    assert name in cli.COMMANDS if program == "trl-klx" else program == "accelerate"


def make_dry_run(command: str) -> None:
    run = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def shell_parsed(command: str) -> None:
    subprocess.run(["bash", "-n", *command.split()[1:]], check=True)


def requirement_known(command: str) -> None:
    """A package that the lock or the Makefile pins, or an extra that pyproject.toml has; a version is the lock's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = " ".join((ROOT / name).read_text().lower() for name in ("requirements.lock", "Makefile")).split()
    for requirement in words(command)[1][2:]:
        own = re.fullmatch(r"(?:trl_klx|\.)\[(\w+)\]", requirement)
        if requirement == ".":
            continue
        assert own[1] in extras if own else any(f"{pin}==".startswith(f"{requirement}==") for pin in locked)


def server_parsed(command: str) -> None:
    """TRL's own arguments of its server; only its name, in a sentence."""
    _, (_, _, *argv) = words(command)
    if argv:
        vllm_serve.make_parser().parse_args_and_config(argv)


def named_tests_exist(command: str) -> None:
    """Its files are there, and pytest or tests/conftest.py knows its options."""
    own = (ROOT / "tests" / "conftest.py").read_text()
    for word in words(command)[1][3:]:
        assert word in ("-x", "--markers") or (ROOT / word).is_file() or word in own, word


def is_there(command: str) -> None:
    """The file is."""
    assert (ROOT / command.split()[1]).is_file()


def not_run(command: str) -> None:
    """Nothing of it can be run here."""


class Rule(NamedTuple):
    """How the commands of a form are run, and why not simply as they are; the first rule that matches counts."""

    form: str  # regular expression for the whole command
    run: Callable[[str], None]
    why: str = ""


RULES = [
    Rule(r"trl-klx (starter|starter --output_dir runs/starter|recipes( \S+)?|(\w+ )?--help)", as_it_is),
    Rule(r"trl-klx (explain .*|grpo .* --dry_run)", looked_at),
    Rule(r"trl-klx measure --reference runs/sft .*", as_it_is),
    Rule(r"python (tests/test_oracle|examples/\w+)\.py", as_it_is),
    Rule(
        rf"accelerate launch .* scripts/grpo\.py --config {re.escape(DEMO)}", launched, "minutes: two of its 600 steps"
    ),
    Rule(
        r"(CUDA_VISIBLE_DEVICES=\S+ )?accelerate launch .* scripts/.*",
        launch_parsed,
        "minutes each; tests/test_recipes.py runs the starter's",
    ),
    Rule(r"(OMP_NUM_THREADS=1 )?(trl-klx |python scripts/)(grpo|ppo|dpo)(\.py)? .*", recipe_parsed, "minutes each"),
    Rule(r"(trl-klx (measure|explain|card|new)|accelerate launch)", named, "is a name in a sentence"),
    Rule(r"trl-klx .*", parsed, "takes minutes or a model to fetch; the command's own tests run it in small"),
    Rule(r"python recipes/[\w.-]+/prepare\.py", parsed, "fetches a model; tests/test_stories.py, tests/test_sums.py"),
    Rule(r"python tests/engine/\w+\.py", is_there, "needs vLLM, and minutes"),
    Rule(r"(OMP_NUM_THREADS=1 )?python scripts/[\w/]+\.py.*", parsed, "minutes to hours; tests/test_benchmarks.py"),
    Rule(r"python -m pytest .*", named_tests_exist, "is what runs this test"),
    Rule(r"make [\w-]+( [A-Z]+=\d+)?", make_dry_run, "these are what CI runs, or make an environment"),
    Rule(r"bash \.ci/run", shell_parsed, "is what runs this test"),
    Rule(r"(CUDA_VISIBLE_DEVICES=\S+ )?trl vllm-serve( .*)?", server_parsed, "needs GPUs"),
    Rule(r"pip install .*", requirement_known, "needs a network"),
    Rule(r"apt install chromium", not_run, "needs a network and root"),
]
COMMANDS = commands()


def rule_of(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.form, command)), None)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_docs_runs(command: str) -> None:
    rule = rule_of(command)
    assert rule, f"{command!r} in {COMMANDS[command]} is new: add a rule that runs it, or a cheaper form of it and why"
    rule.run(command)


def test_every_rule_is_of_use() -> None:
    assert {rule.form for rule in RULES} == {rule.form for rule in map(rule_of, COMMANDS) if rule}


SNIPPETS = [
    pytest.param(block, id=f"{page.name}-{place}")
    for page in PAGES
    for place, block in enumerate(fenced(page, "python"))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_python_snippet_in_the_docs_runs(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what a reader has at that point, and on the CPU, which the configs do not take by default."""
    for config in CONFIGS.values():
        monkeypatch.setattr(trl_klx, config.__name__, functools.partial(config, use_cpu=True, bf16=False))
    data = load_dataset("runs/starter/data")
    names: dict[str, Any] = {
        **{name: exact_match for name in ("reward", "vader_sentiment", "cheerful_story")},
        **{"dataset": data["train"], "train": data["train"], "held_out": data["test"]},
        "KLXGRPOTrainer": KLXGRPOTrainer,
        "KLXGRPOConfig": trl_klx.KLXGRPOConfig,
    }
    if "trainer." in snippet:
        names["trainer"] = _trained()
    exec(snippet, names)


def _trained() -> KLXGRPOTrainer:
    """A trainer with a checkpoint and a step to go."""
    args = KLXGRPOConfig(
        "runs/trained",
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=8,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    data = load_dataset("runs/starter/data", split="train[:32]")
    trainer = KLXGRPOTrainer("runs/starter/model", reward_funcs=exact_match, args=args, train_dataset=data)
    trainer.train()
    trainer.args.max_steps = 2
    return trainer


YAML = [
    pytest.param(block, id=f"{page.name}-{place}") for page in PAGES for place, block in enumerate(fenced(page, "yaml"))
]


@pytest.mark.parametrize("block", YAML)
def test_a_yaml_snippet_in_the_docs_is_a_recipe(block: str) -> None:
    """Its fields exist, and what it says of the KL is accepted."""
    recipe = yaml.safe_load(block)
    known = {name for config in (*CONFIGS.values(), RunArguments, ModelConfig) for name in config.__dataclass_fields__}
    assert set(recipe) <= known
    Arguments(**{name: value for name, value in recipe.items() if name in Arguments.__dataclass_fields__})


def test_the_examples_say_what_they_show(capfd: pytest.CaptureFixture[str]) -> None:
    """The figures of docs/choosing.md, and a PID that holds the KL where the others do not."""
    table = runpy.run_path("examples/estimators_by_enumeration.py")
    printed = capfd.readouterr().out
    page = (ROOT / "docs" / "choosing.md").read_text()
    rows = [re.sub(r"\s\s+", " | ", line) for line in printed.splitlines() if "  " in line.strip()]
    assert len(rows) == 14
    for row in rows:
        cells = row.removeprefix(" | ").split(" | ")
        assert " | ".join(cells[-3:]) in page, row
    # The random-free fixture of tests/test_oracle.py is the middle column.
    squared = 0.13714390777**2
    for name, variance in {"k2 loss": 0.16369915, "exact loss": 0.030974659, "exact both": 0.035038787}.items():
        assert table["variances"][name, 0.5] * squared == pytest.approx(variance, rel=1e-6)
    plant = runpy.run_path("examples/controllers_on_a_plant.py")
    assert plant["within"]["pid"] > 0.8
    assert max(share for name, share in plant["within"].items() if name != "pid") < 0.2
    assert torch.get_default_dtype() == torch.float32  # an example leaves nothing behind
