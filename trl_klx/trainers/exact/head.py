"""The output head of a causal language model: what it does to hidden states, and how to read it where it is sharded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ...kl import float32_linear
from ...kl.chunked.products import compute_dtype
from ...kl.logits import LogitTransform
from ..seams import swapped

# What to do where the exact KL is not available.
WITHOUT_EXACT = "use kl_estimator k1, k2 or k3 (in DPO kl_coef 0, with kl_monitor=['k1', 'k3'])"

HALF = (torch.bfloat16, torch.float16)


def call_as_forward(head: nn.Module, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Run `function` in place of the head's forward, so that what shards the head gathers it around the function.

    ZeRO-3 and FSDP gather a module's weights by hooks around its forward, and again around its part of backward;
    accelerate's bring inputs, and weights that are offloaded, to the head's device.
    """
    with swapped(head, **{place_of_forward(head): function}):
        return head(hidden)


def place_of_forward(head: nn.Module) -> str:
    """The attribute to swap for a function that runs as the head's forward."""
    return "_old_forward" if "_hf_hook" in vars(head) else "forward"  # accelerate puts its hook around `_old_forward`


class HeadInput(NamedTuple):
    """What an output head was given."""

    hidden: Tensor  # (rows, L, H)
    dtype: torch.dtype  # the precision in which the head takes it


@contextmanager
def unrounded(head: Any) -> Iterator[list[HeadInput]]:
    """While active, the head's logits are not rounded to half precision; collects what the head is given.

    A product of half-precision matrices then has a float32 result. Rounded to bfloat16, logits between 16 and 32 lie
    0.125 apart, which hides a KL near 0 and gives log-ratios a noise of 0.05. In float32 the head runs as it is.
    """
    name = place_of_forward(head)
    plain, given = getattr(head, name), list[HeadInput]()

    def project(hidden: Tensor) -> Tensor:
        dtype = compute_dtype(hidden, head.weight)
        given.append(HeadInput(hidden, dtype))
        if type(head) is not nn.Linear or dtype not in HALF:
            return plain(hidden)
        return float32_linear(hidden, head.weight, head.bias)

    with swapped(head, **{name: project}):
        yield given


def reshard(head: nn.Module) -> None:
    """Free what FSDP2 has left gathered of the head's weights after an earlier forward.

    TRL's fused head (1.16) does not call the head; it reads its weights and keeps them for its backward. Of sharded
    ones it makes a copy; gathered ones are freed under it when the head's own backward is done.
    """
    if isinstance(head, FSDPModule):
        head.reshard()


def whole(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the frozen reference's head; a copy of them where they are sharded (ZeRO-3, FSDP) or elsewhere
    until the head runs (accelerate's offloading)."""
    if head.weight.is_meta:
        found: list[tuple[Tensor, Tensor | None]] = []

        def read(nothing: Tensor) -> Tensor:
            found.append((head.weight.detach(), None if head.bias is None else head.bias.detach()))
            return nothing

        call_as_forward(head, read, torch.empty(0))
        return found[0]
    parameters: list[Any] = [head.weight] if head.bias is None else [head.weight, head.bias]
    if is_deepspeed_zero3_enabled():
        with maybe_gather_lm_head_ctx(*parameters):
            weight, *bias = [parameter.detach().clone() for parameter in parameters]
    else:
        tensors = (parameter.detach() for parameter in parameters)
        weight, *bias = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return weight, bias[0] if bias else None


def check_heads(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    head, ref_head = policy.get_output_embeddings(), reference.get_output_embeddings()
    for model in (policy, reference):
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no output head that the exact KL could read: {WITHOUT_EXACT}."
            )
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the output head is a {type(head).__module__}.{type(head).__name__}: exact KL reads a plain head's "
            f"weight, so remove 'lm_head' from the adapter's target_modules and modules_to_save, or {WITHOUT_EXACT}."
        )
    if head.out_features != ref_head.out_features:  # weights may be sharded to nothing
        raise ValueError(
            f"the policy has a vocabulary of {head.out_features} and the reference of {ref_head.out_features}: "
            "exact KL needs one vocabulary; use the checkpoint that the policy started from as reference."
        )
    transform, ref_transform = LogitTransform.of(policy.config), LogitTransform.of(reference.config)
    if transform != ref_transform:
        raise ValueError(
            f"the policy scales its logits by {transform.scale:g} and caps them at {transform.softcap}, the reference "
            f"by {ref_transform.scale:g} and at {ref_transform.softcap}: the exact KL treats both alike; use the "
            f"checkpoint that the policy started from as reference, or {WITHOUT_EXACT}."
        )


def are_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two projections are the same, but for half precision."""
    atol = 2e-2 * float(theirs.abs().max())
    return ours.shape == theirs.shape and torch.allclose(ours.to(theirs.device), theirs, rtol=2e-2, atol=atol)


def not_called(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} does not call its output head with the hidden states of all tokens, which the "
        f"exact KL reads there: {WITHOUT_EXACT}."
    )


def unknown_transform(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} transforms its logits in a way that the exact KL does not know: "
        f"{WITHOUT_EXACT}, and please report the architecture."
    )
