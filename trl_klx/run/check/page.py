"""What a dry run prints, in plain lines."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from transformers.training_args import TrainingArguments

from ...config.options import KLArguments
from ..recipe.algorithm import PROMPT_TOKENS, Algorithm
from ..recipe.arguments import Recipe, RunArguments
from .layout import Layout
from .memory import Memory, Models

_GIB = 2**30
_NOT_SHOWN = {"dry_run", "accelerate_config", "num_processes"}


def configuration(recipe: Recipe) -> list[tuple[str, str]]:
    """Every field that is not at its default, and every KL field, as (name, value)."""
    shown = []
    kl_fields = {f.name for f in dataclasses.fields(KLArguments)} | {recipe.args.kl_coef_name}
    for part in recipe:
        defaults = type(part)() if isinstance(part, RunArguments) else _defaults(part)
        for f in dataclasses.fields(part):
            value = getattr(part, f.name, None)
            if f.name in _NOT_SHOWN or (f.name.endswith("token") and "hub" in f.name):
                continue
            if f.name in kl_fields or value != getattr(defaults, f.name, None):
                shown.append((f.name, str(getattr(value, "value", value))))
    return sorted(shown, key=lambda pair: (pair[0] not in kl_fields, pair[0]))


def _defaults(part: Any) -> Any:
    """The same class with nothing set; a trainer's config would not be made without a GPU."""
    on_cpu = {"use_cpu": part.use_cpu} if isinstance(part, TrainingArguments) else {}
    return type(part)(**on_cpu)


def counts(models: Models) -> Iterator[str]:
    """Parameters of every model."""
    policy = models.policy
    share = 100 * policy.trainable / policy.parameters
    packed = f", those below the adapter in {policy.bits} bits" if policy.bits else ""
    yield f"policy {policy.parameters:,} parameters, {policy.trainable:,} trained ({share:.3g} %){packed}"
    if models.value is not None:
        yield f"value model {models.value.parameters:,} parameters, all trained"
    if models.reward is not None:
        yield f"reward model {models.reward.parameters:,} parameters"
    if models.reference is not None:
        yield f"reference {models.reference.parameters:,} parameters"
    elif policy.trainable < policy.parameters:
        yield "reference: the policy without its adapter"


def memory_table(memory: Memory, layout: Layout) -> Table:
    """The parts of the memory estimate."""
    table = Table("memory of one process", "GiB", "how it is known", "when", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = "right"
    for part in memory.parts:
        table.add_row(part.name, f"{part.bytes / _GIB:.2f}", part.how, part.when)
    table.add_row("peak", f"{memory.peak / _GIB:.2f}", "", layout.name)
    return table


def memory_sentence(memory: Memory, *, use_cpu: bool = False) -> str:
    """The estimate in one sentence: what a device must have."""
    if use_cpu:
        return f"about {memory.peak / _GIB:.1f} GiB per process"
    text = f"about {memory.peak / _GIB:.0f} GiB per GPU"
    if not memory.vllm_share:
        return text
    share = memory.vllm_share
    return f"{text} beside vLLM's {100 * share:.0f} %, so a GPU of {math.ceil(memory.device / _GIB)} GiB or more"


def assumptions(algorithm: Algorithm) -> str:
    """What the estimate rests on."""
    text = (
        "exact: counted; formula: as ZeRO shares it out; estimate: depends on kernels and lengths, compared with two "
        "runs on one GPU."
    )
    if algorithm.rows.is_pairs:
        return text
    return f"{text} Prompts are taken to have {PROMPT_TOKENS} tokens, answers the longest."


def batches(algorithm: Algorithm, args: Any, layout: Layout, rows: int | None) -> Iterator[str]:
    """Prompts, answers and optimizer steps: the arithmetic of the batch."""
    found = algorithm.batches(args, layout.processes)
    yield from found.lines
    if rows is None:
        yield "the number of rows in the dataset is not known: steps per epoch unknown"
        return
    whole = math.ceil(rows / found.rows) if found.uses_rest else rows // found.rows
    per_epoch = max(1, whole) * found.steps
    if args.max_steps > 0:
        epochs = args.max_steps / per_epoch
        shown = f"{epochs:.2g}" if epochs < 10 else f"{epochs:.0f}"
        yield f"{rows} rows: {per_epoch:g} steps per epoch; max_steps={args.max_steps} is {shown} epochs"
    else:
        total = math.ceil(per_epoch * args.num_train_epochs)
        yield f"{rows} rows: {per_epoch:g} steps per epoch, {total} in all"
