"""What else in a recipe acts on its KL: one sentence per finding, from the fields of the trainer's config."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...kl.term import KLTerm
from ...kl.variance import stale
from ..recipe.algorithm import Algorithm

_FAR = 0.40  # KL(policy || sampler), nats per answer


def notes(algorithm: Algorithm, args: Any) -> list[str]:
    """Everything beside estimator, placement and weight that changes what the KL does, or a note that nothing does."""
    return [
        *algorithm.notes(args),
        *_moving(args),
        *_reused(algorithm, args),
        *_limited(args),
        *_shared(algorithm, args),
    ]


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


def _reused(algorithm: Algorithm, args: Any) -> Iterator[str]:
    if args.kl_sampler_limit:
        yield (
            f"{args.kl_sampler_limit} (kl_sampler_target): at least one, at most "
            f"{algorithm.updates_per_rollout(args):g}. kl/updates is the share that is made, kl/drift_last the KL at a "
            "rollout's last one."
        )


def _limited(args: Any) -> Iterator[str]:
    limit, target = args.kl_step_limit, args.kl_target
    if limit is not None:
        share = "" if target is None else f" ({limit / target:.1%} of kl_target)"
        yield (
            f"kl_step_limit: while a step takes the policy farther than {limit:g} nats per {args.kl_target_unit}"
            f"{share} from where it was, the learning rate is lowered. kl/step is how far it went, kl/lr_scale the "
            "factor."
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
    yield from _bounds(args.kl_term())
    if args.kl_value_cap is not None:
        yield f"kl_value_cap={args.kl_value_cap} bounds the logged loss of a token, and keeps its gradient."


def _bounds(term: KLTerm) -> Iterator[str]:
    """What bounds on the weights leave out, and what that costs far from the sampler."""
    free = replace(term, weight_cap=None, weight_mode="truncate", answer_cap=None, veto=None)
    left_out = []
    if term.weight_cap is not None:
        left_out.append(f"kl_is_cap={term.weight_cap:g} {term.weight_mode}s tokens' weights above it")
    if term.answer_cap is not None:
        left_out.append(f"kl_is_answer_cap={term.answer_cap:g} leaves out answers by the mean of their log-weights")
    if term.veto is not None:
        left_out.append(f"kl_is_veto={term.veto:g} leaves out answers with a token of a smaller weight")
    if left_out:
        bounded, unbounded = (
            f"{100 * one.error:.0f} % off at {one.variance:.1f} times the variance"
            for one in (stale(term, _FAR), stale(free, _FAR))
        )
        yield (
            f"{', '.join(left_out)}: less variance for a bias. On enumerated policies {_FAR:.2f} nats per answer from "
            f"their sampler, the gradient is {bounded} of the policy's own answers, without a bound {unbounded}."
        )


def _target(algorithm: Algorithm, args: Any) -> str:
    longest = getattr(args, algorithm.rows.answer_length) if algorithm.rows.answer_length else None
    if longest and args.kl_target_unit == "token":
        return f"{args.kl_control}: up to {args.kl_target * longest:.3g} nats in an answer of {longest} tokens."
    if longest:
        return f"{args.kl_control}: {args.kl_target / longest:.2g} nats per token in an answer of {longest} tokens."
    return f"{args.kl_control}."
