"""The arrows between the rooms: `kl` and `control` know nothing of the rest, and nothing points back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_klx"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# room: what its files may import, of the package and of what weighs something
ALLOWED = {
    "kl": ({"kl"}, {"torch"}),
    "control": (set(), set()),
    "plants": ({"control"}, {"numpy"}),
    "controllers": ({"command_line", "control", "plants", "recipe_files"}, {"numpy", "rich", "matplotlib"}),
    "config": ({"config_rules", "config_types", "kl"}, set()),
    "config_types": ({"config_rules"}, set()),
    "config_rules": ({"config", "kl"}, set()),
    "rewards": (set(), set()),
    "tasks": (
        {"command_line", "rewards", "tasks"},
        {"torch", "transformers", "tokenizers", "tqdm", "numpy", "afinn", "vaderSentiment"},
    ),
    "command_line": (set(), set()),
    "recipe_files": (set(), {"yaml"}),
    "monitor": ({"kl", "monitor"}, {"torch", "transformers", "matplotlib", "numpy", "scipy"}),
    "trainers": (
        {"kl", "control", "config", "config_rules", "monitor", "hub", "launching", "trainers"},
        {"torch", "transformers", "trl", "accelerate", "peft", "packaging", "datasets", "deepspeed"},
    ),
    "hub": (
        {"command_line", "config", "kl", "monitor", "hub", "recipe_files"},
        {"huggingface_hub", "jinja2", "yaml"},
    ),
    "run": (
        {
            *("kl", "config", "config_rules", "config_types", "command_line", "hub", "launching", "monitor"),
            *("trainers", "run"),
            "recipe_files",
        },
        {"transformers", "trl", "datasets", "yaml", "rich", "torch", "accelerate", "peft", "huggingface_hub"},
    ),
    "analysis": (
        {"kl", "launching", "trainers", "analysis"},  # of the trainers, what an architecture does to its logits
        {
            *("torch", "transformers", "accelerate", "safetensors", "datasets", "pyarrow", "pandas", "numpy"),
            *("tqdm", "rich", "jinja2", "markupsafe", "matplotlib", "yaml"),
        },
    ),
    "completion": ({"cli", "command_line"}, {"shtab"}),
    "launching": (set(), set()),
    "cli": ({"command_line", "launching", "recipe_files"}, set()),
    "__init__": ({"trainers"}, set()),
}


def room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(rooms of the package, third-party packages) that a file imports, lazily or not."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = path.parts[: len(path.parts) - node.level]
            targets = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {(*base, *(target or "").split("."))[0] for target in targets}
    return own, {name for name in foreign if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    own, foreign = imports(path)
    allowed_own, allowed_foreign = ALLOWED[room(path)]
    assert own <= allowed_own
    assert foreign <= allowed_foreign


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = (PACKAGE / path).read_text()
    assert text.count("\n") <= 360
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 50, node.name  # type: ignore[operator]


def test_importing_the_package_loads_neither_trl_nor_torch() -> None:
    code = "import sys, trl_klx, trl_klx.control, trl_klx.cli; print([m for m in ('trl', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_trainers_are_exported() -> None:
    import trl_klx
    from trl_klx.trainers.grpo import KLXGRPOTrainer

    assert trl_klx.KLXGRPOTrainer is KLXGRPOTrainer
    with pytest.raises(AttributeError, match="no attribute 'KLXTrainer'"):
        _ = trl_klx.KLXTrainer
