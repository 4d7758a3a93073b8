"""What the health alarms of a trainer read, and what is known about its reference before the first step."""

import itertools
import os
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...config.options import KLArguments
from ...monitor.health.alarms import HealthCallback, HealthSources
from ..checks.vocabulary import saved_tokenizer

# Largest KL per token before the first update that scoring explains: two forwards of one model that differ in batch,
# padding or kernel. In bf16 the log-probs of one trainer differ by 0.055 nats between a batch of 1 and of 8 (standard
# deviation, Qwen2.5-0.5B; huggingface/trl issue 6789), a KL of 0.055^2 / 2 = 0.0015; the bound is six times that. KL
# falls with the square of the rounding error: fp16, and TF32, which float32 may mean on a GPU, keep three bits more
# than bf16: a 64th, 2.4e-5. Their bounds are wider, and still close: 1e-4 is a log-ratio of 0.014.
SCORING_NOISE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}


def health_callback(
    trainer: Any,
    args: KLArguments,
    policy: nn.Module,
    *,
    gain: str,
    entropy: str,
    tokenizer: Any,
    reward_scale: float | None = None,
) -> HealthCallback:
    """The alarms of a trainer whose `kl` and `ref_model` are there.

    Args:
        trainer: the trainer.
        args: its config.
        policy: its policy, or a module that holds it.
        gain, entropy, reward_scale: see `HealthSources`.
        tokenizer: the policy's.
    """
    reference = None if trainer.ref_model is None else trainer.accelerator.unwrap_model(trainer.ref_model)
    models = [policy] if reference is None else [policy, reference]
    precision = coarsest_precision(models, trainer.accelerator)
    mismatches: list[str] = []
    if reference is not None:
        mismatches = reference_mismatches(policy.config, reference.config, tokenizer)  # type: ignore[arg-type]
    return HealthCallback(
        HealthSources(
            per_token=f"kl/{args.kl_reading}",
            target_unit=args.kl_target_unit,
            gain=gain,
            entropy=entropy,
            coef_name=args.kl_coef_name,
            noise=SCORING_NOISE[precision],
            precision=precision,
            mismatches=tuple(mismatches),
            reward_scale=reward_scale,
            coef_max=lambda: trainer.kl.coef_max,
        )
    )


def coarsest_precision(models: list[nn.Module], accelerator: Accelerator) -> str:
    """The key of `SCORING_NOISE` that parameters and autocast together explain; fp8 and the like count as bf16."""
    dtypes = {parameter.dtype for parameter in itertools.chain(*(model.parameters() for model in models))}
    mixed = {"no": "float32", "fp16": "float16"}.get(accelerator.mixed_precision, "bfloat16")
    names = {mixed, *(str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point)}
    names = {name if name in SCORING_NOISE else "bfloat16" for name in names - {"float64"}}
    return max(names, key=lambda name: SCORING_NOISE[name])


def reference_mismatches(
    policy: PreTrainedConfig, reference: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Differences of tokenizer, chat template and vocabulary between the policy and a reference of another path."""
    sizes = tuple(config.get_text_config().vocab_size for config in (policy, reference))
    path, other = (_path(config) for config in (policy, reference))
    theirs = saved_tokenizer(other) if other and other != path else None
    if theirs is None:
        if sizes[0] == sizes[1]:
            return []
        return [f"the policy's vocabulary has {sizes[0]} entries and the reference's {sizes[1]}"]
    found = []
    tokens, their_tokens = tokenizer.get_vocab(), theirs.get_vocab()
    if tokens != their_tokens:
        same = sum(their_tokens.get(token) == number for token, number in tokens.items())
        found.append(
            f"{len(tokens) - same} of the policy's {len(tokens)} tokens are different for the reference ({other})"
        )
    if tokenizer.eos_token_id != theirs.eos_token_id:
        found.append(
            f"answers end with token {tokenizer.eos_token_id}, those of the reference with {theirs.eos_token_id}"
        )
    if tokenizer.chat_template != theirs.chat_template:
        found.append(f"the reference ({other}) has another chat template")
    return found


def _path(config: PreTrainedConfig) -> str:
    return str(config._name_or_path or "").rstrip(os.sep)
