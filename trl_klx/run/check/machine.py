"""What this machine lacks for a recipe: the Hub, devices, packages, permissions, space."""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token

from ...trainers.checks.begins import earlier_run, lost_steps, starts_one
from ...trainers.checks.packages import DEEPSPEED
from ..recipe.arguments import Recipe
from ..sources.named_models import classifier_paths
from .layout import Layout
from .memory import Models, optimizer_bytes

_SECONDS = 5.0  # that the Hub may take to answer


def unreachable(recipe: Recipe) -> str | None:
    """A sentence where the recipe names what is on the Hub, and that does not answer.

    It is asked once: the Hub's own client tries each missing file for minutes.
    """
    paths = [*recipe.run.dataset_names, recipe.model.model_name_or_path, *classifier_paths(recipe).values()]
    names = [path for path in paths if path and not path.startswith((".", "/", "runs/")) and not Path(path).exists()]
    if not names or constants.is_offline_mode():
        return None
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_SECONDS).close()
    except urllib.error.HTTPError:  # it answers, with whatever
        return None
    except (OSError, ValueError):
        named = ", ".join(names)
        return f"{constants.ENDPOINT} cannot be reached, and only what is cached of {named} was looked at."
    return None


def check_machine(recipe: Recipe, layout: Layout, *, on_cpu: bool) -> Iterator[str]:
    """Sentences about what is missing here; `on_cpu` tells whether the recipe itself asks for the CPU."""
    args = recipe.args
    devices = torch.cuda.device_count()
    if layout.processes > 1 and not on_cpu and devices < layout.processes:
        yield f"{layout.source} wants {layout.processes} processes, one per GPU, and this machine has {devices}."
    started = int(os.environ.get("WORLD_SIZE", layout.processes))
    if started != layout.processes:
        yield f"{started} processes were started and {layout.source} is for {layout.processes}."
    if args.bf16 and not on_cpu and not (devices and torch.cuda.is_bf16_supported()):
        yield "bf16=true needs a GPU with bf16, and this machine has none: run it elsewhere, or set bf16 to false."
    if layout.kind == "DEEPSPEED" and not DEEPSPEED.is_there:
        yield f"{layout.source} needs DeepSpeed, which is not installed: pip install {DEEPSPEED.pip}."
    if args.push_to_hub and args.hub_token is None and get_token() is None:
        yield "push_to_hub=true needs a token: run `hf auth login`, or set HF_TOKEN."


def run_warnings(recipe: Recipe, layout: Layout, models: Models | None) -> Iterator[str]:
    """Sentences about what a run here does nevertheless: most of them it is warned of itself as it begins."""
    args = recipe.args
    if layout.not_started:
        yield starts_one(layout.source, layout.processes + layout.not_started)
    if args.resume_from_checkpoint is None:
        yield from filter(None, [earlier_run(args.output_dir)])
    if models is None:
        return
    parts = [models.policy] if models.value is None else [models.policy, models.value]
    trains_16_bits = any(part.trainable and part.trainable_bytes == 2 * part.trainable for part in parts)
    if trains_16_bits and not layout.shards_optimizer:
        dtype = "bfloat16" if models.policy.bits else str(recipe.model.dtype)
        yield from filter(None, [lost_steps(dtype, args.learning_rate, is_quantised=models.policy.bits > 0)])
    yield from _space(args, models, adapter_only=bool(recipe.model.use_peft))


def _space(args: Any, models: Models, *, adapter_only: bool) -> Iterator[str]:
    needed = checkpoint_bytes(args, models, adapter_only=adapter_only)
    free = shutil.disk_usage(_existing(Path(args.output_dir))).free
    if needed > free:
        yield (
            f"a checkpoint takes about {needed / 2**30:.1f} GiB and the disk of output_dir has {free / 2**30:.1f} GiB "
            "free: make room, or set save_only_model."
        )


def checkpoint_bytes(args: Any, models: Models, *, adapter_only: bool) -> int:
    """The size of what the run keeps at once: its checkpoints (one more while it is written) and the final model."""
    policy = models.policy
    model = policy.trainable_bytes if adapter_only else policy.bytes
    one = model + (models.value.bytes if models.value else 0)
    if args.sync_ref_model:
        one += policy.trainable_bytes if adapter_only else policy.bytes  # the reference, which has moved
    if not args.save_only_model:
        one += optimizer_bytes(models.trained, args.optim)
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return model
    return model + one * ((args.save_total_limit or 1) + 1)


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
