"""`trl-klx new`: what it writes runs as it is, and is not written over anything."""

import json
from pathlib import Path

import pytest
import yaml
from support.tiny import save_tiny, tiny_tokenizer

from trl_klx.cli import commands as cli
from trl_klx.monitor.history import HISTORY_FILE, read_history
from trl_klx.run import new_command

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base model and one that has a chat template."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_command, "is_torch_cuda_available", lambda: False)
    save_tiny(tmp_path / "base: model")
    save_tiny(tmp_path / "chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path


@pytest.mark.trl
@pytest.mark.situation("begins with a recipe that the package writes", "right")
@pytest.mark.parametrize("model", ["base: model", "chat"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo"])
def test_what_is_written_runs_as_it_is(algorithm: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["--to", "my runs/first"] if model == "chat" else []
    assert cli.main(["new", algorithm, "--model_name_or_path", model, *to]) == 0
    recipe = Path(to[1] if to else "") / f"{algorithm}.yaml"
    assert capsys.readouterr().out.endswith(f"run it: trl-klx {algorithm} --config {recipe}\n")
    short = ["--max_steps", "2"] if algorithm == "ppo" or model == "chat" else []  # the others: every step of them
    assert cli.main([algorithm, "--config", str(recipe), *short]) == 0
    steps = [entry["step"] for entry in read_history(recipe.parent / "run" / HISTORY_FILE) if "loss" in entry]
    assert steps == list(range(1, 3 if short else 11))
    assert (recipe.parent / "run" / "model.safetensors").is_file()
    rows = [json.loads(line) for path in recipe.parent.glob("p*s.jsonl") for line in path.read_text().splitlines()]
    assert [isinstance(row["prompt"], list) for row in rows] == [model == "chat"] * 2


def test_a_dry_run_finds_no_problem_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    for algorithm in ("grpo", "ppo", "dpo"):
        assert cli.main(["new", algorithm, "--model_name_or_path", "chat", "--to", algorithm]) == 0
        assert cli.main([algorithm, "--config", f"{algorithm}/{algorithm}.yaml", "--dry_run"]) == 0
        assert "no problems found" in capsys.readouterr().out


@pytest.mark.parametrize("has_bf16", [True, False])
def test_on_a_gpu_it_is_for_a_gpu(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_command, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(new_command, "is_torch_bf16_gpu_available", lambda: has_bf16)
    recipe = yaml.safe_load(new_command.write("grpo", "chat", Path("run")).read_text())
    assert recipe["bf16"] is has_bf16
    assert "use_cpu" not in recipe


@pytest.mark.situation("has a new run written over files of their own, or for a model that is not there", "refused")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["grpo", "--model_name_or_path", "chat"], "my_reward.py exists: name another folder by --to"),
        (["grpo", "--model_name_or_path", "./none"], "model_name_or_path='./none'"),
        (["grpo"], "the following arguments are required: --model_name_or_path; see `trl-klx new --help`."),
        (["sft", "--model_name_or_path", "chat"], "invalid choice: 'sft'"),
        (["dpo", "--model_name_or_path", "chat", "--to", "my_reward.py/x"], "my_reward.py/x cannot be written to"),
    ],
)
def test_what_cannot_be_written(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_reward.py").write_text("mine")
    assert cli.main(["new", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert Path("my_reward.py").read_text() == "mine"
    assert not list(Path().glob("*.yaml"))
