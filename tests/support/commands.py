"""Every command that the docs, the recipes' headers and the scripts' docstrings tell a user to run."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from support.notebooks import NOTEBOOKS, cells

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = (
    "accelerate",
    "apt",
    "bash",
    "git",
    "make",
    "mypy",
    "npm",
    "pip",
    "pre-commit",
    "python",
    "ruff",
    "trl",
    "trl-klx",
)
# A command begins with a program and has an argument; variables may stand before it.
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) \S")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a page that are marked with this language; "" for those without one."""
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def commands() -> dict[str, set[str]]:
    """Each command, on one line and without its comment, and the files that name it."""
    found: dict[str, set[str]] = {}
    for path, command in _all():
        found.setdefault(" ".join(command.split()), set()).add(path.relative_to(ROOT).as_posix())
    return found


def _all() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for language in ("", "bash", "sh", "console"):
            for block in fenced(page, language):
                yield from ((page, line) for line in _command_lines(block, strict=bool(language)))
        prose = FENCE.sub("", page.read_text())
        yield from ((page, code) for code in re.findall(r"`([^`]+)`", prose) if COMMAND.match(code))
    for notebook in NOTEBOOKS:
        text = "\n".join(cells(notebook, "markdown"))
        yield from ((notebook, code) for code in re.findall(r"`([^`]+)`", text) if COMMAND.match(code))
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        header = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
        yield from ((recipe, line) for line in _command_lines("\n".join(header), strict=False))
        yield from ((recipe, code) for code in re.findall(r"`([^`]+)`", " ".join(header)) if COMMAND.match(code))
    folders = [ROOT / name for name in ("scripts", "examples", "recipes")]
    for script in [path for folder in folders for path in sorted(folder.rglob("*.py"))]:
        text = ast.get_docstring(ast.parse(script.read_text())) or re.sub(r"^# ?", "", script.read_text(), flags=re.M)
        yield from ((script, line) for line in _command_lines(text, strict=False))


def _command_lines(text: str, strict: bool) -> list[str]:
    """The lines of a text that are commands; a block that is marked as shell may hold nothing else."""
    joined = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [_without_comment(line) for line in joined if line and not line.startswith("#")]
    found = [line for line in lines if COMMAND.match(line)]
    assert not strict or found == lines, f"not a command: {set(lines) - set(found)}"
    return found


def _without_comment(line: str) -> str:
    return re.sub(r"\s+# .*", "", line)


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that stand before a command, and its words."""
    parts = shlex.split(command)
    start = next(place for place, part in enumerate(parts) if "=" not in part)
    return dict(part.split("=", 1) for part in parts[:start]), parts[start:]
