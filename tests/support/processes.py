"""Processes that tests start: where they find the package and these helpers, and forks that have imported both."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent.parent
SUPPORT = ROOT / "tests" / "support"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.warm"])


def environment(**own: str) -> dict[str, str]:
    """This process's variables, one thread, the package and `tests` as the first places to import from, and others."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **own}


class Forked:
    """A call in a process of its own, which is forked from one where everything is imported: 6 s less than a new one.

    `variables` are added to its environment, for what reads them when it runs; it writes to the file `printed`.
    """

    def __init__(self, printed: Path, call: Callable, *arguments: Any, **variables: str) -> None:
        self._printed = printed
        self._process = _CONTEXT.Process(target=_run, args=(str(printed), variables, call, arguments))
        with patch.dict(os.environ, environment()):
            forkserver.ensure_running()
        self._process.start()

    def end(self, seconds: float = 120) -> int:
        """Its exit status, once it ends; a signal that ended it is a negative one."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.printed}")
        return self._process.exitcode

    @property
    def printed(self) -> str:
        return self._printed.read_text()


def _run(printed: str, variables: dict[str, str], call: Callable, arguments: tuple) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    try:
        call(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
