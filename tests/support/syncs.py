"""Counts where the host waits for the device: the real ones on CUDA, on a CPU those that CUDA would have.

On CUDA `torch.cuda.set_sync_debug_mode` reports each. A CPU has one device only, so tensors are followed instead: one
that was made without a device, or brought to the host, is the host's, and so is what is computed from such alone; all
others are the device's. A wait is a number, a size or a decision of the device's that the host reads, and a copy from
one side to the other (to the device, `non_blocking` copies are none).
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import TrainerCallback

from support.device import DEVICE

Syncs = Counter[str]  # by the line that waited

# What a model's forward waits for, its attention masks: an exact KL needs more forwards than stock TRL has.
_OF_FORWARDS = ("transformers/masking_utils", "transformers/models/")
# What no GPU runs: the torch twin of the Triton kernels, a check of sizes, and collators.
_OF_CPUS = re.compile(
    r"trl_klx/(kl/chunked/torch_rows|kl/chunked/from_logits\.py:\d+ _check_tokens|trainers/dpo/pairs\.py:\d+ __call__)"
)
# Operators whose result, or its size, the host has to know.
_READS = {
    "_local_scalar_dense",  # item, bool, float, int, a comparison in `if`
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "argwhere",
    "masked_select",
    "masked_scatter_backward",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_FACTORIES = {
    getattr(torch, name)
    for name in ("tensor", "as_tensor", "from_numpy", "zeros", "ones", "full", "empty", "arange", "linspace", "eye")
} | {torch.rand, torch.randn, torch.randint, torch.randperm}
_FROM_LISTS = {torch.tensor, torch.as_tensor}


def here() -> str:
    """The innermost line of our package, TRL or transformers that runs."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in ("trl_klx", "trl", "transformers"):
            found = frame.f_code.co_filename.rpartition(f"/{package}/")
            if found[1]:
                return f"{package}/{found[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class _Sides:
    """Which tensors are the host's."""

    def __init__(self) -> None:
        self._of_host = WeakIdKeyDictionary()

    def is_host(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._of_host

    def set(self, result: Any, *, host: bool) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                if host:
                    self._of_host[tensor] = True
                else:
                    self._of_host.pop(tensor, None)

    def device_ones(self, *arguments: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and not self.is_host(leaf)]


class _Operators(TorchDispatchMode):
    """Sees what torch computes, the backward pass included."""

    def __init__(self, sides: _Sides, found: Syncs) -> None:
        super().__init__()
        self._sides, self._found = sides, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, sides = kwargs or {}, func.overloadpacket.__name__, self._sides
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(not sides.is_host(tensor) for tensor in tensors)
        if on_device and name in _READS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            self._found[f"{here()} ({name})"] += 1
        elif name in _INDEXES and not sides.is_host(args[0]):
            for index in args[1]:
                if index is not None and (index.dtype in (torch.bool, torch.uint8) or sides.is_host(index)):
                    self._found[f"{here()} ({name})"] += 1
        elif name == "copy_" and sides.is_host(args[0]) != sides.is_host(args[1]) and args[1].dim():
            self._found[f"{here()} ({name})"] += 1
        result = func(*args, **kwargs)
        if name == "lift_fresh":  # made of numbers: the host's, unless `_Calls` knows better
            sides.set(result, host=True)
        elif tensors and not name.endswith("_"):
            sides.set(result, host=not on_device)
        return result


class _Calls(TorchFunctionMode):
    """Sees what Python asks of torch: on which side tensors are made, and what goes to the other."""

    def __init__(self, sides: _Sides, found: Syncs) -> None:
        super().__init__()
        self._sides, self._found = sides, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, sides, name = kwargs or {}, self._sides, getattr(func, "__name__", "")
        if func in _FACTORIES:
            data = args[0] if args else kwargs.get("data")
            if func in _FROM_LISTS and isinstance(data, Tensor):
                return self._moved(func, args, kwargs, data, kwargs.get("device"))
            is_host = kwargs.get("device") in (None, "cpu")
            if func in _FROM_LISTS and not is_host:
                self._wait(name)
            result = func(*args, **kwargs)
            sides.set(result, host=is_host)
            return result
        if func is Tensor.new_tensor and not sides.is_host(args[0]):
            self._wait(name)
            result = func(*args, **kwargs)
            sides.set(result, host=False)
            return result
        if func in (Tensor.tolist, Tensor.numpy) and not sides.is_host(args[0]):
            self._wait(name)
        if func is Tensor.cpu:
            return self._moved(func, args, kwargs, args[0], "cpu")
        if func in (Tensor.to, Tensor.cuda):
            target = next((a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (str, torch.device))), None)
            other = next((a for a in args[1:] if isinstance(a, Tensor)), None)
            if other is not None:
                target = "cpu" if sides.is_host(other) else other.device
            return self._moved(func, args, kwargs, args[0], target)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, target: Any) -> Tensor:
        """The result of a call that may bring a tensor to the other side."""
        was_host = self._sides.is_host(tensor)
        is_host = was_host if target is None else target == "cpu" and isinstance(target, str)
        if was_host and not is_host and not kwargs.get("non_blocking"):
            self._wait("to the device")
        if is_host and not was_host:
            self._wait("to the host")
        result = func(*args, **kwargs)
        if result is tensor and was_host != is_host and not tensor.requires_grad:
            result = tensor.detach()  # the original stays where it is
        self._sides.set(result, host=is_host)
        return result

    def _wait(self, how: str) -> None:
        self._found[f"{here()} ({how})"] += 1


@contextmanager
def _reported_by_cuda(found: Syncs) -> Iterator[None]:
    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[here()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def counting(device: torch.device) -> Iterator[Syncs]:
    """While active, counts synchronisations by the line of our package, TRL or transformers that waits."""
    found: Syncs = Counter()
    if device.type == "cuda":
        with _reported_by_cuda(found):
            yield found
        return
    sides = _Sides()
    with _Calls(sides, found), _Operators(sides, found):
        yield found


def _counts(place: str) -> bool:
    return not (place.startswith(_OF_FORWARDS) or _OF_CPUS.match(place))


class _Steps(TrainerCallback):
    """Keeps what was counted between the ends of the first and the third step of transformers' loop."""

    def __init__(self, found: Syncs) -> None:
        self._found, self._before = found, Counter[str]()
        self.counted: Syncs = Counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._before = Counter(self._found)
        if state.global_step == 3:
            found = Counter(self._found) - self._before
            self.counted = Counter({place: number for place, number in found.items() if _counts(place)})


def syncs_of(trainer: Any) -> Syncs:
    """Trains for three steps or more: the synchronisations of the second and the third, but for a model's forward."""
    torch.manual_seed(0)
    with counting(DEVICE) as found:
        steps = _Steps(found)
        trainer.add_callback(steps)
        trainer.train()
    assert steps.counted
    return steps.counted
