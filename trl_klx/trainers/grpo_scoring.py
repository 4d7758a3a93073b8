"""What one scoring pass of TRL gives, and which tensors of a GRPO batch mean what. Shapes as in `grpo`."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Model inputs of vision-language models that TRL carries from the rollout to the loss.
VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass
class Scoring:
    """One call of TRL's scoring function: log-probs (B, C), and what else was collected on the way."""

    logps: Tensor
    hidden: Tensor | None = None  # (B, C, H)
    exact: Tensor | None = None  # (B, C)


def loss_mask(inputs: dict) -> Tensor:
    """(B, C) tokens that the policy produced: no padding, and no tool output."""
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def sampler_logps_of(policy_logps: Tensor, inputs: dict) -> Tensor:
    """(B, C) log-probs under the policy that really sampled; `policy_logps` itself where that is the policy.

    The inference engine's own, where TRL has them; NaN there marks tokens it could not score, which fall back to the
    trainer's.
    """
    trainer_logps = inputs.get("old_per_token_logps")
    trainer_logps = policy_logps if trainer_logps is None else trainer_logps
    engine_logps = inputs.get("sampling_per_token_logps")
    if engine_logps is None:
        return trainer_logps
    return torch.where(engine_logps.isnan(), trainer_logps, engine_logps)


def joined(parts: list[Tensor]) -> Tensor | None:
    """TRL may score a batch in several forwards."""
    return torch.cat(parts) if parts else None
