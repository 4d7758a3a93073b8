"""What a single field may hold: its annotation's type, a value that exists, a number within its range.

A recipe's YAML can give any type to any field, and TRL's parser and dataclasses enforce none. Text that spells a number
or a truth value is taken as one, as on a command line: YAML reads 1e-5 as text.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..recipe_files import truth
from .choices import check_number, unknown

Choices = Mapping[str, Collection[Any]]

# What YAML can give; objects that only Python can give are the caller's business.
_YAML = (bool, int, float, str, list, tuple, dict, datetime.date, NoneType)
_YAML_READS = ", because YAML reads a bare yes, no, on or off as true or false"

# Numbers by their range; a round bracket leaves the bound out. Of the KL's, then of TRL's and transformers'.
RANGES = {
    "(0, inf)": "kl_target kl_horizon kl_coef_min kl_coef_max kl_coef_end kl_is_cap kl_value_cap kl_budget"
    " kl_sampler_target kl_step_limit"
    " temperature repetition_penalty delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_k_neg"
    " vespo_lambda_pos vespo_lambda_neg discopop_tau logging_steps vllm_server_timeout cliprange cliprange_value"
    " vllm_importance_sampling_clip_max vllm_importance_sampling_cap missing_eos_penalty lora_alpha num_train_epochs",
    "[0, inf)": "kl_kp kl_ki max_skipped_steps"
    " learning_rate weight_decay adam_epsilon epsilon epsilon_high router_aux_loss_coef neftune_noise_alpha"
    " warmup_steps eval_delay save_steps eval_steps vllm_importance_sampling_clip_min entropy_coef entropy_coef_min"
    " entropy_coef_max entropy_coef_delta entropy_target vf_coef num_sample_generations dataloader_num_workers"
    " save_total_limit num_completions_to_print max_tool_calling_iterations stop_token_id off_policy_mask_threshold",
    "[0, inf]": "max_grad_norm",
    "(0, 1]": "kl_gain_min top_p vllm_gpu_memory_utilization",
    "[0, 1)": "adam_beta1 adam_beta2 lora_dropout label_smoothing_factor",
    "[0, 1]": "min_p ld_alpha top_entropy_quantile ref_model_mixup_alpha gamma lam",
    "(0, 1)": "test_split_size kl_is_veto",
    "[0, 0.5]": "label_smoothing",
    "[1, inf)": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
    " num_generations_eval max_completion_length generation_batch_size steps_per_generation num_iterations lora_r"
    " vllm_tensor_parallel_size vllm_max_model_length pad_to_multiple_of max_length precompute_ref_batch_size"
    " dataset_num_proc eval_accumulation_steps torch_empty_cache_steps ddp_bucket_cap_mb ddp_timeout"
    " dataloader_prefetch_factor num_mini_batches num_ppo_epochs response_length local_rollout_forward_batch_size"
    " total_episodes ref_model_sync_steps num_processes",
    "(1, inf)": "kl_is_answer_cap",
    "[2, inf)": "num_generations",
    "[-1, inf)": "top_k",
    "[0, 4294967295]": "seed data_seed",
    "[1, 65535]": "vllm_server_port vllm_group_port",
}
_RANGE_OF = {name: bounds for bounds, names in RANGES.items() for name in names.split()}
# From 1 on a number of steps, below it a share of the run.
_STEPS_OR_SHARE = ("logging_steps", "save_steps", "eval_steps", "warmup_steps")
# Texts for which a truth value means something of its own.
_TEXT_OR_TRUTH = ("resume_from_checkpoint",)
# Lists for which one text means something of its own.
_TEXT_OR_LIST = ("lora_target_modules", "kl_monitor")
_MAY_BE_EMPTY = ("kl_monitor",)
# Mappings that transformers also reads from a file.
_MAPPINGS_OR_PATHS = ("accelerator_config", "fsdp_config", "deepspeed")


def convert(args: Any, choices: Choices | None = None) -> dict[str, str]:
    """Give every field of a dataclass a value of its type: text that spells a number, a truth value or JSON as such.

    Args:
        args: the dataclass.
        choices: the values of fields whose annotation does not name them; a mapping resolves other spellings.

    Returns:
        A sentence for each field with a value that it cannot hold, which falls back to its default.
    """
    kinds_of = field_kinds(type(args))
    refused = {}
    for field in dataclasses.fields(args):
        given = getattr(args, field.name)
        if not field.init or not isinstance(given, _YAML) or isinstance(given, Enum):
            continue
        try:
            value = _converted(field, kinds_of[field.name], given, (choices or {}).get(field.name))
        except ValueError as error:
            refused[field.name] = str(error)
            value = default_of(field)
        if value is not given:
            setattr(args, field.name, value)
    return refused


def field_kinds(dataclass: type) -> dict[str, tuple]:
    """The types that each field takes. (TRL's parser changes those that the fields themselves name.)"""
    return {name: _kinds(hint) for name, hint in get_type_hints(dataclass).items()}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, made where it has a factory; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _converted(field: dataclasses.Field, kinds: tuple, given: Any, choices: Collection[Any] | None) -> Any:
    """A value as its field holds it. Raises ValueError where the field cannot."""
    name = field.name
    allowed = choices or _choices(field, kinds)
    # TRL's parser forgets the default of a list that is not made by a factory.
    forgotten = field.default is not dataclasses.MISSING and any(map(is_list, kinds))
    if given is None and (NoneType in kinds or field.default is None or forgotten):
        return None
    if dict in kinds:
        return given if name in _MAPPINGS_OR_PATHS else _mapping(name, given)
    if allowed and not isinstance(given, list) and (str in kinds or not any(map(is_list, kinds))):
        chosen = next((choice for choice in allowed if given is choice or given == choice), allowed)
        if chosen is allowed:
            quotes = f" Put it in quotes{_YAML_READS}." if isinstance(given, bool) else ""
            raise ValueError(unknown(name, given, allowed) + quotes)
        return allowed[chosen] if isinstance(allowed, Mapping) else given
    value = _taken_as(name, given, kinds)
    if isinstance(value, list) and allowed:
        for item in value or [None] * (name not in _MAY_BE_EMPTY):
            if item not in allowed:
                raise ValueError(unknown(name, item, allowed))
        value = [allowed[item] for item in value] if isinstance(allowed, Mapping) else value
    if isinstance(value, list) and not all(math.isfinite(item) for item in value if isinstance(item, float)):
        raise ValueError(_misfit(name, given, kinds))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(name, value)
    return value


def _mapping(name: str, given: Any) -> Any:
    """A mapping; on a command line it is JSON."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except ValueError as error:
            raise ValueError(f'{name}={given!r} is not JSON: write {{"key": value}}.') from error
    if not isinstance(value, dict) and name != "kl_group_targets":  # which has a rule with a fuller message
        raise ValueError(f"{name}={given!r} must be a mapping: write one in YAML, or as JSON on a command line.")
    return value


def _kinds(hint: Any) -> tuple:
    """The members of a union, without what they hold: list of list[str]."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(
        member if get_origin(member) in (list, Literal) else get_origin(member) or member for member in members
    )


