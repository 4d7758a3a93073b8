"""Situations at the start of a run: how the command line is read, what is not installed, where a run may write."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fault_tools import make
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_klx import cli
from trl_klx.analysis.api import measure_kl
from trl_klx.analysis.command import main as measure_main
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.arguments import BadInput
from trl_klx.run.dry_run.command import make_plan
from trl_klx.trainers.trl_compat import TRL_VERSION

ALGORITHMS = {"grpo": grpo, "dpo": dpo} | ({"ppo": ppo} if Version("1.13") > TRL_VERSION else {})


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


# The command line is read as the parser reads it


@pytest.fixture
def what_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a training command does, instead of doing it."""
    ran: list[str] = []

    def run(*args: object) -> None:
        ran.append("run")
        raise BadInput("a run")

    monkeypatch.setattr(train, "dry_run", lambda *args: ran.append("dry run") or 0)
    monkeypatch.setattr(train, "parse_recipe", run)
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


@pytest.mark.situation("writes accelerate_config into the recipe", "refused")
def test_accelerate_config_in_a_recipe(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = recipe(tmp_path, fields(inputs, accelerate_config="cpu"))
    assert grpo.main(argv) == 2
    sentence = capsys.readouterr().err.removeprefix("error: ").strip()
    assert "give it there" in sentence
    plan = make_plan("grpo", argv)
    assert sentence in plan.problems
    assert plan.layout.source.endswith("recipes/accelerate/cpu.yaml")


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


@pytest.mark.situation("kills a run that --accelerate_config started", "right")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["it runs", "it loads its packages"])
def test_what_was_started_ends_too(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    """The signal goes to the process that the user started; all that it started must be gone."""
    launcher = [sys.executable, "-c", LAUNCHER, TRAINER, str(tmp_path), moment]
    started = subprocess.Popen([sys.executable, "-c", f"from trl_klx.launching import become; become({launcher!r})"])
    until((tmp_path / "ready").exists)
    trainer = int((tmp_path / "ready").read_text())
    assert is_running(trainer)
    started.send_signal(number)
    started.wait(10)
    (tmp_path / "go").touch()
    until(lambda: not is_running(trainer), seconds=10)


HOLDER = """
import sys, time
from trl_klx.trainers.run_lock import run_folder
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
    from trl_klx.trainers import run_lock

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
    from trl_klx.trainers.run_lock import run_folder

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


@pytest.mark.situation("goes on with a measurement that was downloaded", "right")
def test_a_downloaded_measurement_runs_no_code(measured: tuple[Path, list[str]]) -> None:
    folder, argv = measured
    for hidden in (folder / "out" / "hidden").iterdir():
        torch.save(Evil(folder / "ran"), hidden / "head.pt")
    shutil.rmtree(folder / "out" / "pairwise")
    assert measure_main(argv) == 0
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
        r"\b(torch\.load|pickle\.|eval\(|exec\(|yaml\.(unsafe|full|Unsafe|Full|Loader)|trust_remote_code=True)"
    )
    root = Path(__file__).parent.parent
    for path in [*(root / "trl_klx").rglob("*.py"), *(root / "scripts").glob("*.py")]:
        for line in path.read_text().splitlines():
            assert not forbidden.search(line.replace(".eval()", "")), (path, line)
