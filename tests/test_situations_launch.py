"""Situations at the start of a run: how the command line is read, what is not installed, where a run may write."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from support.fault_tools import make
from support.tiny import save_tiny, tiny_family, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_klx
from trl_klx.cli import commands as cli
from trl_klx.hub.settings import write_settings
from trl_klx.measure.api import measure_kl
from trl_klx.measure.measure_command import main as measure_main
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.sources.weights import weight_problems
from trl_klx.trainers import seams
from trl_klx.trainers.checks import packages
from trl_klx.trainers.seams import LIGER_COMPUTES_THE_LOSS as NO_LIGER

ALGORITHMS = {"grpo": grpo, "dpo": dpo, "ppo": ppo}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    rows = {"data": {"prompt": "1+1=", "answer": "2"}, "pairs": {"prompt": "1+1=", "chosen": "2", "rejected": "3"}}
    for name, row in rows.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 24)
    return folder


def fields(inputs: Path, algorithm: str = "grpo", **changes: object) -> dict[str, object]:
    return {
        "model_name_or_path": str(inputs / "model"),
        "dataset_name": str(inputs / ("pairs" if algorithm == "dpo" else "data")),
        "output_dir": str(inputs / "never_written"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        **({} if algorithm == "dpo" else {"reward_funcs": ["trl_klx.rewards.exact_match"]}),
        **changes,
    }


def recipe(folder: Path, content: dict[str, object] | str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(path)]


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that was refused."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


# The command line is read as the parser reads it


@pytest.fixture
def what_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a training command does, instead of doing it."""
    ran: list[str] = []

    def run(*args: object) -> None:
        ran.append("run")
        raise BadInput("a run")

    monkeypatch.setattr(train, "dry_run", lambda *args: ran.append("dry run") or 0)
    monkeypatch.setattr(train, "parse", run)
    return ran


@pytest.mark.situation("asks for a dry run in any words that mean true", "right")
@pytest.mark.parametrize(
    ("words", "in_recipe"),
    [
        *(
            ([*words.split()], "")
            for words in ("--dry_run t", "--dry_run y", "--dry_run Yes", "--dry-run", "--dry_run=T")
        ),
        *(([], text) for text in ('dry_run: "true"', "dry_run: on", "dry_run: 1", 'dry_run: "Y"')),
        (["--dry_run", "1"], "dry_run: false"),
        (["--dry_run", "false", "--dry_run", "true"], ""),
    ],
)
def test_a_dry_run_is_one(tmp_path: Path, words: list[str], in_recipe: str, what_runs: list[str]) -> None:
    assert grpo.main([*recipe(tmp_path, f"beta: 0.1\n{in_recipe}\n"), *words]) == 0
    assert what_runs == ["dry run"]


@pytest.mark.situation("says false of a dry run, in any words that mean false", "right")
@pytest.mark.parametrize(
    ("words", "in_recipe"),
    [(["--dry_run=F"], ""), (["--dry-run", "no"], "dry_run: true"), ([], "dry_run: 0")],
)
def test_a_run_is_one(tmp_path: Path, words: list[str], in_recipe: str, what_runs: list[str]) -> None:
    assert grpo.main([*recipe(tmp_path, f"beta: 0.1\n{in_recipe}\n"), *words]) == 2
    assert what_runs == ["run"]


