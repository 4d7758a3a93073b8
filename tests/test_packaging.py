"""What a user installs: wheel and sdist hold what they should, and the commands work from a wheel in any folder."""

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import trl_klx
from trl_klx.recipe_files import RECIPES, shipped_recipe

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
# What a checkout's environment would lend: the tests are about the wheel alone.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and borrows only the dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    [wheel] = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    [own] = (folder / "lib").glob("python*/site-packages")
    # A path in a .pth file comes after this folder, and its own .pth files (an editable trl_klx) are not read.
    lent = {str(Path(module.__file__).parent.parent) for module in (pytest, yaml) if module.__file__}
    (own / "dependencies.pth").write_text("\n".join(sorted(lent)))
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"trl_klx", f"trl_klx-{trl_klx.__version__}.dist-info"}
    inside = {name.removeprefix("trl_klx/") for name in names if name.startswith("trl_klx/")}
    package = {str(path.relative_to(ROOT / "trl_klx")) for path in tracked("trl_klx")}
    recipes = {str(path.relative_to(ROOT)) for path in tracked("recipes")}
    assert {"py.typed", "measure/page/page.html.j2", "measure/page/page.css", "measure/page/page.js"} <= inside
    assert {"recipes/accelerate/cpu.yaml", "recipes/smollm2-135m/prepare.py"} <= inside
    assert inside == package | recipes


def test_the_description_is_the_readme_with_links_that_work_on_a_package_index(built: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with_absolute_links = runpy.run_path(str(ROOT / "hatch_build.py"))["with_absolute_links"]
    [wheel] = built.glob("*.whl")
    [name] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert with_absolute_links(readme, project.get("urls", {}).get("Repository")) in metadata
    text = with_absolute_links(readme, "https://github.com/owner/name")
    assert "](https://raw.githubusercontent.com/owner/name/main/docs/images/kl_control.png)" in text
    assert "](https://github.com/owner/name/blob/main/docs/choosing.md)" in text
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)]+)\)", text))
    assert text.count("](") == readme.count("](")
    nowhere = with_absolute_links(readme, None)  # no repository: nothing leads to a page that is not there
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)]+)\)", nowhere))
    assert "data and rewards, recipes" in nowhere and "](https://github.com/huggingface/trl)" in nowhere


def test_the_changelog_begins_with_this_version() -> None:
    top = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top and top[1] == trl_klx.__version__
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text())["date-released"]
    assert top[2] in ("unreleased", str(released))


def tracked(folder: str) -> list[Path]:
    """The files of a folder, without what Python leaves in it."""
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_sdist_holds_the_sources_and_no_runs(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile", "tests/test_oracle.py"} <= names
    assert {"docs/index.md", "examples/estimators_by_enumeration.py", "recipes/accelerate/cpu.yaml"} <= names
    assert not [name for name in names if name.startswith(("runs/", ".venv", "docs/_build", "dist/"))]


def test_the_installed_command_finds_its_recipes_in_any_folder(installed: Path, tmp_path: Path) -> None:
    """With the recipe of the wheel it gets as far as the starter, which is not there."""

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [str(installed / argv[0]), *argv[1:]]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)

    code = "import json, trl_klx.recipe_files as f; print(json.dumps([f.__file__, str(f.accelerate_file('cpu'))]))"
    module, config = json.loads(run("python", "-c", code).stdout)
    assert Path(config) == Path(module).parent / "recipes" / "accelerate" / "cpu.yaml"
    assert config.startswith(str(installed.parent))
    for argv in (["--help"], ["starter", "--help"]):
        assert run("trl-klx", *argv).stdout.startswith("usage: trl-klx")
    assert f"They lie in {Path(module).parent / 'recipes'}. " in run("trl-klx", "recipes").stdout
    refused = run("trl-klx", "grpo", "--config", "recipes/starter/grpo_k3_loss.yaml")
    assert "dataset_name='runs/starter/data'" in refused.stderr
    assert "run `trl-klx starter` first" in refused.stderr
    assert refused.returncode == 2


def test_a_recipe_of_ones_own_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "recipes/starter/grpo_k3_loss.yaml"
    assert shipped_recipe(name) == RECIPES / "starter" / "grpo_k3_loss.yaml"
    assert shipped_recipe("recipes/starter/other.yaml") == Path("recipes/starter/other.yaml")
    assert shipped_recipe("starter/grpo_k3_loss.yaml") == Path("starter/grpo_k3_loss.yaml")
    (tmp_path / "recipes" / "starter").mkdir(parents=True)
    (tmp_path / name).write_text("beta: 1.0\n")
    assert shipped_recipe(name) == Path(name)


def test_every_extra_is_known_and_pinned() -> None:
    """The extras that the docs name exist, and the lock, or the Makefile, has a version of all that CI can install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = {line.split("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    locked |= set(re.findall(r"\b([\w-]+)==", (ROOT / "Makefile").read_text()))
    for name, requirements in extras.items():
        for requirement in requirements:
            package = requirement.split(";")[0].split(">")[0].split("=")[0].strip().lower()
            assert package in locked or package.startswith(("trl_klx[", "trl[vllm]")), (name, requirement)
    for own in extras["dev"][0].split("[")[1].rstrip("]").split(","):
        assert own in extras


def test_citation_and_package_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == trl_klx.__version__
    assert citation["title"] == "trl_klx"
    assert citation["message"]
    assert citation["authors"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["version"], project["license"]) == (citation["version"], citation["license"])
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License\n")


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[-1] == "bash .ci/run"
    [python] = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert f">={python}" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^timed (make [\w-]+)$", ci, flags=re.MULTILINE) == [
        "make test",
        "make lint",
        "make docs",
        "make test-trl112",
        "make test-vllm",
        "make test-wandb",
        "make test-qlora",
    ]


def test_pre_commit_has_the_locked_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [ruff] = [repo for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in (ROOT / "requirements.lock").read_text().split()
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
