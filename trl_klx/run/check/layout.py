"""How many processes there would be and what they share out, read from an accelerate file without launching any."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...recipe_files import accelerate_file
from ..recipe.arguments import BadInput

_STAGE_ENV = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@dataclass(frozen=True)
class Layout:
    """The processes of a run. `kind` is accelerate's distributed_type: NO, MULTI_GPU, DEEPSPEED, FSDP and so on."""

    kind: str = "NO"
    processes: int = 1
    zero_stage: int = 0
    fsdp_version: int = 0
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    source: str = "one process"
    not_started: int = 0  # processes that the file asks for, and accelerate does not start

    @property
    def shards_optimizer(self) -> bool:
        return self.zero_stage >= 1 or self.kind == "FSDP"

    @property
    def shards_gradients(self) -> bool:
        return self.zero_stage >= 2 or self.kind == "FSDP"

    @property
    def shards_parameters(self) -> bool:
        return self.zero_stage >= 3 or self.kind == "FSDP"

    @property
    def name(self) -> str:
        """In words, for people."""
        kind = {"DEEPSPEED": f"DeepSpeed ZeRO-{self.zero_stage}", "FSDP": f"FSDP{self.fsdp_version}"}.get(
            self.kind, "DDP" if self.processes > 1 else "one process"
        )
        return f"{kind}, {self.processes} processes" if self.processes > 1 else kind


def read_layout(path: str | None, wanted: str | int | None = None) -> Layout:
    """The layout of an accelerate file; None: that of the launcher that started this process, if any.

    Args:
        path: of the file, or its name.
        wanted: how many processes, in place of what the file says.

    Raises:
        BadInput: the file is missing or no accelerate file.
    """
    number = int(str(wanted)) if str(wanted).isdecimal() else None  # a wrong one is reported with the other fields
    if path is None:
        found = _of_environment()
        is_planned = found == Layout() and (number or 1) > 1
        return Layout("MULTI_GPU", number or 1, source=f"num_processes={number}") if is_planned else found
    file = accelerate_file(str(path))
    try:
        content = yaml.safe_load((file or Path(str(path))).read_text())
        processes = number or int(content.get("num_processes", 1))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BadInput(
            f"accelerate_config={path!r} is not a readable accelerate file ({type(error).__name__})."
        ) from error
    kind = str(content.get("distributed_type", "NO"))
    by_mpi = (content.get("mpirun_config") or {}).get("mpirun_hostfile")
    starts_one = kind == "NO" or (kind == "MULTI_CPU" and not by_mpi)
    deepspeed = content.get("deepspeed_config") or {}
    zero = _zero_of_json(deepspeed["deepspeed_config_file"]) if "deepspeed_config_file" in deepspeed else deepspeed
    offload = {name: str(zero.get(f"offload_{name}_device", "none")) != "none" for name in ("optimizer", "param")}
    fsdp = content.get("fsdp_config") or {}
    return Layout(
        kind="NO" if starts_one else kind,
        processes=1 if starts_one else processes,
        zero_stage=int(zero.get("zero_stage", 0)) if kind == "DEEPSPEED" else 0,
        fsdp_version=int(fsdp.get("fsdp_version", 1)) if kind == "FSDP" else 0,
        offloads_optimizer=offload["optimizer"],
        offloads_parameters=offload["param"] or bool(fsdp.get("fsdp_offload_params")),
        source=str(file or path),
        not_started=processes - 1 if starts_one else 0,
    )


def _zero_of_json(path: str) -> dict[str, Any]:
    """What an accelerate file would contain itself, from a DeepSpeed JSON file."""
    try:
        zero = yaml.safe_load(Path(path).read_text()).get("zero_optimization", {})
    except (OSError, AttributeError, yaml.YAMLError) as error:
        raise BadInput(f"deepspeed_config_file={path!r} is not a readable DeepSpeed file.") from error
    devices = {
        f"offload_{name}_device": zero.get(f"offload_{name}", {}).get("device") for name in ("optimizer", "param")
    }
    return {"zero_stage": zero.get("stage", 0)} | {name: device for name, device in devices.items() if device}


def _of_environment() -> Layout:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 and _STAGE_ENV not in os.environ:
        return Layout()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return Layout("DEEPSPEED", processes, zero_stage=int(os.environ.get(_STAGE_ENV, "0")), source="the launcher")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        version = int(os.environ.get("FSDP_VERSION", "1"))
        return Layout("FSDP", processes, fsdp_version=version, source="the launcher")
    return Layout("MULTI_GPU", processes, source="the launcher")
