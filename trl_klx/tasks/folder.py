"""Folders that appear at once, when what is in them is complete."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end of the block; if that raises, nothing changes.

    Beside it, in its parent, temporary files may lie: they are deleted with it.
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
