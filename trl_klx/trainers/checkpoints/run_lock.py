"""One run at a time in a folder: the main process of a run holds a lock on its output_dir.

The lock is the kernel's, so that it ends with the process, however that ends; the file that carries it names who holds
it, and is removed when the run ends.
"""

import errno
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ...launching import is_alive
from ..errors import FolderError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = "run.lock"
_held: set[tuple[int, Path]] = set()  # by process, because a forked one has no lock of its parent's


@contextmanager
def run_folder(output_dir: str | os.PathLike) -> Iterator[None]:
    """Make the folder, and hold it for this process; again within one that is held already, it holds nothing.

    Raises:
        FolderError: another process holds it, or it cannot be written to.
    """
    path = Path(output_dir).absolute() / LOCK_FILE
    mine = os.getpid(), path
    if mine in _held:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path)
    except OSError as error:
        raise FolderError(
            f"output_dir={str(output_dir)!r} cannot be written to ({error.strerror}: {error.filename or path}): give a "
            "folder that can."
        ) from error
    _held.add(mine)
    try:
        yield
    finally:
        _held.discard(mine)
        path.unlink(missing_ok=True)
        file.close()


def folder_problem(output_dir: Any) -> str | None:
    """A sentence about an output_dir that is not a folder or cannot be written to; None: it can."""
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir).strip():
        return f"output_dir={output_dir!r} is not a folder: give the path of one."
    folder = Path(output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    reason = f"{existing} is not a folder"
    if existing.is_dir():
        try:  # only trying shows what permissions and mounts allow: to root they seem to allow everything
            Path(tempfile.mkdtemp(prefix=".trl_klx", dir=existing)).rmdir()
            return None
        except OSError as error:
            reason = f"{existing}: {error.strerror}"
    return f"output_dir={output_dir!r} cannot be written to ({reason}): give a folder that can."


def check_not_in_use(output_dir: str | os.PathLike) -> None:
    """Raises FolderError where another process holds the folder; takes nothing."""
    path = Path(output_dir).absolute() / LOCK_FILE
    if (os.getpid(), path) not in _held and path.is_file() and os.access(path, os.W_OK):
        with path.open("r+") as file:
            _lock(file, path)


def _take(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            _lock(file, path)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # removed by a run that has just ended


def _lock(file: IO[str], path: Path) -> None:
    """Lock the file, or refuse; where the file system has no locks, by whether the process named in it is alive."""
    file.seek(0)
    process, host, since = [*file.read().split(), "?", "?", "?"][:3]
    holder = f"output_dir={str(path.parent)!r} is in use by process {process} on {host}, since {since}: "
    if sys.platform == "win32":
        return
    try:
        # Of the two kinds, the one that a forked process does not inherit: a data loader may outlive its run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise FolderError(f"{holder}wait until it ends, end it, or give another folder.") from error
        if host == socket.gethostname() and process.isdigit() and is_alive(int(process)):
            raise FolderError(f"{holder}end it, give another folder, or delete {path} if that is not a run.") from error
