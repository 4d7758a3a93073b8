"""What a PPO trainer starts from: its arguments checked, its models loaded, its rewards and its prompts."""

import copy
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path

from ..checks.inputs import check_inputs, check_lengths
from ..checks.loading import loading_arguments
from ..checks.quantised import NO_VALUE_MODEL, bits_of
from ..checks.rows import PROMPTS_OR_TOKENS
from ..checks.start import check_start
from ..checks.vocabulary import check_vocabularies, vocabulary_size, with_known_padding
from ..reference.adapters import active_adapter, check_fresh_adapter, keep_reference
from ..rewarding.functions import RewardFunctions
from ..rewarding.gold import check_gold_reward
from ..rewarding.models import loaded_rewards
from ..session.groups import group_names
from .config import KLXPPOConfig, as_dict
from .model import PolicyAndValue, value_model_of
from .prompts import PromptReader

Model = PreTrainedModel | str  # by itself, or by its path


@dataclass(frozen=True)
class Given:
    """Models and rewards as the trainer's user gives them."""

    processing_class: PreTrainedTokenizerBase | None
    model: Model | None
    ref_model: Model | None
    value_model: Model | None
    reward_model: Model | None
    peft_config: PeftConfig | None
    quantization_config: Any
    reward_funcs: Any
    reward_processing_classes: Any
    gold_reward_func: Any


@dataclass(frozen=True)
class Prepared:
    """What `KLXPPOTrainer` is made from."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptReader
    model: PolicyAndValue
    reference: PreTrainedModel | None  # None: the policy without its adapter, or none needed
    rewards: RewardFunctions
    kl_groups: tuple[str, ...]


def prepare(args: KLXPPOConfig, given: Given, datasets: tuple[Any, Any], *, more_columns: bool) -> Prepared:
    """Check what a trainer was given, datasets for training and evaluation included, and load what has only a path.

    `more_columns`: whether a rollout function gives the rewards more columns than the datasets have.

    Raises:
        TypeError: `args` is not a `KLXPPOConfig`.
        ValueError: something is missing, or cannot be used.
    """
    model = _checked(args, given, datasets[0])
    rewards = [*_as_list(given.reward_funcs), *_as_list(given.reward_model)]
    check_inputs(PROMPTS_OR_TOKENS, args, *datasets, rewards, more=more_columns)
    kl_groups = group_names(args, *datasets)
    check_gold_reward(args, given.gold_reward_func)
    tokenizer = check_start(args, **vars(given))
    loading = loading_arguments(as_dict(args.model_init_kwargs))
    quantized = {"quantization_config": given.quantization_config} if given.quantization_config is not None else {}
    for_policy = {**loading, **quantized}
    base = _loaded(model, for_policy)
    for name in ("revision", "quantization_config"):  # the policy's own
        loading.pop(name, None)
    padding, vocabulary = tokenizer.pad_token_id, vocabulary_size(base)
    tokenizer = with_known_padding(tokenizer, vocabulary, "the policy")
    template = as_dict(args.chat_template_kwargs) or {}
    prompts = PromptReader(tokenizer, template, padding, vocabulary)
    prompts.check_first(*datasets)
    check_lengths(PROMPTS_OR_TOKENS, args, *datasets, tokenizer, base.config)
    read_by = _as_list(given.reward_processing_classes) + [None] * len(_as_list(given.reward_model))
    tokenizers = None if given.reward_processing_classes is None else read_by
    functions = RewardFunctions(loaded_rewards(rewards, loading), args.reward_weights, tokenizers, tokenizer, template)
    path = model if isinstance(model, str) else None
    value = value_model_of(base, given.value_model, path, loading, tokenizer)  # before an adapter is put on
    policy = _with_adapter(base, args, given.peft_config, copied=args.kl_is_measured and given.ref_model is None)
    reference = None
    if args.kl_is_measured and given.ref_model is not None:
        reference = _loaded(given.ref_model, loading)
        check_vocabularies(base, reference, "reference")
    elif args.kl_is_measured:
        reference = _copy_of(policy, path, for_policy)
    return Prepared(tokenizer, prompts, PolicyAndValue(policy, value), reference, functions, kl_groups)


def _checked(args: Any, given: Given, train_dataset: Any) -> Model:
    """The policy, or its path; refuses what cannot be meant."""
    if not isinstance(args, KLXPPOConfig):
        raise TypeError(f"args is a {type(args).__name__}: KLXPPOTrainer takes a KLXPPOConfig.")
    if given.model is None:
        raise ValueError("model is missing: pass the policy, or its path.")
    if train_dataset is None:
        raise ValueError("train_dataset is missing: pass a dataset with a column 'prompt'.")
    if bits_of(given.quantization_config) and given.value_model is None:
        raise ValueError(NO_VALUE_MODEL.format("value_model"))
    if isinstance(given.model, nn.Module) and given.ref_model is given.model:
        raise ValueError("ref_model is the policy itself: leave it out, and a copy of the policy is made.")
    if isinstance(given.value_model, nn.Module) and given.value_model is given.reward_model:
        raise ValueError("value_model is the reward model itself, which training would change: pass a copy of it.")
    return given.model


def _loaded(model: Model, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    return create_model_from_path(model, **init_kwargs) if isinstance(model, str) else model


def _with_adapter(
    policy: PreTrainedModel, args: KLXPPOConfig, peft_config: PeftConfig | None, *, copied: bool
) -> PreTrainedModel:
    """Put the fresh adapter of `peft_config` on the policy, or prepare those that it came with.

    `copied`: whether the policy is also the reference: without its fresh adapter, or with a copy of the one it came
    with, unless `ref_adapter_name` names another.
    """
    if peft_config is not None:
        if isinstance(policy, PeftModel):
            raise ValueError(
                "the policy is a PeftModel already and peft_config was given too: merge its adapter first, or leave "
                "peft_config out to train the adapter it has."
            )
        if copied:
            check_fresh_adapter(peft_config)
        adapted: Any = get_peft_model(policy, peft_config)
        return adapted
    if not isinstance(policy, PeftModel):
        return policy
    trained, reference = args.model_adapter_name, args.ref_adapter_name
    for option, name in (("model_adapter_name", trained), ("ref_adapter_name", reference)):
        if name is not None and name not in policy.peft_config:
            raise ValueError(f"{option}={name!r} is not one of the policy's adapters, {', '.join(policy.peft_config)}.")
    if trained is not None:
        policy.set_adapter(trained)
    if reference is not None and args.sync_ref_model:
        raise ValueError(
            f"ref_adapter_name={reference!r} is a reference that stays and sync_ref_model=true moves one: remove one "
            "of the two; without ref_adapter_name a copy of the trained adapter is moved."
        )
    if reference == active_adapter(policy):
        raise ValueError(
            f"ref_adapter_name={reference!r} is the adapter that is trained: load it once more by another name."
        )
    if reference is None and copied:
        keep_reference(policy)
    return policy


def _copy_of(policy: PreTrainedModel, path: str | None, init_kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """A frozen copy of the policy as it is now; None where the policy without its adapter serves.

    ZeRO-3 shards the policy, so that it cannot be copied: there it is loaded a second time from its `path`.

    Raises:
        ValueError: under ZeRO-3, where the policy was given in memory.
    """
    if isinstance(policy, PeftModel):
        return None
    if is_deepspeed_zero3_enabled():
        if path is None:
            raise ValueError("ZeRO-3 shards a policy in memory, so it cannot be copied: pass ref_model, or a path.")
        return _loaded(path, init_kwargs).requires_grad_(False).eval()
    return copy.deepcopy(policy).requires_grad_(False).eval()


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
