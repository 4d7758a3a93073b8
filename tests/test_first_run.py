"""docs/first-run.md: its files and its command, as a reader would type them, print and leave what it says."""

import re
from pathlib import Path

import pytest
import yaml
from support.first_run import PAGE, write_first_run

import trl_klx
from trl_klx.cli import commands as cli
from trl_klx.tasks import starter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the page's files, and a starter model that learnt for 20 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(starter, "PAIR_TRAIN_PROMPTS", 64)
    monkeypatch.setattr(starter, "PAIR_TEST_PROMPTS", 32)
    train = starter._train
    monkeypatch.setattr(starter, "_train", lambda *args: train(*args[:3], 20, False))
    assert cli.main(["starter"]) == 0
    write_first_run(tmp_path)
    return tmp_path


def without_numbers(text: str) -> list[str]:
    """The printed lines, with their words only: figures depend on the machine, and lines on the console."""
    words = re.sub(r"[^\w\s:/|()=.,-]|\d[\d.]*", " ", text).split()
    return [word for word in words if len(word) > 1]


@pytest.mark.trl
@pytest.mark.pictures
@pytest.mark.situation("begins with the page on a first run", "right")
def test_the_page_on_a_first_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs literally, but for 10 of its 60 steps; what is printed is in the page, word by word."""
    page = PAGE.read_text()
    assert cli.main(["grpo", "--config", "first.yaml", "--dry_run"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert cli.main(["grpo", "--config", "first.yaml", "--max_steps", "10"]) == 0
    printed = capsys.readouterr().out
    [shown] = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert without_numbers(shown) == without_numbers(printed)
    for name in re.findall(r"`(runs/first/[\w.]+)`", page):
        assert (folder / name).is_file(), name
    assert f"(trl_klx {trl_klx.__version__}, trl" in page


def test_recipe_and_python_are_the_same_run() -> None:
    """Each field of the recipe is in the snippet, with its value."""
    page = PAGE.read_text()
    [recipe] = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    for name, value in yaml.safe_load(recipe).items():
        if name == "reward_funcs":
            assert f"reward_funcs={value.split(':')[1]}" in code
        elif name in ("model_name_or_path", "dataset_name", "output_dir"):
            assert f'"{value}"' in code
        else:
            found = re.search(rf'"?{name}"?[:=] ?([^,)}}]+)', code)
            assert found, name
            assert yaml.safe_load(found[1].replace("1e-4", "1.0e-4")) == value, name
