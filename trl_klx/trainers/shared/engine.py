"""What becomes of answers that an inference engine sampled: how far it is away, and the ratio that corrects them.

`old_logps` are the trainer's own scores of the policy that sampled, `engine_logps` those that the engine reports of the
same tokens, NaN where it has none. Shape legend: B answers, T tokens of an answer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kl import fill_masked, kl_estimate
from ...kl.sampling import bounded_ratios


class Cut(NamedTuple):
    """How many of TRL's ratios of policy to engine are out of bounds; scalars."""

    outside: Tensor
    all: Tensor


def with_trainers(engine_logps: Tensor, old_logps: Tensor) -> Tensor:
    """(B, T) log-probs of the engine; the trainer's where it has none."""
    return torch.where(engine_logps.isnan(), old_logps, engine_logps)


def engine_kl(old_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) k3 of KL(engine || trainer) in nats, and the tokens of `mask` that the engine has scored."""
    scored = mask.bool() & ~engine_logps.isnan()
    return fill_masked(kl_estimate(engine_logps, old_logps, "k3"), scored), scored


def policy_ratio(old_logps: Tensor, engine_logps: Tensor, mask: Tensor, args: Any) -> Tensor:
    """(B, T) ratio of policy to engine by which TRL multiplies the policy's loss: `vllm_importance_sampling_mode`.

    1 where a token has no log-prob of the engine's, and without `vllm_importance_sampling_correction`. Source: TRL's
    `GRPOTrainer`.
    """
    mode = args.vllm_importance_sampling_mode if args.vllm_importance_sampling_correction else "off"
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    return bounded_ratios(_log_ratios(old_logps, engine_logps, mask), mode, low=low, high=high)


def cut_ratios(old_logps: Tensor, engine_logps: Tensor, mask: Tensor, args: Any) -> Cut:
    """Ratios beyond `vllm_importance_sampling_clip_min` and `_max`, which are clipped or set to 0.

    Of answers in the sequence modes, of tokens in the others. A token that the engine could not score has the ratio 1.
    """
    log_ratios, counted = _log_ratios(old_logps, engine_logps, mask), mask.bool()
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        log_ratios, counted = log_ratios.sum(-1), counted.any(-1)
    ratios, outside = log_ratios.exp(), torch.zeros_like(counted)
    if args.vllm_importance_sampling_clip_max is not None:
        outside = outside | (ratios > args.vllm_importance_sampling_clip_max)
    if args.vllm_importance_sampling_clip_min is not None:
        outside = outside | (ratios < args.vllm_importance_sampling_clip_min)
    return Cut((outside & counted).sum(), counted.sum())


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Their product, and 0 where the weight is, whatever the value: what the policy never does does not count."""
    return torch.where(weights == 0, 0.0, weights * values)


def _log_ratios(old_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    return fill_masked(old_logps - engine_logps, mask.bool() & ~engine_logps.isnan())
