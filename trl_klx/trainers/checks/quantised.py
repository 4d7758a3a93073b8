"""Quantised policies (QLoRA): only an adapter on them can be trained, and the reference is the policy without it."""

from typing import Any

from transformers import PreTrainedModel

_FLAGS = {"load_in_4bit": 4, "load_in_8bit": 8}
NO_VALUE_MODEL = "the policy is quantised, and no value model can be copied from it: give {}."


def bits_of(settings: Any) -> int:
    """4 or 8, by a `quantization_config` of bitsandbytes: an object, or a mapping as in a config.json; 0 by others."""
    given = settings if isinstance(settings, dict) else {n: getattr(settings, n, False) for n in _FLAGS}
    return next((bits for name, bits in _FLAGS.items() if given.get(name)), 0)


def without_adapter(policy: str, remedy: str) -> str:
    """The sentence about a quantised policy that is to be trained itself."""
    return f"{policy} is quantised, and no step can change such weights: {remedy}, to train an adapter on them."


def check_adapter(model: Any, quantization_config: Any, peft_config: Any) -> None:
    """Refuse a policy that is quantised and gets no adapter: before it is loaded, where `model` is its path.

    Raises:
        ValueError: with what to pass.
    """
    if peft_config is not None:
        return
    bits = bits_of(quantization_config) if isinstance(model, str) else 0
    if bits:
        raise ValueError(without_adapter(f"the policy of load_in_{bits}bit=True", "pass a peft_config"))
    # `is_quantized` is set on quantised models only; the other by `model.add_adapter`.
    is_bare = isinstance(model, PreTrainedModel) and not vars(model).get("_hf_peft_config_loaded")
    if is_bare and getattr(model, "is_quantized", False):
        raise ValueError(without_adapter("model", "pass a peft_config"))
