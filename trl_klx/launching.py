"""How a command starts processes: it becomes `accelerate launch`, and the processes that this starts end with it."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_LAUNCHER = "TRL_KLX_LAUNCHER"  # host and process id of the launcher, for the processes that it starts
_PR_SET_PDEATHSIG = 1


def become(command: list[str]) -> int:
    """Put a launcher in this process's place, so that whatever is sent to this process reaches it. Does not return.

    (On Windows, which has no such thing, it runs as a child, whose exit status is returned.)
    """
    environment = {**os.environ, _LAUNCHER: f"{socket.gethostname()} {os.getpid()}"}
    sys.stdout.flush()
    sys.stderr.flush()
    return subprocess.call(command) if os.name == "nt" else os.execve(command[0], command, environment)


def end_with_launcher() -> bool:
    """Have this process terminated when the launcher ends, however that ends; nothing where none started it.

    `accelerate launch` leaves its process behind when it is killed.

    Returns:
        Whether a launcher started it, by `become`.
    """
    host, _, launcher = os.environ.pop(_LAUNCHER, "").partition(" ")
    if not launcher or host != socket.gethostname():
        return bool(launcher)
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if str(os.getppid()) != launcher and not is_alive(int(launcher)):  # ended before this was called
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; not to be asked on Windows, where asking ends it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
