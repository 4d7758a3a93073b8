"""What the models of a recipe consist of, counted on the meta device: the real modules, without their weights."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from trl import get_quantization_config

from ..arguments import Recipe
from ..inputs import check_model
from ..meta_models import classifier_on_meta, policy_on_meta, with_adapter


class Weights(NamedTuple):
    """Parameters of a model, and of them those that are trained; bytes as they are loaded."""

    parameters: int
    bytes: int
    trainable: int
    trainable_bytes: int
    trainable_tensors: int

    @staticmethod
    def of(module: nn.Module, *, frozen: bool = False) -> "Weights":
        """Count a module; `frozen` says that none of it is trained. Tied parameters count once."""
        every = list(module.parameters())
        trained = [p for p in every if p.requires_grad and not frozen]
        return Weights(
            sum(p.numel() for p in every),
            sum(_bytes(p) for p in every),
            sum(p.numel() for p in trained),
            sum(_bytes(p) for p in trained),
            len(trained),
        )

    def __add__(self, other: "Weights") -> "Weights":  # type: ignore[override]
        return Weights(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Models(NamedTuple):
    """The models of a run. `policy` includes an adapter, `base` does not; None where there is no such model."""

    config: PreTrainedConfig  # of the policy: hidden size, layers, vocabulary
    policy: Weights
    base: Weights
    reference: Weights | None
    value: Weights | None
    reward: Weights | None
    adapts_head: bool  # whether the adapter sits on the output head

    @property
    def trained(self) -> Weights:
        """What the optimizer sees, and what is loaded with it."""
        return self.policy if self.value is None else self.policy + self.value


def count_models(algorithm: str, recipe: Recipe) -> Models:
    """Count the models that a recipe names; reads their configs only.

    Raises:
        BadInput: a config cannot be had, or the adapter fits no layer of the model.
    """
    args, model = recipe.args, recipe.model
    path = model.model_name_or_path
    config = read_config(path, "model_name_or_path", recipe, revision=model.model_revision)
    dtype = _dtype(model.dtype, config)
    base_module = policy_on_meta(config, dtype)
    base = Weights.of(base_module)
    quantized = get_quantization_config(model) is not None
    if quantized:
        base = base._replace(bytes=_quantized_bytes(base_module, four_bits=bool(model.load_in_4bit)))
    policy, adapts_head = base, False
    if model.use_peft:
        adapted = with_adapter(base_module, recipe)
        policy = Weights.of(adapted)
        if quantized:
            policy = policy._replace(bytes=base.bytes + policy.trainable_bytes)
        adapts_head = any("lm_head" in name and p.requires_grad for name, p in adapted.named_parameters())
    frozen = base._replace(trainable=0, trainable_bytes=0, trainable_tensors=0)
    value, reward = None, None
    if algorithm == "ppo":
        value_config = config
        if args.value_model_path:
            value_config = read_config(args.value_model_path, "value_model_path", recipe)
        value = Weights.of(classifier_on_meta(value_config, dtype))
        if args.reward_model_path:
            reward_config = read_config(args.reward_model_path, "reward_model_path", recipe)
            reward = Weights.of(classifier_on_meta(reward_config, dtype), frozen=True)
    needs_reference = _needs_reference(algorithm, args) and not model.use_peft
    return Models(config, policy, base, frozen if needs_reference else None, value, reward, adapts_head)


def read_config(path: str | None, option: str, recipe: Recipe, revision: str | None = None) -> PreTrainedConfig:
    """The config at a path, given as `option`.

    Raises:
        BadInput: it is not there.
    """
    trusts = bool(getattr(recipe.args, "trust_remote_code", False))
    check_model(path, option=option, revision=revision, trust_remote_code=trusts)
    return AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=trusts)


def _needs_reference(algorithm: str, args: Any) -> bool:
    return not args.precompute_ref_log_probs if algorithm == "dpo" else bool(args.kl_is_measured)


def _dtype(name: Any, config: PreTrainedConfig) -> torch.dtype:
    """The precision that weights are loaded in."""
    if name in ("auto", None):
        return getattr(config, "dtype", None) or torch.float32
    return getattr(torch, str(name))


def _quantized_bytes(module: nn.Module, *, four_bits: bool) -> int:
    """Linear layers in 4 or 8 bits with their scales (one float32 per 64 weights, or per row), the rest as loaded."""
    total = 0
    for name, child in module.named_modules():
        own = sum(_bytes(p) for p in child.parameters(recurse=False))
        if isinstance(child, nn.Linear) and "lm_head" not in name:
            weights = child.weight.numel()
            own += (weights // 2 + weights // 16 if four_bits else weights + 4 * child.out_features) - _bytes(
                child.weight
            )
        total += own
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
