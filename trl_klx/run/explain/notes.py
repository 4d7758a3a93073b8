"""What else in a recipe acts on its KL: one sentence per finding, from the fields of the trainer's config."""

from collections.abc import Iterator
from typing import Any

from ..recipe.algorithm import Algorithm


def notes(algorithm: Algorithm, args: Any) -> list[str]:
    """Everything beside estimator, placement and weight that changes what the KL does, or a note that nothing does."""
    return [*algorithm.notes(args), *_moving(args), *_shared(algorithm, args)]


def _moving(args: Any) -> Iterator[str]:
    if not args.sync_ref_model:
        return
    alpha, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
    start = (
        "kl/origin, budget and reports about the start"
        if args.kl_has_origin
        else "nothing measures how far the policy is from its start"
    )
    yield (
        f"sync_ref_model: every {steps} steps the reference moves by {alpha:g} of the way to the policy; penalty and "
        f"target are about the reference as it is, and {start}."
    )


def _shared(algorithm: Algorithm, args: Any) -> Iterator[str]:
    name, start = args.kl_coef_name, args.kl_coef_start
    if not args.kl_is_penalised:
        placement = args.kl_placement
        yield f"No penalty acts ({name}={start}, kl_placement={placement!r}): the reward alone moves the policy."
        return
    if args.kl_controller == "fixed":
        yield f"{args.kl_control}: the KL ends where reward and penalty balance, which is not known beforehand."
    elif args.kl_controller in ("linear", "cosine"):
        yield f"{args.kl_control}, whatever the KL does."
    elif args.kl_target is not None:
        yield _target(algorithm, args)
    if args.kl_direction == "forward":
        yield "kl_direction='forward' covers the reference's modes; target, budget and kl/sequence stay reverse."
    if args.kl_is_cap is not None:
        yield (
            f"kl_is_cap={args.kl_is_cap}: weights above it are {args.kl_is_mode}d, which trades variance for a bias on "
            "exactly these tokens."
        )
    if args.kl_value_cap is not None:
        yield f"kl_value_cap={args.kl_value_cap} bounds the logged loss of a token, and keeps its gradient."


def _target(algorithm: Algorithm, args: Any) -> str:
    longest = getattr(args, algorithm.rows.answer_length) if algorithm.rows.answer_length else None
    if longest and args.kl_target_unit == "token":
        return f"{args.kl_control}: up to {args.kl_target * longest:.3g} nats in an answer of {longest} tokens."
    if longest:
        return f"{args.kl_control}: {args.kl_target / longest:.2g} nats per token in an answer of {longest} tokens."
    return f"{args.kl_control}."
