"""Reading and writing weights that several processes share: whole under DDP, in parts under ZeRO-3 and FSDP2."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_flattened(accelerator: Accelerator) -> bool:
    """Whether weights are flattened into shards in which nothing is found again (FSDP1)."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    return is_fsdp and accelerator.state.fsdp_plugin.fsdp_version == 1


def is_out_of_reach(parameter: Any) -> bool:
    """Whether a weight is somewhere else until its module runs: by accelerate's hooks, or on DeepSpeed's disk."""
    return parameter.is_meta or getattr(getattr(parameter, "ds_tensor", None), "final_location", None) == "nvme"


def shape_of(parameter: Any) -> torch.Size:
    """The shape of the whole weight."""
    return parameter.ds_shape if hasattr(parameter, "ds_tensor") else parameter.shape


def held(parameter: Any) -> Tensor:
    """What this process keeps of a weight; what is written into it counts, once `let_go` has freed gathered copies.

    Weights of one shape are cut alike, so that their parts belong together.
    """
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def let_go(model: nn.Module) -> None:
    """Free the copies of whole weights that ZeRO-3 and FSDP2 keep from one forward to the next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.partition()  # type: ignore[attr-defined]


def whole(parameter: Any) -> Tensor:
    """A whole weight; a copy where it is sharded. Call on every process."""
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(parameter: Any, weight: Tensor) -> None:
    """Write a whole weight, of which this process takes what it keeps.

    Raises:
        ValueError: it has another shape.
    """
    if weight.shape != shape_of(parameter):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} for one of {tuple(shape_of(parameter))}")
    target = held(parameter)
    if hasattr(parameter, "ds_tensor"):  # in equal parts, so that the last may end in padding
        size = target.numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        part = weight.reshape(-1)[start : start + size]
        target.view(-1)[: part.numel()].copy_(part)
    elif isinstance(parameter.data, DTensor):
        mesh, placements = parameter.data.device_mesh, parameter.data.placements
        on_device = weight.to(parameter.device)
        target.copy_(distribute_tensor(on_device, mesh, placements, src_data_rank=None).to_local())
    else:
        target.copy_(weight)