@pytest.mark.situation("gives dry_run what is neither true nor false", "refused")
@pytest.mark.parametrize(
    ("words", "in_recipe", "value"),
    [
        (["--dry_run", "on"], "", "'on'"),
        (["--dry-run=maybe"], "", "'maybe'"),
        ([], "dry_run: 2", "2"),
        ([], 'dry_run: "on"', "'on'"),
        ([], "dry_run:", "None"),
        ([], "dry_run: [true]", "[True]"),
    ],
)
def test_what_is_no_boolean(
    tmp_path: Path,
    words: list[str],
    in_recipe: str,
    value: str,
    what_runs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert grpo.main([*recipe(tmp_path, f"beta: 0.1\n{in_recipe}\n"), *words]) == 2
    assert what_runs == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: dry_run={value} ")
    assert line.endswith(" must be true or false.")


@pytest.mark.situation("writes --accelerate_config=cpu with an equals sign, or with a hyphen", "right")
@pytest.mark.parametrize("word", [["--accelerate_config=cpu"], ["--accelerate-config", "cpu"]])
def test_every_spelling_of_accelerate_config(tmp_path: Path, word: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(cli, "become", lambda command: started.append(command) or 0)
    assert cli.main(["grpo", *recipe(tmp_path, "beta: 0.1"), *word, "--max_steps", "3"]) == 0
    (command,) = started
    assert command[command.index("--config_file") + 1].endswith("recipes/accelerate/cpu.yaml")
    assert command[command.index("-m", 3) :] == [
        "-m",
        "trl_klx.run.grpo",
        *recipe(tmp_path, "beta: 0.1"),
        "--max_steps",
        "3",
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [(["--accelerate_config", "cpu"], "beta: 0.1"), ([], "{accelerate_config: single_gpu, num_processes: 2}")],
)
def test_a_launcher_imports_nothing_heavy(tmp_path: Path, words: list[str], text: str) -> None:
    """It reads the words and the recipe by what the processes that it starts read them by, and no second more."""
    code = (
        "import sys; from trl_klx.cli import commands; commands.become = lambda command: 0\n"
        f"commands.main(['grpo', *{words}, *{recipe(tmp_path, text)}])\n"
        "sys.exit(bool({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.situation("plans a run of several processes, with dry_run in the recipe", "right")
@pytest.mark.parametrize("word", [["--accelerate_config=zero3"], ["--accelerate_config", "zero3"]])
def test_a_dry_run_in_the_recipe_starts_no_process(
    tmp_path: Path, inputs: Path, word: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "become", lambda command: 99)
    rows = fields(inputs, dry_run="t", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert cli.main(["grpo", *recipe(tmp_path, rows), *word]) == 0
    assert "dry run of GRPO on DeepSpeed ZeRO-3, 8 processes" in capsys.readouterr().out


@pytest.mark.situation("starts processes and says --dry_run false", "right")
def test_dry_run_false_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "become", lambda command: 99)
    assert cli.main(["grpo", *recipe(tmp_path, "beta: 0.1"), "--accelerate_config", "cpu", "--dry_run", "false"]) == 99


@pytest.mark.situation(
    "writes accelerate_config or num_processes into the recipe, as TRL's commands take them", "right"
)
@pytest.mark.parametrize(
    ("in_recipe", "words", "options"),
    [
        ("accelerate_config: cpu", [], ["--config_file", "recipes/accelerate/cpu.yaml"]),
        ("accelerate_config: cpu", ["--accelerate_config=zero3"], ["--config_file", "recipes/accelerate/zero3.yaml"]),
        ("accelerate_config: single_gpu", [], ["--config_file", "trl/accelerate_configs/single_gpu.yaml"]),
        ("num_processes: 4", [], ["--num_processes", "4"]),
        ("num_processes: 4", ["--num-processes", "2"], ["--num_processes", "2"]),
        ("num_processes: 1", ["--num_processes", "2"], ["--num_processes", "2"]),
        (
            "{accelerate_config: zero2, num_processes: 2}",
            [],
            ["--config_file", "recipes/accelerate/zero2.yaml", "--num_processes", "2"],
        ),
    ],
)
def test_what_the_recipe_says_is_launched(
    tmp_path: Path, in_recipe: str, words: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(cli, "become", lambda command: started.append(command) or 0)
    argv = recipe(tmp_path, in_recipe)
    assert cli.main(["grpo", *argv, *words]) == 0
    launch = started[0][started[0].index("--quiet") + 1 :]
    given, of_run = launch[: len(options)], launch[len(options) :]
    assert given[::2] == options[::2]
    assert all(value.endswith(wanted) for value, wanted in zip(given[1::2], options[1::2], strict=True))
    kept = [] if "--accelerate_config=zero3" in words else words
    assert of_run == ["-m", "trl_klx.run.grpo", *argv, *kept]


@pytest.mark.situation("asks for one process in the recipe", "right")
@pytest.mark.parametrize("text", ["num_processes: 1", "accelerate_config:", "{num_processes: 8, dry_run: true}"])
def test_no_process_is_started_for_one(tmp_path: Path, text: str, what_runs: list[str]) -> None:
    cli.main(["grpo", *recipe(tmp_path, text)])
    assert what_runs == ["dry run" if "dry_run" in text else "run"]


@pytest.mark.situation("asks for processes that cannot be counted, or by a file that is not there", "refused")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("num_processes: 0", "num_processes=0 must be a whole number, at least 1."),
        ("num_processes: many", "num_processes='many' must be a whole number, at least 1."),
        ("accelerate_config: zero9", "zero9 is neither a file nor one of cpu, fsdp2"),
    ],
)
def test_processes_that_cannot_be_started(
    tmp_path: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["grpo", *recipe(tmp_path, text)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.situation("starts the script of a recipe that asks for other processes", "refused")
def test_a_script_does_not_start_processes(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = recipe(tmp_path, fields(inputs, accelerate_config="cpu"))
    assert grpo.main(argv) == 2
    assert "give it there" in capsys.readouterr().err
    assert make_plan("grpo", argv).layout.source.endswith("recipes/accelerate/cpu.yaml")
    argv = recipe(tmp_path, fields(inputs, num_processes=2))
    assert grpo.main(argv) == 2
    assert "num_processes=2, and there would be 1: start them by" in capsys.readouterr().err


@pytest.mark.situation("plans for the processes that the recipe asks for", "right")
def test_a_dry_run_plans_for_the_processes_of_the_recipe(tmp_path: Path, inputs: Path) -> None:
    rows = fields(inputs, num_processes=2, per_device_train_batch_size=8)
    plan = make_plan("grpo", recipe(tmp_path, rows))
    assert (plan.layout.processes, plan.layout.source) == (2, "num_processes=2")
    assert not any("num_processes" in problem for problem in plan.problems)
    of_file = make_plan("grpo", [*recipe(tmp_path, rows), "--accelerate_config", "zero3"])
    assert of_file.layout.processes == 2
    on_cpu = make_plan("grpo", [*recipe(tmp_path, rows), "--accelerate_config", "cpu"])
    assert any("num_processes=2, and there would be 1" in problem for problem in on_cpu.problems)


@pytest.mark.situation("says --use_cpu False in a dry run", "right")
@pytest.mark.parametrize("words", [["--use_cpu", "False"], ["--use-cpu=no"], ["--use_cpu", "0"]])
def test_use_cpu_false_counts_as_false(tmp_path: Path, inputs: Path, words: list[str]) -> None:
    """Eight processes then want eight GPUs, which are not here."""
    argv = recipe(tmp_path, fields(inputs, per_device_train_batch_size=8))
    layout = ["--accelerate_config", "zero3"]
    wants = "wants 8 processes, one per GPU"
    assert not any(wants in problem for problem in make_plan("grpo", [*argv, *layout]).problems)
    assert any(wants in problem for problem in make_plan("grpo", [*argv, *layout, *words]).problems)


@pytest.mark.situation("shortens an option, as in --max_st 5", "refused")
def test_a_shortened_option(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*recipe(tmp_path, fields(inputs)), "--max_st", "5"]
    assert grpo.main(argv) == 2
    assert "the field 'max_st' does not exist: did you mean 'max_steps'?" in capsys.readouterr().err
    assert any("did you mean 'max_steps'" in problem for problem in make_plan("grpo", argv).problems)


@pytest.mark.situation("gives an option with hyphens, or as --no_field, beside a mistake in another", "right")
def test_spellings_in_a_dry_run_with_a_mistake(tmp_path: Path, inputs: Path) -> None:
    argv = [*recipe(tmp_path, fields(inputs, beta=0.1)), "--max-steps", "7", "--no_kl_health", "--kl-estimator", "k9"]
    plan = make_plan("grpo", argv)
    assert [problem.split(" ")[0] for problem in plan.problems] == ["kl_estimator='k9'"]
    assert plan.recipe is not None
    assert plan.recipe.args.max_steps == 7


@pytest.mark.situation("leaves a word before the first option", "refused")
def test_a_word_that_belongs_nowhere(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *recipe(tmp_path, fields(inputs))]
    assert grpo.main(argv) == 2
    assert "'train' on the command line belongs to no field" in capsys.readouterr().err
    assert any(
        "'train' on the command line belongs to no field" in problem for problem in make_plan("grpo", argv).problems
    )


# A run that is killed ends whole, and a folder belongs to one run

# As accelerate's, the launcher leaves its process behind when it is killed.
TRAINER = """
import os, sys, time
from pathlib import Path
from trl_klx.launching import end_with_launcher
folder, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "it runs":
    end_with_launcher()
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "ready")
while moment != "it runs" and not (folder / "go").exists():
    time.sleep(0.01)
end_with_launcher()
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


def until(done: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def hears_signals() -> None:
    """A process started in the background may have been told to ignore some, and its children inherit that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.situation("kills a run that --accelerate_config started", "right")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["it runs", "it loads its packages"])
def test_what_was_started_ends_too(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    """The signal goes to the process that the user started; all that it started must be gone."""
    launcher = [sys.executable, "-c", LAUNCHER, TRAINER, str(tmp_path), moment]
    command = [sys.executable, "-c", f"from trl_klx.launching import become; become({launcher!r})"]
    started = subprocess.Popen(command, preexec_fn=hears_signals)
    until((tmp_path / "ready").exists)
    trainer = int((tmp_path / "ready").read_text())
    assert is_running(trainer)
    started.send_signal(number)
    started.wait(10)
    (tmp_path / "go").touch()
    until(lambda: not is_running(trainer), seconds=10)


HOLDER = """
import sys, time
from trl_klx.trainers.checkpoints.run_lock import run_folder
with run_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def busy(tmp_path: Path):
    """A folder in which another process runs, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.wait()


@pytest.mark.situation("starts a second run in a folder where one runs", "refused")
def test_a_folder_belongs_to_one_run(
    tmp_path: Path, inputs: Path, busy: tuple[Path, subprocess.Popen], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, in a dry run and in Python; and the kernel takes the lock back when its holder is killed."""
    folder, process = busy
    wanted = f"is in use by process {process.pid} on {os.uname().nodename}, since "
    argv = recipe(tmp_path, fields(inputs, output_dir=str(folder)))
    assert grpo.main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert wanted in line
    assert any(wanted in problem for problem in make_plan("grpo", argv).problems)
    for algorithm in ALGORITHMS:
        with pytest.raises(ValueError, match=wanted):
            make(algorithm, folder, max_steps=1).train()
    process.kill()
    process.wait()
    assert (folder / "run.lock").exists()
    make("grpo", folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not (folder / "run.lock").exists()
    assert make("grpo", folder, max_steps=2).train(resume_from_checkpoint="last").global_step == 2


@pytest.mark.situation("runs on a file system without locks", "right")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file alone says who holds the folder: a living process of this machine does, no other."""
    from trl_klx.trainers.checkpoints import run_lock

    def no_locks(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    host = os.uname().nodename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for holder, refused in ((f"{os.getppid()} {host} now", True), (f"{dead.pid} {host} now", False), ("", False)):
        (tmp_path / "run.lock").write_text(holder)
        if refused:
            with pytest.raises(ValueError, match=f"in use by process {os.getppid()} .*delete .*run.lock"):
                make("grpo", tmp_path, max_steps=1).train()
        else:
            make("grpo", tmp_path, max_steps=1).train()


def test_a_run_holds_its_folder_once(tmp_path: Path) -> None:
    from trl_klx.trainers.checkpoints.run_lock import run_folder

    with run_folder(tmp_path / "run"), run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").read_text().startswith(f"{os.getpid()} ")
    assert not (tmp_path / "run" / "run.lock").exists()


# What a downloaded folder may do


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished measurement of two adapters, of which one is on the output head."""
    folder = tmp_path_factory.mktemp("measured")
    save_tiny(folder / "reference")
    for name, targets in (("on_head", ["q_proj", "lm_head"]), ("plain", ["v_proj"])):
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "reference"), lora)
        adapted.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1+1=", "response": text}) + "\n" for text in ("23", "1", "ab=")))
    argv = ["--reference", str(folder / "reference"), "--policies", str(folder / "on_head"), str(folder / "plain")]
    argv += ["--data", str(data), "--output_dir", str(folder / "out"), "--report", "false"]
    assert measure_main(argv) == 0
    return folder, argv


@pytest.mark.situation("continues a measurement that was downloaded", "right")
def test_a_downloaded_measurement_runs_no_code(measured: tuple[Path, list[str]]) -> None:
    folder, argv = measured
    for hidden in (folder / "out" / "hidden").iterdir():
        torch.save(Evil(folder / "ran"), hidden / "head.pt")
    shutil.rmtree(folder / "out" / "pairwise")
    logging.getLogger("transformers").setLevel(logging.WARNING)
    assert measure_main(argv) == 0
    # by its level, a later training in this process has a progress bar or none
    assert logging.getLogger("transformers").level == logging.WARNING
    assert not (folder / "ran").exists()
    assert (folder / "out" / "pairwise").exists()


@pytest.mark.situation("compares policies of which one has an adapter on its head", "right")
def test_heads_of_any_kind_are_compared(measured: tuple[Path, list[str]]) -> None:
    folder, _ = measured
    pairs = pd.read_parquet(folder / "out" / "tables" / "pairwise.parquet").set_index(["policy", "other"])["kl"]
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    one = measure_kl(rows, str(folder / "plain"), str(folder / "on_head")).to_pandas()
    assert pairs["on_head", "plain"] == pytest.approx(np.concatenate(one["kl_policy_ref"].to_list()).mean(), rel=1e-4)
    assert pairs["on_head", "plain"] > 1e-3


def test_nothing_is_unpickled_and_no_code_of_a_model_is_run() -> None:
    """Neither the package nor its scripts unpickle anything, evaluate text, or trust a model's own code."""
    forbidden = re.compile(
        r"\b(torch\.load(?!.*weights_only=True)|pickle\.|eval\(|exec\(|yaml\.(unsafe|full|Unsafe|Full|Loader)|trust_remote_code=True)"
    )
    root = Path(__file__).parent.parent
    for path in [*(root / "trl_klx").rglob("*.py"), *(root / "scripts").glob("*.py")]:
        for line in path.read_text().splitlines():
            assert not forbidden.search(line.replace(".eval()", "")), (path, line)


# What is not installed

ASKED = [
    ({"report_to": ["wandb"]}, "report_to names wandb and wandb is not installed: pip install wandb"),
    ({"report_to": "comet_ml"}, "report_to names comet_ml and comet_ml is not installed: pip install comet-ml"),
    ({"optim": "paged_adamw_8bit"}, "optim='paged_adamw_8bit' and bitsandbytes is not installed: pip install bits"),
    ({"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit' and bitsandbytes is not installed"),
    ({"optim": "lion_32bit"}, "optim='lion_32bit' and bitsandbytes is not installed"),
    ({"optim": "galore_adamw_8bit"}, "optim='galore_adamw_8bit' and galore_torch is not installed"),
    ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' and schedulefree is not installed"),
    ({"optim": "adamw_torch_8bit"}, "optim='adamw_torch_8bit' and torchao is not installed: pip install torchao"),
    ({"load_in_4bit": True}, "load_in_4bit=True and bitsandbytes is not installed"),
    ({"load_in_8bit": True}, "load_in_8bit=True and bitsandbytes is not installed"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' and flash_attn is not"),
    ({"attn_implementation": "kernels-community/flash-attn"}, "and kernels is not installed: pip install kernels"),
    ({"model_init_kwargs": {"attn_implementation": "flash_attention_3"}}, "'flash_attention_3' and flash_attn is not"),
]
OF_GRPO = [
    ({"use_vllm": True}, "use_vllm=True and vLLM is not installed: pip install 'trl_klx[vllm]'"),
    ({"use_liger_kernel": True, "loss_type": "dapo"}, "use_liger_kernel=True and liger_kernel is not installed"),
]
ABSENT = ("wandb", "comet_ml", "bitsandbytes", "galore_torch", "schedulefree", "torchao", "flash_attn", "kernels")
ABSENT += ("vllm", "liger_kernel")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with none of the packages that are not required, whatever this one has."""
    there = partial(ModuleSpec, loader=None, origin="here")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ABSENT else there(name))


@pytest.mark.situation("asks for a package that is not installed", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("change", "sentence"), ASKED + OF_GRPO, ids=lambda value: str(value)[:40])
def test_a_package_that_is_not_there(
    tmp_path: Path,
    inputs: Path,
    algorithm: str,
    change: dict[str, object],
    sentence: str,
    bare: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded; in the dry run in the same words."""
    if (change, sentence) in OF_GRPO and (algorithm != "grpo" or (change.get("use_liger_kernel") and NO_LIGER)):
        return  # other rules have more to say of these
    monkeypatch.setattr(train, "_train_to_the_end", None)
    argv = recipe(tmp_path, fields(inputs, algorithm, **change))
    assert ALGORITHMS[algorithm].main(argv) == 2
    found = refusal(capsys)
    assert sentence in found
    assert any(found in problem for problem in make_plan(algorithm, argv).problems)


@pytest.mark.situation("asks in Python for a package that is not installed", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("change", [{"report_to": ["wandb"]}, {"optim": "paged_adamw_8bit"}], ids=str)
def test_a_package_that_is_not_there_in_python(
    tmp_path: Path, algorithm: str, change: dict[str, object], bare: None
) -> None:
    with pytest.raises(ValueError, match="is not installed: pip install"):
        make(algorithm, tmp_path, **change)


@pytest.mark.situation("starts from a model that is stored quantised, without the package for it", "refused")
def test_a_quantised_model(tmp_path: Path, inputs: Path, bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    argv = recipe(tmp_path, fields(inputs, model_name_or_path=str(tmp_path / "model")))
    assert grpo.main(argv) == 2
    sentence = refusal(capsys)
    assert "is quantised, quant_method='bitsandbytes' and bitsandbytes is not installed: pip install" in sentence
    assert sentence in make_plan("grpo", argv).problems


@pytest.mark.situation("has the package on the path without having installed it", "right")
def test_packages_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_record(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", no_record)
    for module in ("settings", "versions"):
        monkeypatch.setattr(f"trl_klx.hub.{module}.version", no_record, raising=False)
    write_settings(tmp_path, {})
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["trl_klx"] == trl_klx.__version__
    assert versions["torch"] == torch.__version__
    monkeypatch.setattr("trl_klx.trainers.seams.version_of", lambda name: "unknown")
    assert (seams._trl_version() < Version("1.13")) == seams.TRL_HAS_PPO


# Where a run may write, and what it starts from


def refused_alike(algorithm: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; the dry run must say the same."""
    assert ALGORITHMS[algorithm].main(argv) == 2
    sentence = refusal(capsys)
    assert any(sentence in problem for problem in make_plan(algorithm, argv).problems)
    return sentence


@pytest.mark.situation("gives an output_dir that cannot be one", "refused")
@pytest.mark.parametrize("output_dir", ["FILE", "FILE/run", "/proc/run", "/sys/run", "", 5, ["a"], "BROKEN/run"])
def test_an_output_dir_that_cannot_be_one(
    tmp_path: Path, inputs: Path, output_dir: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    names = {"FILE": str(tmp_path / "file"), "BROKEN": str(tmp_path / "broken")}
    if isinstance(output_dir, str):
        for name, path in names.items():
            output_dir = output_dir.replace(name, path)
    sentence = refused_alike("grpo", recipe(tmp_path, fields(inputs, output_dir=output_dir)), capsys)
    assert sentence.startswith(f"output_dir={output_dir!r} ")


@pytest.mark.situation("gives in Python an output_dir that cannot be one", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("output_dir", ["", "/proc/run"])
def test_an_output_dir_in_python(algorithm: str, output_dir: str) -> None:
    with pytest.raises(ValueError, match="output_dir="):
        make(algorithm, output_dir)


@pytest.mark.situation("trains into the folder of the model that it starts from", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../model", "LINK"])
def test_the_model_is_not_overwritten(
    tmp_path: Path, algorithm: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(save_tiny(tmp_path / "model"))
    (tmp_path / "link").symlink_to(folder)
    output_dir = str(tmp_path / "link") if spelling == "LINK" else spelling.format(folder)
    before = (folder / "model.safetensors").read_bytes()
    inputs = tmp_path
    (inputs / "data").mkdir()
    rows = '{"prompt": "1+1=", "chosen": "2", "rejected": "3", "answer": "2"}\n' * 24
    (inputs / "data" / "train.jsonl").write_text(rows)
    given = fields(inputs, algorithm, dataset_name=str(inputs / "data"), output_dir=output_dir)
    sentence = refused_alike(algorithm, recipe(tmp_path, given), capsys)
    assert sentence.startswith(f"output_dir={output_dir!r} is the folder of model_name_or_path: ")
    for model in (str(folder), AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match="is the folder of model: the trained model would overwrite it"):
            make(algorithm, output_dir, model=model)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.situation("starts a new run from a checkpoint of the folder that it writes to", "refused")
def test_a_checkpoint_of_the_folder(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(inputs / "model", tmp_path / "run" / "checkpoint-5")
    path = str(tmp_path / "run" / "checkpoint-5")
    argv = recipe(tmp_path, fields(inputs, model_name_or_path=path, output_dir=str(tmp_path / "run")))
    assert "is a checkpoint of output_dir=" in refused_alike("grpo", argv, capsys)


@pytest.mark.situation("starts from a model folder without a tokenizer", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_tokenizer(tmp_path: Path, inputs: Path, algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bare"
    tiny_model().save_pretrained(folder)
    argv = recipe(tmp_path, fields(inputs, algorithm, model_name_or_path=str(folder)))
    sentence = refused_alike(algorithm, argv, capsys)
    assert sentence.startswith(f"the tokenizer of model_name_or_path={str(folder)!r} cannot be loaded here (none of")
    without_words = AutoTokenizer.from_pretrained(folder)
    for model in (str(folder), AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded here .* pass processing_class"):
            make(algorithm, tmp_path / "run", model=model, processing_class=None)
    with pytest.raises(ValueError, match="that knows no words: pass the policy's tokenizer"):
        make(algorithm, tmp_path / "run", processing_class=without_words)


def spoilt(folder: Path, how: str) -> None:
    """Spoil the weights of a model that lies in two files."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="15KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    first, *others = sorted(folder.glob("model-*.safetensors"))
    if how == "no weights":
        for file in (first, *others, index):
            file.unlink()
    elif how == "a file is missing":
        others[0].unlink()
    elif how == "a file is cut":
        os.truncate(first, first.stat().st_size - 100)
    elif how == "a file is empty":
        first.write_bytes(b"")
    elif how == "a file is a web page":
        first.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    elif how == "the index is cut":
        index.write_text(index.read_text()[:20])
    elif how == "a pickle is cut":
        tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        spoilt(folder, "no weights")
        torch.save(tensors, folder / "pytorch_model.bin")
        os.truncate(folder / "pytorch_model.bin", (folder / "pytorch_model.bin").stat().st_size - 100)
    elif how == "another vocabulary":
        change_config(folder, vocab_size=31)
    elif how == "another width":
        change_config(folder, intermediate_size=48)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILT = {
    "no weights": "holds no model.safetensors: weights are missing",
    "a file is missing": "holds no model-00002-of-0000",
    "a file is cut": "is incomplete (model-00001-of-0000",
    "a file is empty": "is incomplete (model-00001-of-0000",
    "a file is a web page": "is incomplete (model-00001-of-0000",
    "the index is cut": "holds no readable model.safetensors.index.json",
    "a pickle is cut": "is incomplete (pytorch_model.bin is cut)",
    "another vocabulary": "holds weights of another shape than in its config.json (model.embed_tokens.w",
    "another width": "holds weights of another shape than in its config.json (model.layers.0.mlp.",
}


@pytest.mark.situation("starts from weights that are missing, cut or of another shape", "refused")
@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_weights(tmp_path: Path, inputs: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    spoilt(folder, how)
    sentence = refused_alike("grpo", recipe(tmp_path, fields(inputs, model_name_or_path=str(folder))), capsys)
    assert sentence.startswith(f"model_name_or_path={str(folder)!r} {SPOILT[how]}")


@pytest.mark.situation("gives PPO a reward or value model whose weights are not whole", "refused")
@pytest.mark.parametrize("option", ["reward_model_path", "value_model_path"])
def test_spoilt_classifiers(tmp_path: Path, inputs: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other"
    shutil.copytree(inputs / "model", folder)
    spoilt(folder, "a file is cut")
    sentence = refused_alike("ppo", recipe(tmp_path, fields(inputs, "ppo", **{option: str(folder)})), capsys)
    assert sentence.startswith(f"{option}={str(folder)!r} is incomplete (model-00001-of-0000")


@pytest.mark.situation("starts from whole weights, in one file or several, tied or pickled", "right")
@pytest.mark.parametrize("kind", ["one", "several", "tied", "pickled", "gemma2", "cohere"])
def test_whole_weights(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    model = tiny_family(kind) if kind in ("gemma2", "cohere") else tiny_model(tied=kind == "tied")
    model.save_pretrained(folder, max_shard_size="15KB" if kind == "several" else "5GB")
    if kind == "pickled":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert list(weight_problems(str(folder), "model_name_or_path", model.config, model)) == []


@pytest.mark.situation(
    "gives model_init_kwargs that the model does not know, or LoRA on layers that it lacks", "refused"
)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model_init_kwargs": {"speed": 1}}, "model_init_kwargs gives speed=1, which neither from_pretrained nor the"),
        ({"model_init_kwargs": {"dtype": "float33"}}, "in model_init_kwargs, dtype='float33' does not exist"),
        ({"use_peft": True, "lora_target_modules": ["nothing_proj"]}, "fits no layer of the model: name some, or"),
    ],
    ids=["keyword", "dtype", "layers"],
)
def test_what_the_model_does_not_have(
    tmp_path: Path, inputs: Path, given: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused_alike("grpo", recipe(tmp_path, fields(inputs, **given)), capsys)


def test_weights_elsewhere(tmp_path: Path, inputs: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    (folder / "below").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / name, folder / "below" / name)
    (folder / "model.safetensors").unlink()
    changes = {"model_name_or_path": str(folder), "model_init_kwargs": {"subfolder": "below"}}
    assert grpo.main(recipe(tmp_path, fields(inputs, **changes))) == 0
