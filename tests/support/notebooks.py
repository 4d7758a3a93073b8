"""The notebooks of examples/: reading them, and running their cells."""

import json
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    """The sources of all cells that are code, or markdown."""
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def run_cells(notebook: Path) -> dict[str, Any]:
    """Run the code from top to bottom as a kernel does, in one namespace, which is returned."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for place, source in enumerate(cells(notebook, "code")):
        exec(compile(source, f"{notebook.name}, code cell {place}", "exec"), names)
    return names
