"""What bfloat16 does to a KL that is estimated from TRL's own log-probs."""

from typing import Any

from ..seams import FUSED_LM_HEAD

# Nats per token that k2 and k3 read too much near the reference. A logit between 16 and 32 has steps of 0.125 in
# bfloat16: a noise of 0.04 to 0.05 nats in a log-ratio, and half of its square here (scripts/measure_bf16.py).
FLOOR = 1e-3
_FAR_ABOVE = 10  # times the floor: a reading is then within a tenth


def rounded_target(args: Any) -> str | None:
    """What to set where a GRPO recipe holds a KL so small that TRL's scoring rounds it away; None elsewhere.

    With an exact KL the trainer scores for itself, in float32. Below TRL 1.16 autocast undoes cast_lm_head_to_fp32.
    """
    in_bf16 = not args.fp16 if args.bf16 is None else args.bf16  # TRL's default
    has_float32_head = FUSED_LM_HEAD and args.cast_lm_head_to_fp32
    held = {"kl_target": args.kl_target, "kl_step_limit": args.kl_step_limit}
    held |= {f"kl_group_targets of {group}": target for group, target in (args.kl_group_targets or {}).items()}
    smallest, name = min(((value, name) for name, value in held.items() if value is not None), default=(None, ""))
    if smallest is None or not in_bf16 or has_float32_head or args.kl_needs_exact:
        return None
    per_token = smallest / (args.max_completion_length if args.kl_target_unit == "sequence" else 1)
    if per_token >= _FAR_ABOVE * FLOOR:
        return None
    remedy = "add exact to kl_monitor, which scores in float32"
    if FUSED_LM_HEAD:
        remedy += ", or set cast_lm_head_to_fp32=true (of models whose head is not tied to the embeddings)"
    return (
        f"bf16=true: TRL scores answers by logits that are rounded to bfloat16, which adds about {FLOOR:g} nats per "
        f"token to k2 and k3, and {name} is {per_token:.2g} per token: {remedy}."
    )
