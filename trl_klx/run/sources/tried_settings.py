"""Settings whose values only transformers, torch and peft know, tried out on one weight before a model is loaded."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import get_peft_config

from ...config.choices import unknown
from ...config.types import number_problem
from ..recipe.arguments import Recipe

# The optimizers that need neither another package nor the model.
_PLAIN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_STORAGE = ("uint8", "bfloat16", "float16", "float32", "float64", "int8")  # as BitsAndBytesConfig takes it


def setting_problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for each setting of optimizer, schedule, sampling, attention, adapter or trackers that cannot work."""
    args, model = recipe.args, recipe.model
    yield from _optimizer(args)
    yield from _sampling(args)
    yield from _checkpointing(args)
    attention = model.attn_implementation
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if attention is not None and "/" not in attention and attention.removeprefix("paged|") not in known:
        yield unknown("attn_implementation", attention, known)
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            yield unknown("report_to", name, tuple(INTEGRATION_TO_CALLBACK))
    if model.bnb_4bit_quant_storage not in (None, *_STORAGE):
        yield unknown("bnb_4bit_quant_storage", model.bnb_4bit_quant_storage, _STORAGE)
    if model.load_in_4bit and model.dtype in ("auto", None):
        yield f"load_in_4bit=True computes in dtype, and dtype={model.dtype!r} names none: set it to bfloat16."
    try:
        get_peft_config(model)
    except (ValueError, TypeError) as error:
        yield f"use_peft=true does not work with these lora_ fields ({error})."


def _optimizer(args: Any) -> Iterator[str]:
    weight = torch.nn.Parameter(torch.zeros(1))
    kind = str(getattr(args.optim, "value", args.optim))
    if args.optim_args and kind in _PLAIN:
        yield f"optim_args={args.optim_args!r} has no effect with optim={kind!r}: remove it."
        return
    try:
        make, settings = Trainer.get_optimizer_cls_and_kwargs(args) if kind in _PLAIN else (torch.optim.AdamW, {})
        make([weight], **settings)
    except (ValueError, TypeError) as error:
        yield f"optim={kind!r} cannot work ({error})."
        return
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_kwargs and kind in ("constant", "constant_with_warmup"):
        yield f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} has no effect with {kind!r}: remove it."
        return
    try:
        get_scheduler(
            kind,
            optimizer=make([weight], **settings),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, AssertionError) as error:
        yield f"lr_scheduler_type={kind!r} cannot work with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} ({error})."


def _checkpointing(args: Any) -> Iterator[str]:
    known = (*signature(checkpoint).parameters, "preserve_rng_state")
    for name in args.gradient_checkpointing_kwargs or {}:
        if name not in known:
            yield unknown("gradient_checkpointing_kwargs", name, known)


def _sampling(args: Any) -> Iterator[str]:
    for name, value in (getattr(args, "generation_kwargs", None) or {}).items():
        if problem := number_problem(name, value):
            yield f"generation_kwargs: {problem}"
