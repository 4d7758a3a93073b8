"""Which KL arguments may stand together, and which combinations have the gradient that they promise.

Rules judge and write nothing. They rely on what `check.py` does before them: types are right, names exist, defaults are
resolved.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

from ..kl.gradients import EXPLANATION, SOUND, expected_gradient
from .choices import CHOICES, CONTROLLER_SETTINGS, check_number, unknown
from .options import KLArguments

# Fields that mean nothing without a KL.
_NEED_KL: tuple[str, ...] = ("kl_estimator", "kl_placement", "kl_credit", "kl_direction", "kl_value_cap")
_NEED_KL += ("kl_is_cap", "kl_is_answer_cap", "kl_is_veto")
# What to use instead of a refused combination, by estimator and placement.
_REMEDY = {
    ("k1", "loss"): "kl_estimator='k2' (same value, right gradient), or kl_importance_sampling='token'",
    ("k2", "reward"): "kl_estimator='k1' in the reward, or kl_placement='loss'",
    ("k3", "reward"): "kl_estimator='k1' in the reward, or kl_placement='loss'",
    ("exact", "reward"): "kl_placement='both' (the whole sequence gradient) or 'loss'",
    ("k2", "both"): "kl_estimator='exact' or 'k3' with kl_placement='both'",
}


def _check_names(args: KLArguments) -> None:
    if isinstance(args.kl_monitor, str):
        raise ValueError(f"kl_monitor={args.kl_monitor!r} must be a list: write [{args.kl_monitor}].")
    level = args.kl_importance_sampling
    if level in ("geometric", "gspo", "sequence_mean"):
        raise ValueError(
            f"kl_importance_sampling={level!r} is refused: the geometric mean of a "
            "sequence's ratios is never the right weight on a KL; use 'token', 'prefix' or 'sequence'."
        )
    if level not in CHOICES["kl_importance_sampling"]:
        raise ValueError(unknown("kl_importance_sampling", level, CHOICES["kl_importance_sampling"]))


def _check_numbers(args: KLArguments) -> None:
    if isinstance(args.kl_budget, str) and args.kl_budget != "auto":
        raise ValueError(f"kl_budget={args.kl_budget!r} must be a number of nats per sequence, or auto.")
    coef = args.kl_coef_start
    if coef < 0:
        raise ValueError(f"{args.kl_coef_name}={coef} must be zero or more: a negative weight rewards divergence.")


def _check_dead_options(args: KLArguments) -> None:
    term = args.kl_term()
    if args.kl_placement == "none" and args.kl_importance_sampling != "none":
        raise ValueError(
            f"kl_importance_sampling={args.kl_importance_sampling!r} weights a KL penalty and kl_placement='none' has "
            "none: remove it."
        )
    if args.kl_placement == "reward" and args.kl_importance_sampling == "token":
        raise ValueError(
            "kl_importance_sampling='token' weights the KL loss and kl_placement='reward' has none (the policy "
            "gradient's ratio is that weight): remove it, or set 'prefix', which charges for the KL at every update "
            "anew."
        )
    if args.kl_aggregation == "token" and not (term.in_loss or term.reward_at_update):
        raise ValueError(
            f"kl_aggregation='token' averages the KL loss and kl_placement={args.kl_placement!r} has none: remove it."
        )
    _check_weight_bounds(args)
    if args.kl_credit != "return_to_go" and args.kl_placement in ("none", "loss"):
        raise ValueError(
            f"kl_credit={args.kl_credit!r} sets how the reward is charged and kl_placement={args.kl_placement!r} "
            "has no KL in the reward: remove it, or set kl_placement='reward'."
        )
    if args.kl_value_cap is not None and args.kl_placement in ("none", "reward"):
        raise ValueError(
            f"kl_value_cap={args.kl_value_cap} bounds the value of the KL loss and kl_placement="
            f"{args.kl_placement!r} has none: remove it (a bound on the reward would bend its gradient)."
        )


def _check_weight_bounds(args: KLArguments) -> None:
    if args.kl_is_cap is not None and args.kl_importance_sampling == "none":
        raise ValueError(
            f"kl_is_cap={args.kl_is_cap} bounds an importance weight and kl_importance_sampling='none' has none: "
            "remove it, or set kl_importance_sampling='token'."
        )
    if args.kl_is_cap is not None and (args.kl_estimator, args.kl_importance_sampling) == ("exact", "token"):
        raise ValueError(
            f"kl_is_cap={args.kl_is_cap} has no effect: an exact KL takes no token weight (it averages over the "
            "policy's tokens itself); remove it, or set kl_importance_sampling='prefix'."
        )
    if args.kl_is_mode == "mask" and args.kl_is_cap is None:
        raise ValueError("kl_is_mode='mask' drops the weights above kl_is_cap: set kl_is_cap, for example 2.0.")
    for name in ("kl_is_answer_cap", "kl_is_veto"):
        value = getattr(args, name)
        if value is not None and args.kl_importance_sampling == "none":
            raise ValueError(
                f"{name}={value} leaves out answers by their importance weights and kl_importance_sampling='none' has "
                "none: remove it, or set kl_importance_sampling='prefix'."
            )
        if value is not None and (args.kl_placement, args.kl_importance_sampling) == ("both", "token"):
            raise ValueError(
                f"{name}={value} would leave answers out of the KL loss alone, and kl_placement='both' has a part in "
                "the reward, which kl_importance_sampling='token' does not reach: set kl_importance_sampling='prefix'."
            )


def _check_exact_only_options(args: KLArguments) -> None:
    if args.kl_direction == "forward" and args.kl_estimator != "exact":
        raise ValueError(
            f"kl_direction='forward' needs the full vocabulary and kl_estimator is {args.kl_estimator!r}: set "
            "kl_estimator='exact', or remove kl_direction."
        )
    if args.kl_direction == "forward" and args.kl_signal == "exact":
        raise ValueError(
            "kl_signal='exact' would be the forward KL with kl_direction='forward', and targets and budgets are of "
            "the reverse KL: use kl_signal='k3'."
        )
    if args.kl_signal == "exact" and args.kl_estimator != "exact" and "exact" not in (args.kl_monitor or ()):
        raise ValueError(
            "kl_signal='exact' needs the exact KL to be computed: set kl_estimator='exact', or add exact to kl_monitor."
        )


def _check_groups(args: KLArguments) -> None:
    column, targets = args.kl_group_column, args.kl_group_targets
    if column is not None and not args.kl_is_measured:
        raise ValueError(
            f"kl_group_column={column!r} has no KL to group at {args.kl_coef_name}=0: give {args.kl_coef_name} a "
            "positive value, or measure without a penalty by kl_placement='none'."
        )
    if targets is None:
        return
    if not isinstance(targets, dict) or not targets:
        raise ValueError(f"kl_group_targets={targets!r} must map the groups' names to their targets in nats.")
    if column is None:
        raise ValueError(
            "kl_group_targets needs to know which group a prompt is of: set kl_group_column to the dataset's column."
        )
    if args.kl_controller not in CONTROLLER_SETTINGS["kl_target"]:
        raise ValueError(
            f"kl_group_targets has no effect with kl_controller={args.kl_controller!r}: remove it, or set "
            "kl_controller to 'adaptive' or 'pid'."
        )
    for group, target in targets.items():
        check_number(f"kl_group_targets[{group!r}]", target)
        if target <= 0:
            raise ValueError(f"kl_group_targets[{group!r}]={target} must be more than zero.")


def _check_controller(args: KLArguments) -> None:
    kind = args.kl_controller
    for name, kinds in CONTROLLER_SETTINGS.items():
        if getattr(args, name) is not None and kind not in kinds:
            raise ValueError(
                f"{name}={getattr(args, name)} has no effect with kl_controller={kind!r}: remove it, or set "
                f"kl_controller to {' or '.join(repr(k) for k in kinds)}."
            )
    if kind == "fixed":
        return
    if not args.kl_is_penalised:
        raise ValueError(
            f"kl_controller={kind!r} has nothing to steer with kl_placement={args.kl_placement!r} and "
            f"{args.kl_coef_name}={args.kl_coef_start}: give {args.kl_coef_name} a positive start and the KL a "
            "placement, or set kl_controller='fixed'."
        )
    if kind in CONTROLLER_SETTINGS["kl_target"] and args.kl_target is None and not args.kl_group_targets:
        raise ValueError(f"kl_controller={kind!r} needs a target: set kl_target (nats per {args.kl_target_unit}).")
    if kind in CONTROLLER_SETTINGS["kl_coef_end"] and args.kl_coef_end is None:
        raise ValueError(f"kl_controller={kind!r} needs a value to end at: set kl_coef_end.")
    low, high = args.kl_coef_min, args.kl_coef_max
    if not (low or 0) <= args.kl_coef_start <= (high or math.inf):
        raise ValueError(
            f"{args.kl_coef_name}={args.kl_coef_start} must lie between kl_coef_min={low} and kl_coef_max={high}."
        )


def _check_kl_is_on(args: KLArguments) -> None:
    """At beta 0, TRL's default for GRPO, a chosen estimator or placement would silently do nothing."""
    if args.kl_is_measured:
        return
    defaults = type(args).__dataclass_fields__
    for name in _NEED_KL:
        if getattr(args, name) != defaults[name].default:
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no effect at {args.kl_coef_name}=0: give {args.kl_coef_name} "
                "a positive value, for example 0.04, or measure without a penalty by kl_placement='none'."
            )


