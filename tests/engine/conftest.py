"""Tests with a real vLLM engine on CPU: `make test-vllm`, in an environment of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine


@pytest.fixture(scope="session", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the model that engine and trainers load."""
    undo = vllm_engine.drive_the_cpu_engine()
    yield vllm_engine.save_model(tmp_path_factory.mktemp("vllm") / "model")
    undo()
