"""The docs say what the code does: tables as printed, paths that exist, commands that the Makefile has."""

import re
import subprocess
from pathlib import Path

import pytest
from test_oracle import oracle_table

from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXPPOConfig
from trl_klx.analysis.divergence import TokenStatistics
from trl_klx.analysis.options import MeasureOptions
from trl_klx.config import KLArguments
from trl_klx.config_rules import ESTIMATORS
from trl_klx.kl.gradients import SOUND, expected_gradient

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def test_gradient_page_is_what_the_oracle_prints() -> None:
    page = (ROOT / "docs" / "gradients.md").read_text()
    for row in oracle_table():
        pattern = rf"\| {re.escape(row.configuration)} \| {re.escape(row.target)} \| ([^|]*) \| ([^|]*) \|"
        found = re.search(pattern, page)
        assert found, row.configuration
        assert found[2] == ("yes" if row.accepted else "refused")
        if row.target != "biased":
            assert float(found[1]) < 1e-9
            assert row.error < 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("placement", ["loss", "reward", "both"])
def test_readme_table_has_the_verdict_of_the_code(estimator: str, placement: str) -> None:
    """Each cell names the gradient of the defaults; a refused combination is in italics."""
    page = (ROOT / "README.md").read_text()
    header = next(line for line in page.splitlines() if line.startswith("| estimator |"))
    columns = [cell.strip(" `") for cell in header.strip("|").split("|")]
    line = next(line for line in page.splitlines() if line.startswith(f"| `{estimator}` |"))
    cell = line.strip("|").split("|")[columns.index(placement)].strip()
    gradient = expected_gradient(estimator, placement, "return_to_go", placement != "reward")
    assert f"**{gradient.name}**" in cell or cell == f"_refused: {gradient.name}_"
    assert cell.startswith("_refused") == (gradient not in SOUND)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_in_docs_exist(page: Path) -> None:
    text = page.read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    quoted = re.findall(r"`((?:recipes|scripts|tests|docs|trl_klx|\.ci)/[\w./]*)`", text)
    launched = re.findall(r"(?:recipes|scripts)/[\w/]+\.(?:yaml|py)", text)
    for name in linked:
        assert (page.parent / name).exists() or (ROOT / name).exists(), name
    for name in quoted + launched:
        assert (ROOT / name).exists(), name


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_options_in_the_docs_exist() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(kl_\w+|allow_biased_kl)`?[:=`]?", pages))
    fields = {
        *KLXGRPOConfig.__dataclass_fields__,
        *KLXPPOConfig.__dataclass_fields__,
        *KLXDPOConfig.__dataclass_fields__,
    }
    assert named
    columns = set(TokenStatistics._fields)  # of `trl-klx measure`
    assert named <= fields | columns | {"kl_state", "kl_control", "kl_loss", "kl_credit", "kl_groups"}


def test_every_option_has_a_row_in_the_page_on_options() -> None:
    rows = [line for line in (ROOT / "docs" / "options.md").read_text().splitlines() if line.startswith("| `")]
    assert set(KLArguments.__dataclass_fields__) <= set(re.findall(r"`(\w+)`", " ".join(rows)))


def test_options_in_the_page_on_measuring_exist() -> None:
    page = (ROOT / "docs" / "measure.md").read_text()
    named = set(re.findall(r"`--(\w+)", page))
    assert len(named) > 8
    assert named <= {*MeasureOptions.__dataclass_fields__, "data", "accelerate_config"}


def test_tests_named_in_the_ppo_page_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "ppo.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert all(f"def {name}(" in written for name in named)


def test_ci_calls_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
