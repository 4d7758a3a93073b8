"""Folders that appear at once, when what is in them is complete, and the rows in them."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end of the block; if that raises, nothing changes.

    Temporary files may lie beside it, in its parent: they are deleted with it.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renaming is all or nothing only within a file system, hence a temporary folder next to the target.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        yield made
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        made.rename(target)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, which `load_dataset` reads; `<split>.jsonl` in a folder is a split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
