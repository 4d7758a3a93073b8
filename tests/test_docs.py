"""The docs say what the code does: tables as printed, paths that exist, commands that the Makefile has."""

import builtins
import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import trl
from support.commands import PAGES, ROOT
from test_layout import ALLOWED
from test_oracle import oracle_table
from test_oracle_off_policy import bounds_table, off_policy_table
from transformers import Trainer

from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXPPOConfig, kl
from trl_klx.config import KLArguments
from trl_klx.config.choices import ESTIMATORS
from trl_klx.kl.gradients import SOUND, expected_gradient
from trl_klx.measure.passes.divergence import TokenStatistics
from trl_klx.measure.passes.options import MeasureOptions
from trl_klx.monitor.health import course as detect_course
from trl_klx.monitor.health import setup as detect_setup
from trl_klx.monitor.health.readings import Finding

# Whose names the walks through the code may use.
THEIRS = (builtins, trl, trl.GRPOTrainer, Trainer)
FOLDERS = (".ci", ".github", "docs", "examples", "recipes", "scripts", "tests", "trl_klx")
# What a run or a reader writes: named in the docs, not in the repository.
WRITTEN_BY_RUNS = ("resolved_recipe.yaml", "README.md", "my_reward.py", "first.yaml")


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


def test_gradient_page_is_what_the_oracle_prints_off_policy() -> None:
    page = (ROOT / "docs" / "gradients.md").read_text().split("## Off-policy")[1]
    for row in off_policy_table():
        pattern = (
            rf"\| {re.escape(row.configuration)} \| {re.escape(row.target)} \| ([^|]*) \| {100 * row.away:.0f} % \|"
        )
        found = re.search(pattern, page)
        assert found, row.configuration
        assert (found[1].strip() == "") == (row.target == "biased")
        assert row.target == "biased" or max(float(found[1]), row.error) < 1e-9
    for line in bounds_table():
        assert line in page


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


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and MyST spell them in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_docs_exist(page: Path) -> None:
    """Links, relative to the page as on GitHub; and whatever stands in code and looks like a file of the repository."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
    inside = rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)"
    for code in re.findall(r"`([^`\n]+)`|^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for name in re.findall(inside, "".join(code)):
            assert (ROOT / name.rstrip(".")).exists(), name
        if re.fullmatch(r"[\w-]+\.(py|md|lock|toml|yaml|cff)", code[0]) and code[0] not in WRITTEN_BY_RUNS:
            assert [*ROOT.glob(code[0]), *(path for folder in FOLDERS for path in (ROOT / folder).rglob(code[0]))], code


def test_names_of_the_package_in_the_docs_exist() -> None:
    """`trl_klx.measure.measure_kl` and its like."""
    names = {name for page in PAGES for name in re.findall(r"`(trl_klx(?:\.\w+)+)", page.read_text())}
    assert names
    for name in sorted(names):
        assert pkgutil.resolve_name(name), name


def test_the_list_of_rooms_is_that_of_the_layout() -> None:
    """In how-it-works.md, in both directions."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name.rstrip("/").removesuffix(".py") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert listed == set(ALLOWED) - {"__init__", "trainers"}


def test_the_walks_name_what_the_code_has() -> None:
    """In how-it-works.md: each `name()` and `ClassName` is defined in a file that its section names, or is TRL's."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    walks = [section for section in re.split(r"^## ", page, flags=re.MULTILINE) if section.startswith("One ")]
    assert len(walks) == 4
    for section in walks:
        files = {path for path in re.findall(r"`([\w/.]+\.py)`", section) if (ROOT / path).is_file()}
        code = "".join((ROOT / path).read_text() for path in files)
        for span in re.findall(r"`([A-Za-z_][\w.]*\(\)|[A-Z]\w*[a-z]\w*(?:\.\w+)*)`", section):
            for name in span.removesuffix("()").split("."):
                is_ours = re.search(rf"\b(?:def|class) {name}\b", code)
                assert is_ours or any(hasattr(owner, name) for owner in THEIRS), f"{span}: {section.splitlines()[0]}"


def test_the_index_links_every_page() -> None:
    """The site's sidebar has all pages by itself; the list in words is written by hand."""
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert sorted(linked) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


def test_every_alarm_is_in_the_pages_on_trouble() -> None:
    """An alarm is a function of `detect_course` or `detect_setup` that may find something."""
    detectors = [item for module in (detect_course, detect_setup) for item in vars(module).values() if callable(item)]
    returns = {item.__name__: inspect.get_annotations(item).get("return") for item in detectors}
    alarms = {name for name, found in returns.items() if found == Finding | None and not name.startswith("_")}
    assert len(alarms) > 5
    for name in ("health.md", "troubleshooting.md"):
        rows = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("|")]
        named = {cell for row in rows for cell in re.findall(r"\| `(\w+)` \|", row)}
        assert named == alarms, name


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    assert len(text.split()) <= 1200


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_options_in_the_docs_exist() -> None:
    # The options of other libraries are on migrating.md, which has a test of its own.
    pages = "".join(page.read_text() for page in PAGES if page.stem != "migrating")
    named = set(re.findall(r"`(kl_\w+|allow_biased_kl)`?[:=`]?", pages))
    fields = {
        *KLXGRPOConfig.__dataclass_fields__,
        *KLXPPOConfig.__dataclass_fields__,
        *KLXDPOConfig.__dataclass_fields__,
    }
    assert named
    columns = set(TokenStatistics._fields)  # of `trl-klx measure`
    assert named <= fields | columns | {*kl.__all__, "kl_state", "kl_control", "kl_groups"}


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


def test_what_moved_is_where_the_changelog_says() -> None:
    """The right column of the table: its modules and functions can be imported, its files exist."""
    table = (ROOT / "CHANGELOG.md").read_text().split("### What moved")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    now = " ".join(row[1] for row in rows)
    names, paths = (
        re.findall(r"`(trl_klx\.[\w.]+)`", now),
        re.findall(r"`(?:python )?((?:recipes|scripts)/[\w./-]+)", now),
    )
    assert len(names) > 6 and len(paths) > 4
    for name in names:
        pkgutil.resolve_name(name)
    for path in paths:
        assert (ROOT / path).exists(), path
