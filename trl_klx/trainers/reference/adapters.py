"""The reference of a policy that came with an adapter: a frozen copy of the adapter, under a name of its own."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from ..seams import swapped

REF_ADAPTER = "ref"  # TRL's name for it
# Their adapter alone is not the change of the base model: they take their start out of its weights.
_INITS_THAT_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@contextmanager
def trainable_as_before(policy: nn.Module) -> Iterator[None]:
    """Afterwards the same parameters are trained: PEFT frees all of an adapter that it switches to, and back to."""
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad != flags.get(name, parameter.requires_grad):
                parameter.requires_grad_(flags[name])


@contextmanager
def precisions_as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards parameters have the precision that they had: PEFT loads a checkpoint's adapter in float32, also into
    one that TRL has cast to bfloat16 (on a quantised policy), and the resumed run would be another."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def as_reference(policy: PeftModel, name: str | None = None) -> Iterator[None]:
    """While active, a policy with an adapter is its reference: with the adapter `name`, or "ref", or without any."""
    name = REF_ADAPTER if name is None and REF_ADAPTER in policy.peft_config else name
    with trainable_as_before(policy), use_adapter(policy, name):
        yield


def check_fresh_adapter(config: PeftConfig | None) -> None:
    """Refuse an adapter that changes the base model when it is made.

    Raises:
        ValueError: the reference, the policy without its adapter, would be another model than the policy's start.
    """
    if config is None:
        return
    _check_bias(config)
    init = config.init_lora_weights if isinstance(config, LoraConfig) else True
    if init not in _INITS_THAT_LEAVE_THE_BASE:
        raise ValueError(
            f"init_lora_weights={init!r} changes the base model, so that the policy without its adapter is not "
            f"where it started"
            ": pass get_peft_model(model, peft_config) as the model, and the reference is a copy of its start."
        )


def _check_bias(config: PeftConfig) -> None:
    bias = vars(config).get("bias", "none")
    if bias != "none":
        raise ValueError(
            f"bias={bias!r} in the adapter's config trains the base model's own biases, so that the model without "
            f"the adapter moves too: "
            "use bias='none', or merge the adapter (model.merge_and_unload()) and train another."
        )


def active_adapter(policy: PeftModel) -> str:
    """The name of the adapter that is trained.

    Raises:
        ValueError: there are several, or none.
    """
    active = policy.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the policy has {len(active)} active adapters ({', '.join(active)}) and one is trained: activate it with "
            "model.set_adapter(name)."
        )
    return active[0]


def keep_reference(policy: PeftModel) -> None:
    """Add a frozen copy of the active adapter under the name "ref", in place of what an earlier run has left there.

    Raises:
        ValueError: another adapter has that name, or no copy of this kind can be made.
    """
    name, made = active_adapter(policy), REF_ADAPTER in vars(policy).get("_made_here", ())
    if REF_ADAPTER in policy.peft_config and not made:
        raise ValueError(
            f"the policy has an adapter {REF_ADAPTER!r} already, and by that name the trainer keeps its reference: "
            "remove it (model.delete_adapter('ref')) to train against the policy as it is now; in PPO, "
            "ref_adapter_name names an adapter as the reference."
        )
    config = policy.peft_config[name]
    _check_bias(config)
    with trainable_as_before(policy):
        if made:
            policy.delete_adapter(REF_ADAPTER)
        try:
            policy.add_adapter(REF_ADAPTER, _config_of_copy(config))
        except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"no second adapter of the kind {type(config).__name__} can be put beside {name!r} for a reference "
                f"({error}): merge it (model.merge_and_unload()) and pass peft_config for another."
            ) from error
        policy._made_here = (REF_ADAPTER,)  # type: ignore[assignment]
    match_reference(policy)


def match_reference(policy: PeftModel) -> None:
    """Give the adapter "ref" values and precision of the active one, and freeze it."""
    name = active_adapter(policy)
    tensors: dict[str, Tensor] = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    for key, tensor in tensors.items():
        source = _counterpart(key, name, tensors)
        if source is not None:
            tensor.data = tensors[source].detach().clone()
            tensor.requires_grad_(False)


def copied_parameters(policy: PeftModel, name: str | None) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The weights of the adapter "ref" by their names, each with that of the adapter `name` which it is a copy of."""
    named = dict(policy.named_parameters())
    sources = {key: _counterpart(key, name, named) for key in named} if name is not None else {}
    return {key: (named[key], named[source]) for key, source in sources.items() if source is not None}


def _counterpart(key: str, name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The tensor of adapter `name` that `key`, one of "ref", is a copy of. An adapter's name is a part of the path."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        candidate = ".".join([*parts[:place], name, *parts[place + 1 :]])
        if part == REF_ADAPTER and candidate in tensors:
            return candidate
    return None


def _config_of_copy(config: PeftConfig) -> PeftConfig:
    """The same adapter, put on a base model that is as the first one has left it."""
    copied = copy.deepcopy(config)
    if isinstance(copied, AdaLoraConfig):
        copied.inference_mode = True  # of two that are trained PEFT refuses one; elsewhere this is another architecture
    if isinstance(copied, LoraConfig):
        copied.init_lora_weights, copied.layer_replication = True, None
    return copied


@contextmanager
def trl_keeps_our_reference(policy: PeftModel) -> Iterator[None]:
    """While active, TRL's trainers find the reference's adapter made.

    TRL 1.12 to 1.16 copy the adapter "default", whichever is trained, by the parameters with ".default." in their name:
    those of embeddings, IA3 and others end in ".default" and keep their random start.
    """
    keep_reference(policy)
    configs, is_named_otherwise = policy.peft_config, "default" not in policy.peft_config
    if is_named_otherwise:
        configs["default"] = configs[active_adapter(policy)]  # TRL looks it up
    shadowed: dict[str, Any] = {
        "add_adapter": lambda *_: None,
        "get_parameter": lambda key: torch.empty_like(
            nn.Module.get_parameter(policy, key.replace(f".{REF_ADAPTER}.", ".default."))
        ),
    }
    try:
        with swapped(policy, **shadowed):
            yield
    finally:
        if is_named_otherwise:
            del configs["default"]
    match_reference(policy)  # TRL casts the trained one to bf16 where the base is quantised
