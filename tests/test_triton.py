"""The Triton kernels in Triton's interpreter, which needs a process that is told so before it starts."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.processes
def test_kernels_in_the_interpreter() -> None:
    """A build of torch for CPUs comes without Triton; `make` puts it beside the environment's other packages."""
    beside = Path(sys.prefix) / "triton"
    assert find_spec("triton") or beside.is_dir(), "make .venv/installed"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{beside}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