def _check_moving_reference(args: KLArguments) -> None:
    if not args.sync_ref_model:
        if args.kl_origin:
            raise ValueError(
                "kl_origin=true has no effect with sync_ref_model=false: the reference stays the start, to which the "
                "KL is measured anyway; remove it."
            )
        return
    if not args.has_reference:
        raise ValueError(
            "sync_ref_model=true moves a reference and none is in memory: give the KL a coefficient or measure it "
            "(kl_placement='none'), in DPO without precompute_ref_log_probs; or set sync_ref_model=false."
        )
    if args.ref_model_mixup_alpha == 0:
        raise ValueError("ref_model_mixup_alpha=0 moves the reference by nothing: raise it, or remove sync_ref_model.")
    if args.kl_origin and not args.kl_has_origin:
        raise ValueError("kl_origin=true has no effect in DPO without a probe: set kl_probe_steps, or remove it.")
    if args.kl_origin is False and args.kl_budget is not None:
        raise ValueError(
            f"kl_budget={args.kl_budget} bounds the KL to the start and kl_origin=false does not measure it: remove "
            "kl_origin."
        )


def _check_gradient(args: KLArguments) -> None:
    """Refuse what does not have a KL's gradient; the verdict comes from the table that the tests prove."""
    if args.kl_placement == "none":
        return
    weighted = args.kl_importance_sampling != "none"
    gradient = expected_gradient(args.kl_estimator, args.kl_placement, args.kl_credit, weighted)
    if gradient in SOUND:
        return
    remedy = _REMEDY.get((args.kl_estimator, args.kl_placement), "kl_credit='return_to_go'")
    verdict = (
        f"kl_estimator={args.kl_estimator!r} with kl_placement={args.kl_placement!r}, "
        f"kl_credit={args.kl_credit!r} and kl_importance_sampling={args.kl_importance_sampling!r} "
        f"{EXPLANATION[gradient.name]}"
    )
    if not args.allow_biased_kl:
        raise ValueError(f"{verdict}; use {remedy}, or set allow_biased_kl=true to run it anyway.")
    warnings.warn(f"{verdict} (expected gradient: {gradient.name}).", UserWarning, stacklevel=5)


_RULES = (
    _check_names,
    _check_numbers,
    _check_dead_options,
    _check_exact_only_options,
    _check_groups,
    _check_moving_reference,
    _check_controller,
    _check_gradient,
    _check_kl_is_on,
)


def kl_rules(args: KLArguments) -> list[Callable[[], None]]:
    """Every rule about the fields that all trainers share. Each raises ValueError with one sentence."""
    return [partial(rule, args) for rule in _RULES]
