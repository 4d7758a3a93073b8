"""Whether a run can move its policy at all: what has nothing to train logs a gradient norm nevertheless."""

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import nn


def check_trainable(policy: nn.Module, optimizer: Any = None) -> None:
    """Refuse a policy that no step would change.

    Args:
        policy: with its adapter, if it has one, before it is sharded.
        optimizer: where the user gave one.

    Raises:
        ValueError: no parameter of the policy can move, or the optimizer holds none of them.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"no parameter of the policy requires a gradient, so nothing would be trained: {_remedy(policy)}."
        )
    if "hf_device_map" in vars(policy) and any(parameter.is_meta for parameter in trained):
        raise ValueError(
            "device_map has put parameters that are to be trained on disk or on the CPU, where no step reaches them: "
            "load the policy with device_map=None, or with room for all of it on the devices."
        )
    if optimizer is None or isinstance(optimizer, AcceleratedOptimizer):  # the latter is of an earlier train()
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(map(id, trained)):
        raise ValueError(
            "the optimizer in optimizers holds no parameter of the policy that is trained: make it of the trainer's "
            "own model (an adapter that the trainer puts on has parameters of its own), or leave optimizers out."
        )


def _remedy(policy: nn.Module) -> str:
    if isinstance(policy, PeftModel):
        adapters = ", ".join(map(repr, policy.active_adapters))
        return f"load its adapter {adapters} by PeftModel.from_pretrained(..., is_trainable=True)"
    if vars(policy).get("_hf_peft_config_loaded"):
        return (
            "an adapter's folder as model gives a frozen one: pass "
            "AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)"
        )
    return "free some (model.requires_grad_(True)), or pass peft_config"
