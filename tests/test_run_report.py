"""What every run tells about itself, from Python as from a recipe: a banner, and warnings that a dry run gives too."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from matplotlib import pyplot
from peft import LoraConfig
from support.fault_tools import ALGORITHMS, make
from support.tiny import save_tiny, tiny_dataset, tiny_model
from support.tiny_dpo import preferences
from transformers import ProgressCallback, TrainerCallback

from trl_klx.monitor import plots
from trl_klx.monitor.history import HistoryCallback, read_history
from trl_klx.monitor.overoptimisation import plot
from trl_klx.monitor.progress import KLProgressCallback
from trl_klx.run import grpo
from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.check.layout import read_layout
from trl_klx.trainers.checks.begins import process_warnings, starts_one
from trl_klx.trainers.report import outcome
from trl_klx.trainers.report.answers import ANSWERS_FILE, SampledAnswers

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
SIZE = sum(parameter.numel() for parameter in tiny_model().parameters())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which the longest path is not folded."""
    monkeypatch.setenv("COLUMNS", "300")


def banner(printed: str) -> dict[str, str]:
    """The lines of a banner by label, with what was wrapped put together."""
    start = printed.index("KLX-")
    title, *lines = printed[start:].splitlines()
    found, label = {"title": title}, ""
    for line in lines:
        match = re.match(r"  (\w+) +(\S.*)", line)
        if match:
            label, found[match[1]] = match[1], match[2].strip()
        elif line.startswith("      "):
            found[label] += " " + line.strip()
        else:
            break
    return found


def test_the_banner_of_grpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("grpo", tmp_path / "run", max_steps=1, kl_target=0.5, peft_config=LORA, eval_dataset=tiny_dataset(8))
    trainer.train()
    shown = banner(capsys.readouterr().out)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert 0 < trained < SIZE
    assert shown.pop("title").startswith("KLX-GRPO, 1 step (trl_klx ")
    share = 100 * trained / (SIZE + trained)
    assert shown.pop("model") == (
        f"given in memory: {SIZE + trained:,} parameters, {trained:,} trained ({share:.2g} %)"
    )
    assert shown == {
        "data": "16 rows; held out: 8 rows",
        "machine": "1 process on CPU (1 thread)",
        "precision": "weights in float32",
        "KL": "exact in both; pid moves beta from 0.2 to hold 0.5 nats per token, read from exact. In expectation, the "
        "exact KL in the loss and in the reward has the whole gradient of the sequence KL(policy || reference).",
        "output": str(tmp_path / "run"),
    }


def test_the_banners_of_ppo_and_dpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("ppo", tmp_path, max_steps=1, kl_controller="fixed", kl_target=None)
    trainer.train()
    shown = banner(capsys.readouterr().out)
    value = sum(parameter.numel() for parameter in trainer.model.value_model.parameters())
    assert shown["model"] == f"given in memory: {SIZE:,} parameters, all trained; value model {value:,}"
    assert shown["KL"].startswith("k1 in reward; kl_coef=0.2 is fixed. In expectation, the k1 KL in the reward has the")
    options = {"max_steps": -1, "num_train_epochs": 0.25, "kl_controller": "fixed", "kl_target": None, "kl_coef": 0.0}
    sets = {"easy": preferences(4), "hard": preferences(8)}
    make("dpo", tmp_path / "dpo", eval_dataset=sets, report_to=["tensorboard"], **options).train()
    shown = banner(capsys.readouterr().out)
    assert shown["title"].startswith("KLX-DPO, 0.25 epochs")
    assert shown["data"].endswith("; held out: 4 rows easy, 8 rows hard")
    assert shown["KL"] == "The KL to the reference is measured and logged; no penalty acts on the policy."
    assert shown["output"].endswith("dpo; tensorboard")


