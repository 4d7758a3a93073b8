"""The models that a recipe names: what is wrong with them, and what they consist of. No weight is loaded.

Each is built once, on the meta device: its shapes are compared with the files of its weights, its parameters counted,
and an adapter tried on it.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from trl import get_peft_config

from ...trainers.checks.packages import missing_for_model
from ...trainers.checks.quantised import NO_VALUE_MODEL, bits_of, without_adapter
from ...trainers.checks.start import overwritten_checkpoints, overwritten_models
from ..recipe.arguments import BadInput, Findings, Recipe
from .data import maker
from .weights import weight_problems

POLICY, REWARDS = "model_name_or_path", ("reward_model_path", "reward_model_name_or_path")
CLASSIFIERS = (*REWARDS, "value_model_path")
# What `from_pretrained` takes beside its named parameters and the fields of the model's config (transformers 5.23).
_LOADING = (
    *("adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "device_map"),
    *("device_mesh", "distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file"),
    *("kernel_config", "key_mapping", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder"),
    *("offload_state_dict", "proxies", "quantization_config", "state_dict", "subfolder", "torch_dtype", "tp_plan"),
    *("tp_size", "tqdm_class", "trust_remote_code", "use_kernels", "variant"),
)
# Keywords under which the weights are in a folder below, or under another name: left to transformers to find.
_ELSEWHERE = ("subfolder", "variant", "gguf_file", "state_dict")


class Weights(NamedTuple):
    """Parameters of a model, and of them those that are trained; bytes as they are loaded."""

    parameters: int
    bytes: int
    trainable: int
    trainable_bytes: int
    trainable_tensors: int
    bits: int = 0  # of its linear layers, where these are quantised

    @staticmethod
    def of(module: nn.Module, *, frozen: bool = False) -> "Weights":
        """Count a module; `frozen` means that none of it is trained. Tied parameters count once."""
        every = list(module.parameters())
        trained = [p for p in every if p.requires_grad and not frozen]
        return Weights(
            sum(p.numel() for p in every),
            sum(map(_bytes, every)),
            sum(p.numel() for p in trained),
            sum(map(_bytes, trained)),
            len(trained),
        )


class NamedModels(NamedTuple):
    """What the models that a recipe names consist of; `policy` includes an adapter, `base` does not."""

    config: PreTrainedConfig  # of the policy: hidden size, layers, vocabulary
    dtype: torch.dtype
    policy: Weights
    base: Weights
    adapts_head: bool  # whether the adapter sits on the output head
    classifiers: dict[str, Weights]  # by the option that names them


def named_models(recipe: Recipe, found: Findings) -> tuple[PreTrainedConfig | None, NamedModels | None]:
    """Check every model that a recipe names; what it takes to read one is read once.

    Returns:
        The policy's config, and what the models consist of; None for what cannot be read or built.
    """
    args, model = recipe.args, recipe.model
    paths: dict[str, Any] = {POLICY: model.model_name_or_path, **classifier_paths(recipe)}
    configs = {
        option: found.ask(read_config, path, option, recipe, model.model_revision if option == POLICY else None)
        for option, path in paths.items()
    }
    packages = missing_for_model(configs[POLICY], f"{POLICY}={paths[POLICY]!r}")
    for problem in (*packages, *_quantisation(recipe, configs[POLICY]), *_folders(args, paths)):
        found.add(problem)
    loading = args.model_init_kwargs or {}
    dtype = None if configs[POLICY] is None else _dtype(model.dtype, configs[POLICY])
    modules: dict[str, nn.Module] = {}
    for option, path in paths.items():
        module = None if configs[option] is None else _on_meta(configs[option], dtype or torch.float32, option)
        if module is not None:
            modules[option] = module
        if set(loading).isdisjoint(_ELSEWHERE):
            for problem in weight_problems(path, option, configs[option], module):
                found.add(problem)
    if configs[POLICY] is None or dtype is None:
        return None, None
    for problem in _unknown_keywords(recipe, loading, configs[POLICY]):
        found.add(problem)
    if len(modules) < len(paths):
        return configs[POLICY], None
    policy = modules.pop(POLICY)
    counted = found.ask(_count, policy, modules, configs[POLICY], dtype, recipe)
    return configs[POLICY], counted


def _quantised_by(recipe: Recipe, config: PreTrainedConfig | None) -> tuple[str, Any]:
    """What quantises the policy, for a sentence, and the settings of bitsandbytes; of a policy that is not, none."""
    model, loading = recipe.model, recipe.args.model_init_kwargs or {}
    fields = {
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "bnb_4bit_use_double_quant": model.use_bnb_nested_quant,
    }
    stored = getattr(config, "quantization_config", None)
    ways = [("", fields), ("model_init_kwargs", loading.get("quantization_config")), (POLICY, stored)]
    for name, settings in ways:
        bits = bits_of(settings)
        if bits:
            return f"the policy of {name or f'load_in_{bits}bit=True'}", settings
    return "", None


def _quantisation(recipe: Recipe, config: PreTrainedConfig | None) -> Iterator[str]:
    """Sentences about a quantised policy that cannot be trained."""
    what, _ = _quantised_by(recipe, config)
    if what and not recipe.model.use_peft:
        yield without_adapter(what, "set use_peft to true")
    if what and vars(recipe.args).get("value_model_path", "") is None:
        yield NO_VALUE_MODEL.format("value_model_path")


def classifier_paths(recipe: Recipe) -> dict[str, str]:
    """The reward and value models that a recipe names, by option."""
    given = {**vars(recipe.run), **vars(recipe.args)}
    return {option: given[option] for option in CLASSIFIERS if given.get(option) is not None}


def _count(
    policy: nn.Module, others: Mapping[str, nn.Module], config: PreTrainedConfig, dtype: torch.dtype, recipe: Recipe
) -> NamedModels:
    """Count all models. Raises BadInput where the recipe's adapter fits no layer of the policy."""
    base = Weights.of(policy)
    settings = _quantised_by(recipe, config)[1]
    if bits_of(settings):
        base = base._replace(bytes=_quantised_bytes(policy, settings), bits=bits_of(settings))
    whole, adapts_head = base, False
    if recipe.model.use_peft:
        adapted = _with_adapter(policy, recipe)
        whole = Weights.of(adapted)._replace(bits=base.bits)
        if base.bits:
            whole = whole._replace(bytes=base.bytes + whole.trainable_bytes)
        adapts_head = any("lm_head" in name and p.requires_grad for name, p in adapted.named_parameters())
    classifiers = {option: Weights.of(module, frozen=option in REWARDS) for option, module in others.items()}
    return NamedModels(config, dtype, whole, base, adapts_head, classifiers)


