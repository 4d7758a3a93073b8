"""The arrows between the rooms: `kl` and `control` know nothing of the rest, and nothing points back."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_klx"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# room: what its files may import, of the package and of what weighs something
_TRAINING = {"torch", "transformers", "trl", "accelerate", "peft", "packaging", "datasets", "deepspeed"}
_BELOW = {"trainers/errors", "trainers/parts", "trainers/seams"}  # every room of `trainers` may use them
_PLAIN = {"files", "wording"}  # small modules that know nothing of the rest, for every room but the two lowest
ALLOWED = {
    "kl": ({"kl"}, {"torch", "triton"}),
    "control": (set(), {"numpy"}),
    "config": ({"kl", "recipe_files"}, set()),
    "rewards": (set(), set()),
    "tasks": ({"cli", "rewards", "tasks"}, {"torch", "transformers", "tokenizers", "tqdm"}),
    "recipe_files": (set(), {"yaml"}),
    "monitor": ({"kl"}, {"torch", "transformers", "matplotlib", "numpy"}),
    "monitor/health": ({"monitor"}, {"transformers"}),
    "monitor/overoptimisation": ({"monitor"}, {"torch", "transformers", "matplotlib", "numpy", "scipy"}),
    "trainers/errors": (set(), set()),
    "trainers/parts": (set(), set()),
    "trainers/seams": ({"hub"}, _TRAINING),
    "trainers/checkpoints": ({"hub", "launching", *_BELOW}, _TRAINING),
    "trainers/session": ({"config", "control", "kl", "monitor", "trainers/checkpoints", *_BELOW}, _TRAINING),
    "trainers/reference": ({"hub", "trainers/checkpoints", *_BELOW}, _TRAINING),
    "trainers/rewarding": (
        {"config", "monitor/overoptimisation", "trainers/checks", "trainers/session", *_BELOW},
        _TRAINING,
    ),
    "trainers/checks": ({"trainers/checkpoints", *_BELOW}, _TRAINING),
    "trainers/report": (
        {"config", "hub", "monitor", "monitor/health", "trainers/session", *_BELOW},
        {*_TRAINING, "rich", "pandas"},
    ),
    "trainers/exact": ({"kl", "trainers/reference", *_BELOW}, _TRAINING),
    "trainers/shared": (
        {
            *("config", "kl", "monitor/health", "trainers/checkpoints", "trainers/checks", "trainers/reference"),
            *("hub", "trainers/report", "trainers/rewarding", "trainers/session", *_BELOW),
        },
        _TRAINING,
    ),
    **dict.fromkeys(
        ("trainers/grpo", "trainers/ppo", "trainers/dpo"),
        (
            {
                *("config", "hub", "kl", "monitor", "trainers/checkpoints", "trainers/checks", "trainers/exact"),
                *("trainers/reference", "trainers/rewarding", "trainers/session", "trainers/shared", *_BELOW),
            },
            _TRAINING,
        ),
    ),
    "hub": (
        {"cli", "config", "kl", "monitor", "monitor/health", "recipe_files"},
        {"huggingface_hub", "jinja2", "yaml"},
    ),
    "run/recipe": (
        {
            *("cli", "config", "kl", "monitor", "recipe_files"),
            *("trainers/checks", "trainers/dpo", "trainers/grpo", "trainers/ppo", "trainers/seams", "trainers/shared"),
        },
        {"transformers", "trl", "datasets"},
    ),
    "run/sources": (
        {
            *("config", "recipe_files", "run/recipe"),
            *("trainers/checkpoints", "trainers/checks", "trainers/errors", "trainers/rewarding"),
        },
        {"torch", "transformers", "trl", "datasets", "peft", "safetensors"},
    ),
    "run/explain": ({"cli", "kl", "run/recipe"}, {"rich"}),
    "run/check": (
        {
            *("cli", "config", "kl", "recipe_files", "run/explain", "run/recipe", "run/sources"),
            *("trainers/checkpoints", "trainers/checks", "trainers/errors", "trainers/reference", "trainers/seams"),
        },
        {"torch", "transformers", "trl", "datasets", "huggingface_hub", "rich", "yaml"},
    ),
    "run": (
        {
            *("cli", "config", "hub", "launching", "monitor", "monitor/health"),
            *("run/check", "run/recipe", "run/sources"),
            *("trainers/checkpoints", "trainers/checks", "trainers/errors", "trainers/reference", "trainers/rewarding"),
        },
        {"transformers", "rich"},
    ),
    "measure": (
        {"launching", "measure/page", "measure/passes", "measure/statistics"},
        {"datasets", "pyarrow", "pandas", "rich", "transformers"},
    ),
    "measure/page": (
        {"measure/passes", "measure/statistics", "monitor"},
        {"jinja2", "markupsafe", "matplotlib", "numpy", "pandas"},
    ),
    "measure/statistics": ({"measure/passes", "monitor"}, {"numpy", "pandas", "pyarrow", "torch", "yaml"}),
    "measure/passes": (
        {"kl"},
        {"torch", "transformers", "accelerate", "safetensors", "datasets", "pyarrow", "tqdm"},
    ),
    "cli": ({"control", "launching", "recipe_files"}, {"matplotlib", "numpy", "rich", "shtab"}),
    **dict.fromkeys(("launching", "files", "wording"), (set(), set())),
    "__init__": ({"monitor", "trainers/grpo", "trainers/ppo", "trainers/dpo"}, set()),
    "__main__": ({"cli"}, set()),
    "trainers": (set(), set()),
}
SPLIT = ("trainers", "monitor", "run", "measure")  # whose folders, and files of `trainers`, are rooms of their own


def room(path: Path) -> str:
    """The room that a file, or a module given as one, belongs to."""
    top, *below = path.with_suffix("").parts
    if (
        top in SPLIT
        and below
        and ((PACKAGE / top / below[0]).is_dir() or (top == "trainers" and below[0] != "__init__"))
    ):
        return f"{top}/{below[0]}"
    return top


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(other rooms of the package, third-party packages) that a file imports, lazily or not."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = path.parts[: len(path.parts) - node.level]
            targets = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {room(Path(*base, *(target or "").split("."))) for target in targets}
    return own - {room(path)}, {name for name in foreign if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    own, foreign = imports(path)
    allowed_own, allowed_foreign = ALLOWED[room(path)]
    assert own <= allowed_own | (set() if room(path) in ("kl", "control", "rewards") else _PLAIN)
    assert foreign <= allowed_foreign


def test_no_room_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(imports(path)[0])
    TopologicalSorter(graph).prepare()  # a CycleError names the rooms of a circle


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
    from trl_klx.trainers.grpo.trainer import KLXGRPOTrainer

    assert trl_klx.KLXGRPOTrainer is KLXGRPOTrainer
    with pytest.raises(AttributeError, match="no attribute 'KLXTrainer'"):
        _ = trl_klx.KLXTrainer