@pytest.mark.pictures
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_in_python_leaves_what_a_recipe_leaves(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings from the start; metrics, each once though the user asked for them too; a table and pictures."""
    started: list[set[str]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            started.append({path.name for path in tmp_path.iterdir()})

    callbacks = [HistoryCallback(), Watch()]
    trainer = make(algorithm, tmp_path, max_steps=2, save_strategy="no", callbacks=callbacks, disable_tqdm=False)
    trainer.train()
    assert {"resolved_recipe.yaml", "versions.json"} <= started[0]
    assert yaml.safe_load((tmp_path / "resolved_recipe.yaml").read_text())["kl_target"] == 0.02
    history = read_history(tmp_path / "metrics.jsonl")
    assert history == json.loads(json.dumps(trainer.state.log_history, default=str))
    for name in ("reward_vs_kl.png", "kl_control.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    shown = capsys.readouterr()
    for text in ("KL, nats per sequence", "pid " + trainer.args.kl_coef_name, "health alarm", "picture: "):
        assert text in shown.out
    assert "kl/seq=" in shown.err  # the progress bar's


def texts(prompts: list) -> list[str]:
    return [entry["prompt"] for entry in prompts]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sampled_answers_are_kept_with_their_rewards(algorithm: str, tmp_path: Path) -> None:
    """Of training the latest, of evaluations the first, to the same prompts; a resumed run continues the file."""
    scored: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        scored.extend(zip(prompts, completions, strict=True))
        return [len(text) for text in completions]

    rows = {"eval_dataset": preferences(8) if algorithm == "dpo" else tiny_dataset(8)}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "reward": reward}
    every["per_device_eval_batch_size"] = 4
    make(algorithm, tmp_path, max_steps=3, **rows, **every).train()
    file = tmp_path / "completions" / "samples.jsonl"
    kept = read_history(file)
    phases = list(dict.fromkeys((entry["step"], entry["phase"]) for entry in kept))
    assert phases == [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (3, "eval")]
    for entry in kept:
        if algorithm != "dpo":
            assert (entry["prompt"], entry["answer"]) in scored
            assert entry["rewards"] == {"reward": len(entry["answer"])}
    for step in (1, 2, 3):
        prompts = texts([e for e in kept if (e["step"], e["phase"]) == (step, "train")])
        assert 2 <= len(prompts) == len(set(prompts)) <= 4
    make(algorithm, tmp_path, max_steps=6, **rows, **every).train("last")  # from step 2
    again = read_history(file)
    before = [entry for entry in kept if entry["step"] <= 2]
    assert again[: len(before)] == before
    assert [entry["step"] for entry in again] == sorted(entry["step"] for entry in again)
    evaluated = [texts([e for e in again if (e["step"], e["phase"]) == (step, "eval")]) for step in (2, 4)]
    assert evaluated[0] == evaluated[1] != []
    if algorithm == "ppo":  # TRL shuffles GRPO's, the same way each time
        assert evaluated[0] == rows["eval_dataset"]["prompt"][: len(evaluated[0])]
    make(algorithm, tmp_path, max_steps=1, **rows).train()
    assert {entry["step"] for entry in read_history(file)} == {1}


def test_answers_of_a_long_run_are_kept_a_hundred_times(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path, max_steps=1)
    answers = SampledAnswers(trainer)
    answers.begin()
    trainer.state.max_steps = 1000
    for trainer.state.global_step in range(5, 1001, 5):
        answers.add("train", ["1", "1", "2"], ["a", "b", "c"])
        answers.log("train", {}, None)
    kept = read_history(tmp_path / ANSWERS_FILE)
    assert len({entry["step"] for entry in kept}) == 101
    assert [entry["answer"] for entry in kept[:2]] == ["a", "c"]


def test_kl_report_switches_it_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("grpo", tmp_path, max_steps=1, kl_report=False, save_strategy="no", disable_tqdm=False).train()
    shown = capsys.readouterr()
    assert shown.err.count("'kl/sequence'") + shown.out.count("'kl/sequence'") == 1  # transformers' own dictionary
    assert "KLX-" not in shown.out
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_cannot_be_shown_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its model may not be saved yet."""

    def fail(*args: object, **kwargs: object) -> list[Path]:
        raise OSError("No space left on device")

    monkeypatch.setattr(outcome, "plot_run", fail)
    assert make("grpo", tmp_path, max_steps=1).train().global_step == 1
    assert "the table and the pictures of the run could not be made (No space left on device)" in caplog.text


def test_the_progress_bar_of_a_user_stays(tmp_path: Path) -> None:
    class Mine(ProgressCallback):
        pass

    trainer = make("grpo", tmp_path, callbacks=[Mine()], disable_tqdm=False)
    bars = [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    assert bars == [Mine, KLProgressCallback]


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """Its backend is the user's, in a notebook for example."""
    with matplotlib.rc_context({"backend": "svg"}):
        for module in (plots, plot):
            importlib.reload(module)
        plots.plot_run([{"step": 1, "kl/sequence": 0.1, "kl/k3": 0.1, "reward": 0.5}], tmp_path)
        assert matplotlib.rcParams["backend"] == "svg"
    assert pyplot.get_fignums() == []


# Warnings: the run's and the dry run's


def one_step(model: str, data: Path, folder: Path, **changes: object) -> list[str]:
    fields = {
        **{"model_name_or_path": model, "dataset_name": str(data), "output_dir": str(folder)},
        **{"reward_funcs": ["trl_klx.rewards.exact_match"], "report_to": [], "use_cpu": True, "bf16": False},
        **{"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 2, "max_steps": 1},
        **changes,
    }
    (data.parent / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return ["--config", str(data.parent / "recipe.yaml")]


def test_what_a_dry_run_warns_of_the_run_warns_of_and_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither takes it for a problem; what one takes for a problem, the other refuses."""
    model, data = save_tiny(tmp_path / "model"), tmp_path / "data"
    tiny_dataset().to_json(data / "train.jsonl")
    argv = one_step(model, data, tmp_path / "run", dtype="bfloat16", learning_rate=1e-6)
    problems, half = make_plan("grpo", argv)[-2:]
    assert problems == []
    assert len(half) == 1
    assert "'bfloat16' trains 16-bit weights, in which steps of learning_rate=1e-06 are rounded away" in half[0]
    assert grpo.main(argv) == 0
    assert half[0] in caplog.text
    assert "holds the checkpoints" not in caplog.text
    caplog.clear()
    both = make_plan("grpo", argv).warnings
    assert "holds the checkpoints of another run (the last is checkpoint-1)" in both[0]
    assert grpo.main([*argv, "--dry_run"]) == 0
    assert f"warning 1: {both[0]}" in capsys.readouterr().out
    assert grpo.main(argv) == 0
    assert all(sentence in caplog.text for sentence in both)
    assert grpo.main([*argv, "--learning_rate", "1e-3", "--dtype", "float32", "--output_dir", str(tmp_path / "b")]) == 0
    caplog.clear()
    assert grpo.main([*argv, "--resume_from_checkpoint", "last", "--max_steps", "2", "--learning_rate", "1"]) == 0
    assert "holds the checkpoints" not in caplog.text
    assert "rounded away" not in caplog.text


MULTI_CPU = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: {}\nnum_processes: 2\nnum_machines: 1\nuse_cpu: true\n"
)


@pytest.mark.situation("asks accelerate for two processes of kind MULTI_CPU, and gets one", "warned")
@pytest.mark.parametrize("kind", ["MULTI_CPU", "'NO'"])
def test_accelerate_starts_one_process_where_two_were_asked_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate's launcher would start a script with, of either kind, is what the script goes by."""
    file = tmp_path / "two.yaml"
    file.write_text(MULTI_CPU.format(kind))
    layout = read_layout(str(file))
    assert (layout.processes, layout.not_started, layout.kind) == (1, 1, "NO")
    started: list = []
    monkeypatch.setattr(launch, "simple_launcher", started.append)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", str(file), "script.py"]))
    for name, value in prepare_simple_launcher_cmd_env(*started)[1].items():
        monkeypatch.setenv(name, value)
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    assert list(process_warnings(alone)) == [starts_one("accelerate launch", "several")]  # type: ignore[arg-type]
    file.write_text(file.read_text() + "mpirun_config: {mpirun_hostfile: hosts}\n")
    assert read_layout(str(file)).processes == (2 if kind == "MULTI_CPU" else 1)


def test_a_dry_run_names_the_file_that_starts_one(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(MULTI_CPU.format("MULTI_CPU"))
    tiny_dataset().to_json(tmp_path / "data" / "train.jsonl")
    argv = one_step(save_tiny(tmp_path / "model"), tmp_path / "data", tmp_path / "run", learning_rate=1e-3)
    plan = make_plan("grpo", [*argv, "--accelerate_config", str(tmp_path / "two.yaml")])
    assert plan.warnings == [starts_one(str(tmp_path / "two.yaml"), 2)]
    assert plan.problems == []


@pytest.mark.parametrize(
    ("variables", "processes", "kind", "said"),
    [
        ({}, 1, "NO", None),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"}, 2, "MULTI_GPU", None),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"}, 1, "NO", None),
        ({"WORLD_SIZE": "2"}, 1, "NO", "WORLD_SIZE is 2 and 1 of these processes train together"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, 2, "MULTI_GPU", "FSDP was asked for"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, 2, "FSDP", None),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 1, "NO", "DEEPSPEED was asked for and nothing is sharded"),
    ],
)
def test_processes_and_sharding_that_are_not_there(
    variables: dict, processes: int, kind: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=DistributedType(kind))
    found = list(process_warnings(accelerator))  # type: ignore[arg-type]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
