"""What a run is warned of as it begins, and does nevertheless; a dry run warns of it too."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..checkpoints.whole import whole_checkpoints

# A bfloat16 weight has 8 bits: AdamW's step, about the learning rate, is lost below 1/512 of the weight, for weights of
# typically 0.02 to 0.1.
_SMALLEST_STEP = 4e-5
_SHARDED = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def lost_steps(dtype: str, learning_rate: float, *, is_quantised: bool = False) -> str | None:
    """A sentence about training weights of `dtype` that are not kept in float32 besides; None: steps reach them.

    `is_quantised`: whether they are an adapter's on a quantised model, which TRL's GRPO and DPO cast to bfloat16.
    """
    if dtype not in ("bfloat16", "float16") or learning_rate >= _SMALLEST_STEP:
        return None
    if is_quantised:
        return (
            f"TRL casts an adapter on a quantised policy to bfloat16, in which steps of learning_rate={learning_rate} "
            f"are partly rounded away: set it to {_SMALLEST_STEP:g} or more."
        )
    return (
        f"dtype={dtype!r} trains 16-bit weights, in which steps of learning_rate={learning_rate} are rounded away: set "
        "dtype to float32 (bf16 keeps the speed), or use DeepSpeed, which keeps float32 weights."
    )


def earlier_run(output_dir: str | os.PathLike) -> str | None:
    """A sentence about an output_dir in which another run has left checkpoints."""
    folder = Path(output_dir)
    found = whole_checkpoints(folder) if folder.is_dir() else []
    if not found:
        return None
    return (
        f"output_dir={str(output_dir)!r} holds the checkpoints of another run (the last is {found[-1].name}): choose "
        "another, or continue it with resume_from_checkpoint: last."
    )


def starts_one(source: str, asked: int | str) -> str:
    """The sentence about a launch of several processes of which accelerate starts one."""
    return (
        f"{source} asks for {asked} processes and accelerate starts one: distributed_type MULTI_CPU and 'NO' have only "
        "one. For several on CPUs write distributed_type: MULTI_GPU and use_cpu: true there, and use_cpu: true in the "
        "recipe."
    )


def process_warnings(accelerator: Accelerator) -> Iterator[str]:
    """Sentences about processes and sharding that were asked for and are not there."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        yield (
            f"WORLD_SIZE is {started} and {accelerator.num_processes} of these processes train together, the others "
            "each by themselves. On CPUs they find each other with distributed_type: MULTI_GPU and use_cpu: true in "
            "the accelerate file, and use_cpu: true in the recipe."
        )
    # accelerate's launcher sets both, for several processes; a process group would have a WORLD_SIZE.
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and "WORLD_SIZE" not in os.environ
    if asked and accelerator.num_processes == 1:
        yield starts_one("accelerate launch", "several")
    for variable, kind in _SHARDED.items():
        if os.environ.get(variable) == "true" and accelerator.distributed_type != kind:
            yield (
                f"{kind.value} was asked for and nothing is sharded: without GPUs accelerate runs "
                f"{accelerator.distributed_type.value} in its place."
            )


def start_warnings(trainer: Any, policy: nn.Module, *, resumes: bool) -> Iterator[str]:
    """Sentences about a run that is about to begin; `resumes`: from a checkpoint."""
    accelerator, args = trainer.accelerator, trainer.args
    yield from process_warnings(accelerator)
    if not resumes and trainer.state.global_step == 0:  # or the checkpoints are its own
        yield from filter(None, [earlier_run(args.output_dir)])
    trained = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}
    if accelerator.distributed_type not in _SHARDED.values():
        for dtype in trained & {torch.bfloat16, torch.float16}:
            name, is_quantised = str(dtype).removeprefix("torch."), bool(getattr(policy, "is_quantized", False))
            yield from filter(None, [lost_steps(name, args.learning_rate, is_quantised=is_quantised)])
