"""A fingerprint of the reference: one and the same however it is loaded, wrapped and sharded, another for any other."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .build import causal_lm
from .shards import is_flattened

_CHUNK = 2**24  # weights whose squares are in memory at a time


def fingerprint(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> str | None:
    """A fingerprint of weights; None where there are none that can be read. Call on every process.

    Of each weight its bits in bfloat16, squared and summed up: whole numbers, so that the order of the sum and its
    split over processes do not matter. bfloat16 and float32 weights of one file have the same bits there, whichever
    of the two they are loaded in; float16 has others, and its fingerprint begins with its name.
    """
    if is_flattened(accelerator):
        return None
    read = [parameter for parameter in parameters if _is_plain(parameter)]
    if not read:
        return None
    held = [_held(parameter, is_main=accelerator.is_main_process) for parameter in read]
    offloaded = sum(part.is_meta for part in held)
    sums = [0 if part.is_meta else _sum_of_squares(part) for part in held]
    total: Any = accelerator.reduce(torch.tensor([offloaded, *sums], device=accelerator.device), reduction="sum")
    if total[0]:
        return None  # to the disk, by accelerate's hooks
    digest = hashlib.sha256(json.dumps(sorted(total.tolist())).encode()).hexdigest()[:32]
    return f"{'float16' if any(p.dtype == torch.float16 for p in read) else 'bfloat16'}:{digest}"


def differ(first: str, second: str) -> bool:
    """Whether two fingerprints are of different weights, as far as their precision can tell."""
    return first != second and first.split(":")[0] == second.split(":")[0]


def lasting_parameters(model: Any, adapters: Iterable[str], adapter: str | None) -> list[nn.Parameter]:
    """The parameters of a reference that are the same in every start of a run.

    Not the embeddings: rows for added tokens are drawn again in each. Where the reference is a PEFT policy with all but
    one of its adapters off, not the others, nor what is trained besides them.

    Args:
        model: the reference, or the policy that it is a part of.
        adapters: names of the adapters of such a policy; none of another.
        adapter: the one of them that belongs to the reference; None: the reference is the bare model.
    """
    base = causal_lm(model)
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    left_out = {id(parameter) for end in ends for parameter in end.parameters()}
    others = set(adapters) - {adapter}
    kept = []
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        is_policys = bool(adapters) and parameter.requires_grad
        # LoRA's A is drawn at random, and tells nothing while its B is zero.
        if id(parameter) not in left_out and not parts & {*others, "lora_A"} and not is_policys:
            kept.append(parameter)
    return kept


def _is_plain(parameter: Any) -> bool:
    """Whether it holds numbers as they are: quantised ones are repacked by kernels as they like."""
    is_number = parameter.is_floating_point() and parameter.element_size() > 1
    return is_number and type(parameter.data) in (Tensor, DTensor)


def _held(parameter: Any, *, is_main: bool) -> Tensor:
    """What this process adds to the sum over all: its shard; of what several hold, only the first of them all."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: of equal size, so that the last may end in padding
        size = parameter.ds_tensor.ds_numel
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        return parameter.ds_tensor.detach()[: max(min(size, parameter.ds_numel - start), 0)]
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor if is_main else torch.empty(0)
    place: Any = tensor.device_mesh.get_coordinate() or ()
    copies = [number for number, how in zip(place, tensor.placements, strict=False) if how.is_replicate()]
    return torch.empty(0) if any(copies) else tensor.to_local()


def _sum_of_squares(weights: Tensor) -> int:
    parts = weights.reshape(-1).split(_CHUNK)
    bits = (part.to(torch.bfloat16).view(torch.int16).to(torch.int32) for part in parts)
    return sum(int(part.square().sum(dtype=torch.int64)) for part in bits)
