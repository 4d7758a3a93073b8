"""The models of a recipe on the meta device: the real modules, without their weights."""

import warnings
from collections.abc import Iterator
from inspect import signature

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from trl import get_peft_config

from .arguments import BadInput, Recipe

# What `from_pretrained` takes beside its named parameters and the fields of the model's config (transformers 5.23).
_LOADING = (
    *("adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "device_map"),
    *("device_mesh", "distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file"),
    *("kernel_config", "key_mapping", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder"),
    *("offload_state_dict", "proxies", "quantization_config", "state_dict", "subfolder", "torch_dtype", "tp_plan"),
    *("tp_size", "tqdm_class", "trust_remote_code", "use_kernels", "variant"),
)


def policy_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The architecture that the checkpoint names, as TRL chooses it. Raises BadInput where transformers has none."""
    names = config.architectures or [""]
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise BadInput(
            f"the model's architecture {names[0]!r} is not transformers' own: its parameters are not counted."
        )
    with torch.device("meta"):
        return architecture._from_config(config, dtype=dtype)


def classifier_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A sequence classifier with one output on the model's backbone."""
    config.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def with_adapter(module: nn.Module, recipe: Recipe) -> nn.Module:
    """The module with the recipe's adapter. Raises BadInput where that fits no layer."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(module, get_peft_config(recipe.model))  # type: ignore[arg-type]
    except ValueError as error:
        targets = recipe.model.lora_target_modules
        raise BadInput(
            f"lora_target_modules={targets} fits no layer of the model: name some, or [all-linear]."
        ) from error


def policy_problems(recipe: Recipe) -> Iterator[str]:
    """Sentences about keywords that the policy's model does not know, and an adapter that fits none of its layers."""
    args, model = recipe.args, recipe.model
    given = dict(getattr(args, "model_init_kwargs", None) or {})
    if model.model_name_or_path is None or given.get("trust_remote_code") or getattr(args, "trust_remote_code", False):
        return  # the model's own code may take anything
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    except (OSError, ValueError):  # `check_model` says so
        return
    known = (*_LOADING, *signature(PreTrainedModel.from_pretrained).parameters, *config.to_dict())
    for name in given:
        if name not in known:
            yield (
                f"model_init_kwargs gives {name}={given[name]!r}, which neither from_pretrained nor the config of "
                f"{model.model_name_or_path!r} knows: remove it."
            )
    if model.use_peft:
        try:
            module = policy_on_meta(config, torch.float32)
        except BadInput:
            return
        try:
            with_adapter(module, recipe)
        except BadInput as error:
            yield str(error)
