"""Runs on two processes: one `accelerate launch` of a strategy makes all runs that the selected tests want of it.

    @pytest.mark.parametrize("launched", [launch("ddp", "grpo", {"max_steps": 2})], indirect=True)
    def test_both_agree(launched: Launched) -> None: ...

`support/distributed_script.py` has the options. A run that fails ends its launch and fails its own test, with its
traceback; the others follow in another launch.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest

from support.distributed_script import train
from support.processes import SUPPORT, environment
from support.tiny import save_tiny

_SHARED = """\
compute_environment: LOCAL_MACHINE
mixed_precision: 'no'
num_machines: 1
main_process_port: 0
num_processes: 2
"""
_ZERO = """\
distributed_type: DEEPSPEED
use_cpu: false
deepspeed_config:
  zero_stage: {stage}
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: {third}
  zero3_save_16bit_model: {third}
"""
_FSDP2 = """\
distributed_type: FSDP
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: FULL_STATE_DICT
"""
# The files of accelerate. MULTI_CPU would silently run one process.
STRATEGIES = {
    "ddp": _SHARED + "distributed_type: MULTI_GPU\nuse_cpu: true\n",
    "fsdp2": _SHARED + _FSDP2,
    **{f"zero{n}": _SHARED + _ZERO.format(stage=n, third=str(n == 3).lower()) for n in (1, 2, 3)},
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
RANKS = 2
START, EACH = 120, 60  # seconds that a launch may take to begin, and for each of its runs


class Wanted(NamedTuple):
    strategy: str
    name: str
    options: dict


class Launched(NamedTuple):
    """A run's folder and what each of its processes wrote."""

    name: str
    folder: Path
    ranks: list[dict]


def launch(strategy: str, name: str, options: dict, *marks: pytest.MarkDecorator) -> Any:
    """A parameter of the fixture `launched`, with its marks."""
    marks += (pytest.mark.processes,)
    if strategy.startswith("zero"):
        marks += (pytest.mark.deepspeed,)
    sharding = {"fsdp2": "FSDP", "ddp": None}.get(strategy, "DEEPSPEED")
    use_cpu = "use_cpu: true" in STRATEGIES[strategy]
    options = {"use_cpu": use_cpu, "sharding": sharding, "processes": RANKS, **options}
    return pytest.param(Wanted(strategy, name, options), id=name, marks=marks)


@cache
def model() -> str:
    return save_tiny(Path(mkdtemp()) / "model")


def alone(options: dict) -> dict:
    """What the same run writes on one process: this one."""
    return json.loads(json.dumps(train(model(), mkdtemp(), options)))


class Launches:
    """All runs that are wanted, launched when the first of their strategy is asked for."""

    def __init__(self, folder: Path, wanted: Iterable[Wanted]) -> None:
        self.folder = folder
        self.wanted: dict[str, dict[str, dict]] = {}
        for strategy, name, options in wanted:
            same = self.wanted.setdefault(strategy, {}).setdefault(name, options)
            assert same == options, f"two runs of {strategy} are called {name}"
        self.failures: dict[str, dict[str, str]] = {}

    def run(self, wanted: Wanted) -> Launched:
        if wanted.strategy not in self.failures:
            self.failures[wanted.strategy] = self._launch_all(wanted.strategy)
        failure = self.failures[wanted.strategy].get(wanted.name)
        if failure is not None:
            pytest.fail(failure, pytrace=False)
        folder = self._folder(wanted.strategy, wanted.name)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
        return Launched(wanted.name, folder, ranks)

    def _folder(self, strategy: str, name: str) -> Path:
        return self.folder / strategy / name

    def _launch_all(self, strategy: str) -> dict[str, str]:
        """Launch until every run has ended; what is returned are the failures by the runs' names."""
        (self.folder / strategy).mkdir(parents=True)
        left, failures = list(self.wanted[strategy]), {}
        while left:
            printed = self._launch(strategy, left)
            done = [name for name in left if self._is_done(strategy, name)]
            left = left[len(done) :]
            if left:  # the first that did not end is what ended the launch
                said = [path.read_text() for path in sorted(self._folder(strategy, left[0]).glob("failed*"))]
                failures[left.pop(0)] = "\n".join(said) or printed
        return failures

    def _is_done(self, strategy: str, name: str) -> bool:
        return all((self._folder(strategy, name) / f"rank{rank}.json").exists() for rank in range(RANKS))

    def _launch(self, strategy: str, names: list[str]) -> str:
        folder = self.folder / strategy
        accelerate, runs = folder / "accelerate.yaml", folder / "runs.json"
        accelerate.write_text(STRATEGIES[strategy])
        options = self.wanted[strategy]
        runs.write_text(json.dumps([{"output": str(folder / name), "options": options[name]} for name in names]))
        own = {"ACCELERATE_TORCH_DEVICE": "cpu"} if strategy == "fsdp2" else {}
        command = [*LAUNCH, str(accelerate), str(SUPPORT / "distributed_script.py"), model(), str(runs)]
        with (folder / "printed").open("w") as printed:
            process = subprocess.Popen(
                command, env=environment(**own), stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(START + EACH * len(names))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return (folder / "printed").read_text()[-8000:]