def _choices(field: dataclasses.Field, kinds: tuple) -> tuple:
    """The values that a field's metadata or an enumeration in its annotation names."""
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    return tuple(field.metadata.get("choices") or [member.value for kind in enums for member in kind])


def _taken_as(name: str, given: Any, kinds: tuple) -> Any:
    """The value under the first type that takes it. Raises ValueError where none does."""
    for kind in kinds:
        if get_origin(kind) is Literal:
            if any(given is choice for choice in get_args(kind)):
                return given
        elif get_origin(kind) is list or kind is list:
            if isinstance(given, (list, tuple)):
                with suppress(ValueError):
                    return [_taken_as(name, item, get_args(kind) or (str,)) for item in given]
            if isinstance(given, str) and given and str not in kinds and dict not in get_args(kind):
                return given if name in _TEXT_OR_LIST else [_taken_as(name, given, get_args(kind))]
        elif kind is dict and isinstance(given, dict):
            return given
        elif kind is bool and (value := truth(given)) is not None:
            return value
        elif kind in (int, float) and (number := _number(given, kind)) is not None:
            return number
        elif kind is str and (isinstance(given, str) or (name in _TEXT_OR_TRUTH and isinstance(given, bool))):
            return given
    raise ValueError(_misfit(name, given, kinds))


def _number(given: Any, kind: type) -> int | float | None:
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    try:
        number = given if isinstance(given, (int, float)) else float(given) if kind is float else int(given)
    except ValueError:
        return None
    if kind is int and isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def _misfit(name: str, given: Any, kinds: tuple) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    plurals = {float: "finite numbers", str: "texts", dict: "mappings"}
    lists = [f"a list of {plurals.get((get_args(kind) or (str,))[0], 'values')}" for kind in kinds if is_list(kind)]
    wanted = " or ".join([*(names[kind] for kind in kinds if kind in names), *lists]) or "a value that it can hold"
    remedy = ": give it a value, or remove the field" if given is None else ""
    if str in kinds and isinstance(given, (bool, int, float, datetime.date)):
        remedy = f": put it in quotes{_YAML_READS * isinstance(given, bool)}"
    return f"{name}={given!r} must be {wanted}{remedy}."


def is_list(kind: Any) -> bool:
    """Whether a type among a field's kinds is a list."""
    return kind is list or get_origin(kind) is list


def number_problem(name: str, value: Any) -> str | None:
    """What is wrong with a number that stands under a field's name elsewhere, in `generation_kwargs` for one."""
    if name not in _RANGE_OF or value is None:
        return None
    try:
        _check_range(name, value)
    except ValueError as error:
        return str(error)
    return None


def _check_range(name: str, value: float) -> None:
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"max_steps={value} must be at least 1, or -1 to train for num_train_epochs.")
    bounds = _RANGE_OF.get(name, "(-inf, inf)")
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    if not (bounds[-1] == "]" and value == high == math.inf):
        check_number(name, value)
    above = value > low or (bounds[0] == "[" and value == low)
    below = value < high or (bounds[-1] == "]" and value == high)
    if not (above and below):
        limits = [f"{'at least' if bounds[0] == '[' else 'more than'} {low:g}"]
        limits += [f"{'at most' if bounds[-1] == ']' else 'less than'} {high:g}"] * (high < math.inf)
        raise ValueError(f"{name}={value} must be a number, {' and '.join(limits)}.")
    if name in _STEPS_OR_SHARE and value > 1 and value != int(value):
        raise ValueError(f"{name}={value} must be a whole number of steps, or a share of the run below 1.")
