"""Processes that tests start: where they find the package and these helpers, and forks that have imported both."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parent.parent.parent
SUPPORT = ROOT / "tests" / "support"
_AT_START = dict(os.environ)  # before a test sets variables of its own
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.warm"])


def environment(**own: str) -> dict[str, str]:
    """This process's variables, one thread, the package and `tests` as the first places to import from, and others."""
    return {**_with_our_paths(os.environ), **own}


def _with_our_paths(variables: Mapping[str, str]) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), variables.get("PYTHONPATH", "")]
    return {**variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Forked:
    """A call in a process of its own, which is forked from one where everything is imported: 6 s less than a new one.

    `variables` are added to its environment, for what reads them when it runs; its stderr is a file. Its exit
    status is what the call returns; None is 0.
    """

    def __init__(self, errors: Path, call: Callable, *arguments: Any, **variables: str) -> None:
        self._errors = errors
        self._process = _CONTEXT.Process(target=_run, args=(str(errors), variables, call, arguments))
        with patch.dict(os.environ, _with_our_paths(_AT_START), clear=True):
            forkserver.ensure_running()
        self._process.start()

    def end(self, seconds: float = 120) -> int:
        """Its exit status, once it ends; a signal that ended it is a negative one."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.errors}")
        return self._process.exitcode

    @property
    def errors(self) -> str:
        return self._errors.read_text()


def end_ranks(folder: Path, ranks: int, call: Callable, *arguments: Any, **variables: str) -> tuple[list[int], str]:
    """The call in so many processes of one run, as a launcher starts them: exit statuses, and stderr of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        own = {**variables, "WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(Forked(folder / f"stderr{rank}", call, *arguments, **own))
    return [process.end() for process in processes], "".join(process.errors for process in processes)


def _run(errors: str, variables: dict[str, str], call: Callable, arguments: tuple) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(variables)
    try:
        status = call(*arguments)
        if torch.distributed.is_initialized():
            time.sleep(0.5)  # gloo aborts now and then when one leaves while another still talks
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
