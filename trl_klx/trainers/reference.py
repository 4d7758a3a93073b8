"""Which reference the trainer gets: that one is built at all, and that it is the policy as it was given."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import grpo_trainer

from .grpo_config import KLXGRPOConfig


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@contextmanager
def reference_is_built(args: KLXGRPOConfig) -> Iterator[None]:
    """TRL builds no reference at beta 0; where the KL is measured all the same, it must."""
    beta = args.beta
    if args.kl_is_measured and beta == 0:
        args.beta = 1.0
    try:
        yield
    finally:
        args.beta = beta


@contextmanager
def reference_is_a_copy(model: Any, *, wanted: bool, trl_module: Any = grpo_trainer) -> Iterator[None]:
    """Where the policy is given in memory, make TRL's reference a copy of it.

    TRL reloads the reference from the path in the policy's config, in float32 by default: another model, if the one in
    memory was changed or cast. Sharded parameters (ZeRO-3) cannot be copied; there TRL's way stays. `wanted` is False
    where no reference model is needed: KL not measured, or PEFT, whose reference is the model without its adapter.
    `trl_module` is the TRL module whose trainer loads the reference with its `create_model_from_path`.
    """
    in_memory = isinstance(model, PreTrainedModel) and not isinstance(model, PeftModel)
    if not (in_memory and wanted) or is_deepspeed_zero3_enabled():
        yield
        return
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    from_path = trl_module.create_model_from_path
    trl_module.create_model_from_path = lambda *_args, **_kwargs: reference
    try:
        yield
    finally:
        trl_module.create_model_from_path = from_path
