"""The stages of `scripts/check_gpu.py`. What is imported here needs the standard library alone."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Settings:
    """Of one check. On "cpu" every stage runs at a size that measures nothing, to try the check itself."""

    device: str
    output: str  # folder
    other_trl: str | None  # folder with another TRL, to be put on the path

    @property
    def is_try(self) -> bool:
        return self.device == "cpu"

    def folder(self, name: str) -> Path:
        path = Path(self.output) / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Finding(NamedTuple):
    """A row of the table; without a bar it only informs."""

    what: str
    measured: str
    bar: str = ""
    ok: bool | None = None


class Report:
    """Findings of a stage, each in the stage's file as soon as it is known: a stage that is cut short keeps them."""

    def __init__(self, path: Path, *, is_try: bool = False) -> None:
        self._path, self._is_try = path, is_try

    def add(self, what: str, measured: str, bar: str = "", ok: bool | None = None) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(Finding(what, measured, bar, ok)) + "\n")

    def at_most(self, what: str, value: float, bar: float, *, of_size: bool = False) -> None:
        """A number and the most that it may be. NaN is too much. `of_size`: it means nothing at the size of a try."""
        self.add(what, f"{value:.4g}", f"at most {bar:g}", None if of_size and self._is_try else value <= bar)


def read(path: Path) -> list[Finding]:
    return [Finding(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run(command: list[str], log: Path, *, seconds: float | None = None, **variables: str) -> int:
    """Run a Python command from the checkout, everything that it prints in `log`; its exit status, 124 on a timeout."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", **variables}
    with log.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **options)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own children too
            process.wait()
            return 124


def last_words(log: Path) -> str:
    """The last line of a log, for the table."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:110] if lines else "it printed nothing"


def to_json(settings: Settings) -> str:
    return json.dumps(asdict(settings))
