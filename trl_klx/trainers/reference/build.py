"""Which reference the trainer gets: that one is built at all, and that it is the policy as it was given."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import grpo_trainer

from ..seams import swapped
from .adapters import check_fresh_adapter, trl_keeps_our_reference


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@contextmanager
def reference_as_given(args: Any, model: Any, peft_config: PeftConfig | None) -> Iterator[None]:
    """While TRL sets up GRPO: it builds a reference wherever the KL is measured, and that is the policy as given."""
    beta = args.beta or float(args.kl_is_measured)  # at 0 TRL builds none
    with swapped(args, beta=beta), reference_is_a_copy(args, model, peft_config, wanted=args.kl_is_measured):
        yield


@contextmanager
def reference_is_a_copy(
    args: Any, model: Any, peft_config: PeftConfig | None, *, wanted: bool, trl_module: Any = grpo_trainer
) -> Iterator[None]:
    """Where the policy is given in memory, make TRL's reference a copy of it; what moves it is ours, not TRL's.

    TRL reloads the reference from the path in the policy's config, in float32 by default: another model, if the one in
    memory was changed or cast. Sharded parameters (ZeRO-3) cannot be copied; there TRL's way stays. Where an adapter is
    to be made (`peft_config`), the model without it is the reference; a policy that comes with an adapter gets a copy
    of the adapter.

    Args:
        args: the trainer's config.
        model: the policy, or its path.
        peft_config: of an adapter that TRL is to make.
        wanted: False where TRL is to load no reference.
        trl_module: the TRL module whose trainer loads it with its `create_model_from_path`.
    """
    with ExitStack() as swaps:
        swaps.enter_context(swapped(args, sync_ref_model=False))  # TRL refuses it with an adapter, and at beta 0
        if wanted and peft_config is None and isinstance(model, PeftModel):
            swaps.enter_context(trl_keeps_our_reference(model))
        elif wanted:
            check_fresh_adapter(peft_config)
            if isinstance(model, PreTrainedModel) and peft_config is None and not is_deepspeed_zero3_enabled():
                reference = copy.deepcopy(model).requires_grad_(False).eval()
                own = {"create_model_from_path": lambda *_args, **_kwargs: reference}
                swaps.enter_context(swapped(trl_module, **own))
        yield
