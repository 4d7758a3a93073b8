"""The notebooks of examples/: they run from top to bottom, say what they show, and hold nothing of the machine that
wrote them.

Their cells run in this process, one after the other in one namespace. A kernel would be twenty more packages, and each
notebook would import torch and TRL again, which takes longer than what it does.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from support.commands import ROOT
from support.notebooks import NOTEBOOKS, cells, run_cells

from trl_klx.tasks import starter

Names = dict[str, Any]
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_notebook_is_one_and_has_no_outputs(notebook: Path) -> None:
    """By the rules of format 4.5, as nbformat checks them. Outputs would be those of one machine and one version."""
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in content["cells"]:
        code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        of_all = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": cell["source"]}
        assert cell["cell_type"] in ("code", "markdown")
        assert cell == of_all | code
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_a_notebook_reads_as_a_tutorial(notebook: Path) -> None:
    """It begins with a title; cells are short, links lead somewhere, and no path is of one machine."""
    text = notebook.read_text()
    assert cells(notebook, "markdown")[0].startswith("# ")
    assert json.loads(text)["cells"][0]["cell_type"] == "markdown"
    assert max(source.count("\n") for source in cells(notebook, "code")) < 35
    assert len(text) < 20_000
    assert not re.search(r"(?<![\w./~])[/~]\w+/|\b[A-Z]:\\", "\n".join(cells(notebook, "code")))
    assert not re.search(r"/(home|root|Users|tmp|work)\b", text)
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(cells(notebook, "markdown")))
    assert links
    for link in links:
        assert (notebook.parent / link.partition("#")[0]).is_file(), link


def test_the_list_of_examples_is_complete() -> None:
    listed = re.findall(r"\]\((\w+\.(?:ipynb|py))\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").iterdir() if path.suffix != ".md")


# --- what they show ---------------------------------------------------------------------------------------------------


def of_grpo(names: Names) -> None:
    assert names["rewards"] == [1.0, 0.5, 0.8, 0.0]
    kl = [entry["kl/sequence"] for entry in names["log"]]
    assert kl[0] < 0.05 < kl[-1] < 0.8  # from nothing to the neighbourhood of the target
    assert len(names["samples"]) >= 4


def of_ppo(names: Names) -> None:
    assert names["ranked"] > 0.6
    before, _, after = names["evaluations"]
    assert before["eval_kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert after["eval_kl/sequence"] > 0.02
    assert after["eval_reward"] > before["eval_reward"]


def of_dpo(names: Names) -> None:
    """What looks like a KL and is none; two that are; and a KL in the loss that lowers the policy's own."""
    assert min(entry["log_ratio/chosen"] for entry in names["log"]) < 0
    assert min(entry["kl/data_exact"] for entry in names["log"]) > 0
    assert [names["log"][0]["kl/exact"], names["log"][0]["kl/exact_se"]] == pytest.approx([0.0, 0.0], abs=1e-9)
    plain, held = (
        [entry["kl/sequence"] for entry in names[run].state.log_history if "kl/sequence" in entry]
        for run in ("plain", "held")
    )
    assert max(held) < max(plain)


def of_measure(names: Names) -> None:
    assert (names["sequence_kl"]["mean"] > 3 * names["sequence_kl"]["sem"]).all()
    assert len(names["sequence_kl"]) == 2
    assert names["table"]["unbiased_sequence_kl_policy_ref"].isna().all()
    right, wrong = (names["by_outcome"][outcome].loc["checkpoint-40", "mean"] for outcome in (True, False))
    assert wrong < min(right, 0)  # wrong answers lose, and more than right ones


def of_comparison(names: Names) -> None:
    free, held = (line.get_ydata() for line in names["figure"].axes[1].lines)
    assert free[-1] > held[-1]
    assert [text.get_text() for text in names["figure"].legends[0].get_texts()] == [
        "no KL (2 runs)",
        "exact, beta 1 (2 runs)",
    ]
    assert Path("runs/comparison.png").is_file()


SHOWN: dict[str, Callable[[Names], None]] = {
    "grpo_own_reward": of_grpo,
    "ppo_reward_model": of_ppo,
    "dpo_and_its_kl": of_dpo,
    "reading_measure": of_measure,
    "comparing_runs": of_comparison,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the starter that the notebooks would make, whose pairs are of fewer problems."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "PAIR_TRAIN_PROMPTS", 1024)
        starter.make_starter(folder / "runs" / "starter", progress=False)
    return folder


@pytest.fixture
def no_window() -> Iterator[None]:
    """Figures of pyplot are drawn nowhere, and its settings restored."""
    with matplotlib.rc_context():
        pyplot.switch_backend("Agg")
        yield
        pyplot.close("all")


@pytest.mark.trl
@pytest.mark.usefixtures("no_window")
@each_notebook
def test_a_notebook_runs(notebook: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    SHOWN[notebook.stem](run_cells(notebook))