def read_config(path: str | None, option: str, recipe: Recipe, revision: str | None) -> PreTrainedConfig:
    """The config of the model at a path, given as `option`.

    Raises:
        BadInput: it is neither a local model nor one on the Hub.
    """
    if path is None:
        raise BadInput(f"{option} is missing: give a local folder or the name of a model on the Hub.")
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusts_code(recipe))
    except (OSError, ValueError) as error:
        hint = f"run `{maker(path)}` first" if maker(path) else "check the spelling"
        raise BadInput(
            f"{option}={path!r} is neither a local folder with a config.json nor a model that can be loaded "
            f"from the Hub: {hint}."
        ) from error


def trusts_code(recipe: Recipe) -> bool:
    """Whether code that comes with a model may run."""
    loading = recipe.args.model_init_kwargs or {}
    return bool(loading.get("trust_remote_code") or getattr(recipe.args, "trust_remote_code", False))


def _folders(args: Any, paths: Mapping[str, str | None]) -> Iterator[str]:
    yield from overwritten_models(args.output_dir, paths)
    if not args.resume_from_checkpoint:
        yield from overwritten_checkpoints(args.output_dir, paths)


def _unknown_keywords(recipe: Recipe, loading: Mapping[str, Any], config: PreTrainedConfig) -> Iterator[str]:
    if trusts_code(recipe):
        return  # the model's own code may take anything
    known = (*_LOADING, *signature(PreTrainedModel.from_pretrained).parameters, *config.to_dict())
    for name in loading:
        if name not in known:
            yield (
                f"model_init_kwargs gives {name}={loading[name]!r}, which neither from_pretrained nor the config of "
                f"{recipe.model.model_name_or_path!r} knows: remove it."
            )


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, option: str) -> nn.Module | None:
    """The model that the checkpoint's config names, as TRL chooses it; None where transformers cannot build it."""
    try:
        if option in CLASSIFIERS:
            return classifier_on_meta(config, dtype)
        with torch.device("meta"):
            return getattr(transformers, (config.architectures or [""])[0])._from_config(config, dtype=dtype)
    except Exception:  # a class that is not there, or a config that it cannot be built from: loading reports it
        return None


def classifier_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A sequence classifier with one output on the model's backbone."""
    config.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _with_adapter(module: Any, recipe: Recipe) -> nn.Module:
    """The module with the recipe's adapter. Raises BadInput where that fits no layer."""
    adapter: Any = get_peft_config(recipe.model)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(module, adapter)
    except ValueError as error:
        targets = recipe.model.lora_target_modules
        raise BadInput(
            f"lora_target_modules={targets} fits no layer of the model: name some, or [all-linear]."
        ) from error


def _dtype(name: Any, config: PreTrainedConfig) -> torch.dtype:
    """The precision that weights are loaded in."""
    if name in ("auto", None):
        return getattr(config, "dtype", None) or torch.float32
    return getattr(torch, str(name))


def _quantised_bytes(module: nn.Module, settings: Any) -> int:
    """Bytes of a policy whose linear layers but the head bitsandbytes packs, with their scales; the rest as loaded.

    Of 4 bits, a float32 for each 64 weights, or (double quantisation) a byte, with a float32 for each 256 of these and
    one more; of 8 bits, a float32 for each row.
    """
    nested = settings if isinstance(settings, dict) else vars(settings)
    total = sum(map(_bytes, module.parameters()))
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear) or "lm_head" in name:
            continue
        weights, blocks = child.weight.numel(), math.ceil(child.weight.numel() / 64)
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 if nested.get("bnb_4bit_use_double_quant") else 4 * blocks
        packed = math.ceil(weights / 2) + scales if bits_of(settings) == 4 else weights + 4 * child.out_features
        total += packed - _bytes(child.weight)
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
