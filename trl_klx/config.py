"""The KL arguments that every trainer config shares, and every rule about them.

The fields are flat, so that a YAML recipe reads alike for all trainers. `KLArguments.check_kl` runs in the config's
`__post_init__`, before any model is loaded: `TrlParser` does not enforce types on YAML values, so nothing else would.
"""

import difflib
import math
import warnings
from dataclasses import dataclass, field

from .kl.gradients import EXPLANATION, SOUND, expected_gradient
from .kl.term import KLTerm

ESTIMATORS = ("k1", "k2", "k3", "exact")
ESTIMATOR_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "full": "exact"}
CHOICES: dict[str, tuple[str, ...]] = {
    "kl_estimator": ESTIMATORS,
    "kl_placement": ("none", "loss", "reward", "both"),
    "kl_credit": ("return_to_go", "immediate", "sequence"),
    "kl_importance_sampling": ("none", "token", "prefix", "sequence"),
    "kl_is_mode": ("truncate", "mask"),
    "kl_aggregation": ("loss_type", "token"),
    "kl_direction": ("reverse", "forward"),
    "kl_controller": ("fixed", "adaptive", "pid", "linear", "cosine"),
    "kl_target_unit": ("token", "sequence"),
    "kl_signal": ("k1", "k3", "exact"),
    "kl_budget_action": ("stop", "warn"),
}
# Which controllers read which setting; a setting given to any other controller would be silently dead.
CONTROLLER_SETTINGS: dict[str, tuple[str, ...]] = {
    "kl_target": ("adaptive", "pid"),
    "kl_horizon": ("adaptive",),
    "kl_kp": ("pid",),
    "kl_ki": ("pid",),
    "kl_kd": ("pid",),
    "kl_coef_min": ("adaptive", "pid"),
    "kl_coef_max": ("adaptive", "pid"),
    "kl_coef_end": ("linear", "cosine"),
}
# Choices that may be left open; check_kl or the trainer settles them.
_OPTIONAL = ("kl_importance_sampling", "kl_signal")
# Options that mean nothing without a KL.
_NEED_KL = ("kl_estimator", "kl_placement", "kl_credit", "kl_direction", "kl_is_cap", "kl_value_cap")
_POSITIVE = ("kl_target", "kl_horizon", "kl_coef_min", "kl_coef_max", "kl_coef_end", "kl_is_cap", "kl_value_cap")
_NOT_NEGATIVE = ("kl_kp", "kl_ki", "kl_kd")
# What to use instead of a refused combination, by estimator and placement.
_REMEDY = {
    ("k1", "loss"): "kl_estimator='k2' (same value, right gradient), or kl_importance_sampling='token'",
    ("k2", "reward"): "kl_estimator='k1' in the reward, or kl_placement='loss'",
    ("k3", "reward"): "kl_estimator='k1' in the reward, or kl_placement='loss'",
    ("exact", "reward"): "kl_placement='both' (the whole sequence gradient) or 'loss'",
    ("k2", "both"): "kl_estimator='exact' or 'k3' with kl_placement='both'",
}


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class KLArguments:
    """How the KL to the reference is estimated, where it enters, how it is corrected and what holds it at its target.

    All KL values are in nats. Mixed into each trainer's config; see the README's table for the gradient that each
    combination has. `ValueError`s name the field, its value and the remedy.
    """

    kl_estimator: str = _option(
        "k3", "KL estimator: k1, k2, k3 or exact (full vocabulary). Aliases: kl, mse, low_var_kl, full."
    )
    kl_placement: str = _option(
        "loss", "Where the KL enters: loss, reward, both, or none (measured and logged, no penalty)."
    )
    kl_credit: str = _option(
        "return_to_go",
        "Which KL a token is charged for in the reward: return_to_go, immediate or sequence. With kl_placement='both', "
        "return_to_go leaves out the token's own KL where the loss already charges it.",
    )
    kl_importance_sampling: str | None = _option(
        None,
        "Weight pi/mu on the KL loss, mu being the policy that really sampled: none, token, prefix or sequence. "
        "Default: token, as TRL's use_bias_correction_kl.",
    )
    kl_is_mode: str = _option("truncate", "What happens to weights above kl_is_cap: truncate or mask.")
    kl_is_cap: float | None = _option(None, "Largest importance weight on the KL. None: no bound, as TRL.")
    kl_aggregation: str = _option(
        "loss_type",
        "How the KL loss is averaged: loss_type follows TRL's loss; token takes the mean over all tokens of the batch, "
        "which keeps the gradient's direction exact.",
    )
    kl_direction: str = _option("reverse", "Direction of the exact KL: reverse, KL(policy || reference), or forward.")
    kl_value_cap: float | None = _option(
        None, "Bound on the KL loss of a token, in nats; bounds the value, keeps the gradient."
    )
    kl_controller: str = _option("fixed", "What sets beta: fixed, adaptive, pid, linear or cosine.")
    kl_target: float | None = _option(None, "KL that the adaptive and pid controllers hold, in kl_target_unit.")
    kl_target_unit: str = _option(
        "token", "Unit of kl_target: token (mean nats per token) or sequence (nats per sequence)."
    )
    kl_signal: str | None = _option(
        None, "What the controller reads: k1, k3 or exact. Default: exact where it is computed anyway, else k3."
    )
    kl_horizon: float | None = _option(None, "Horizon of the adaptive controller, in episodes. Default 10000.")
    kl_kp: float | None = _option(None, "Proportional gain of the pid controller. Default 0.5.")
    kl_ki: float | None = _option(None, "Integral gain of the pid controller. Default 0.02.")
    kl_kd: float | None = _option(None, "Derivative gain of the pid controller. Default 0.")
    kl_coef_min: float | None = _option(None, "Smallest beta of the adaptive and pid controllers. Default beta/100.")
    kl_coef_max: float | None = _option(None, "Largest beta of the adaptive and pid controllers. Default 100*beta.")
    kl_coef_end: float | None = _option(None, "Beta at the end of training, for the linear and cosine controllers.")
    kl_budget: float | None = _option(
        None, "Largest KL in nats per sequence; what happens beyond it is kl_budget_action."
    )
    kl_budget_action: str = _option("stop", "Beyond kl_budget: stop (checkpoint saved) or warn.")
    kl_monitor: list[str] | None = _option(
        None,
        "Estimators to log with standard errors, also at beta 0: k1, k2, k3, exact. Default: kl_estimator and k1, k3 "
        "where the reference is there anyway.",
    )
    max_skipped_steps: int = _option(
        10, "Steps in a row that may be skipped because they are not finite (loss, KL, gradient); one more is an error."
    )
    allow_biased_kl: bool = _option(
        False, "Run a combination that is refused for its gradient, with a warning that names it."
    )

    @property
    def kl_coef_start(self) -> float:
        """Beta at the start of training, under the name that the algorithm gives it."""
        raise TypeError(f"{type(self).__name__} must say which of its fields is beta.")

    @property
    def kl_coef_name(self) -> str:
        """TRL's name of that field: beta (GRPO, DPO) or kl_coef (PPO)."""
        raise TypeError(f"{type(self).__name__} must say which of its fields is beta.")

    @property
    def kl_is_penalised(self) -> bool:
        """Whether a KL penalty reaches the policy."""
        return self.kl_placement != "none" and self.kl_coef_start != 0

    @property
    def kl_is_measured(self) -> bool:
        """Whether the reference is needed at all."""
        return self.kl_is_penalised or self.kl_placement == "none" or bool(self.kl_monitor) or bool(self.kl_budget)

    @property
    def kl_logged_estimators(self) -> tuple[str, ...]:
        """Estimators whose mean and standard error are logged."""
        if not self.kl_is_measured:
            return ()
        wanted = {self.kl_estimator, self.kl_reading, *(("k1", "k3") if self.kl_monitor is None else self.kl_monitor)}
        return tuple(name for name in ESTIMATORS if name in wanted)

    @property
    def kl_needs_exact(self) -> bool:
        """Whether the full-vocabulary KL has to be computed."""
        return "exact" in self.kl_logged_estimators

    @property
    def kl_reading(self) -> str:
        """The estimator that the controller, the budget and `kl/sequence` read."""
        if self.kl_signal is not None:
            return self.kl_signal
        if self.kl_direction == "forward":
            return "k3"  # target, budget and kl/sequence are of the reverse KL, whatever the loss is
        return "exact" if self.kl_estimator == "exact" or "exact" in (self.kl_monitor or ()) else "k3"

    @property
    def kl_controller_settings(self) -> dict[str, float]:
        """The settings given for the controller, under the names that `make_controller` takes."""
        names = [name for name in CONTROLLER_SETTINGS if getattr(self, name) is not None]
        return {name.removeprefix("kl_"): getattr(self, name) for name in names}

    def kl_term(self) -> KLTerm:
        """The estimator, placement, credit and weight as the pure function that trainers use."""
        return KLTerm(
            estimator=self.kl_estimator,  # type: ignore[arg-type]
            placement=self.kl_placement,  # type: ignore[arg-type]
            reward_credit=self.kl_credit,  # type: ignore[arg-type]
            weight_level=self.kl_importance_sampling or "none",  # type: ignore[arg-type]
            weight_mode=self.kl_is_mode,  # type: ignore[arg-type]
            weight_cap=self.kl_is_cap,
            value_cap=self.kl_value_cap,
            direction=self.kl_direction,  # type: ignore[arg-type]
        )

    def check_kl(self) -> None:
        """Resolve aliases and defaults, then apply every rule. Raises ValueError with one sentence."""
        self._check_names()
        self._check_numbers()
        self._check_dead_options()
        self._check_exact_only_options()
        self._check_controller()
        self._check_gradient()
        self._check_kl_is_on()

    def _check_names(self) -> None:
        self.kl_estimator = _estimator_name("kl_estimator", self.kl_estimator)
        if self.kl_signal is not None:
            self.kl_signal = _estimator_name("kl_signal", self.kl_signal)
        if self.kl_monitor is not None:
            if not isinstance(self.kl_monitor, list):
                raise ValueError(f"kl_monitor={self.kl_monitor!r} must be a list: write [{self.kl_monitor}].")
            self.kl_monitor = [_estimator_name("kl_monitor", name) for name in self.kl_monitor]
        if self.kl_importance_sampling in ("geometric", "gspo", "sequence_mean"):
            raise ValueError(
                f"kl_importance_sampling={self.kl_importance_sampling!r} is refused: the geometric mean of a "
                "sequence's ratios is never the right weight on a KL; use 'token', 'prefix' or 'sequence'."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in _OPTIONAL):
                raise ValueError(_unknown(name, value, choices))

    def _check_numbers(self) -> None:
        for name in (*_POSITIVE, *_NOT_NEGATIVE, "kl_budget"):
            value = getattr(self, name)
            if value is None:
                continue
            _check_number(name, value)
            if value < 0 or (value == 0 and name not in _NOT_NEGATIVE):
                wanted = "zero or more" if name in _NOT_NEGATIVE else "more than zero"
                raise ValueError(f"{name}={value} must be {wanted}.")
        if type(self.max_skipped_steps) is not int or self.max_skipped_steps < 0:
            raise ValueError(
                f"max_skipped_steps={self.max_skipped_steps!r} must be a whole number, zero or more (0: skip none)."
            )
        coef = self.kl_coef_start
        _check_number(self.kl_coef_name, coef)
        if coef < 0:
            raise ValueError(f"{self.kl_coef_name}={coef} must be zero or more: a negative weight rewards divergence.")

    def _check_dead_options(self) -> None:
        if self.kl_importance_sampling is None:
            self.kl_importance_sampling = "none" if self.kl_placement in ("none", "reward") else "token"
        elif self.kl_placement in ("none", "reward") and self.kl_importance_sampling != "none":
            raise ValueError(
                f"kl_importance_sampling={self.kl_importance_sampling!r} weights the KL loss and kl_placement="
                f"{self.kl_placement!r} has none: remove it (the policy gradient's own correction weights a KL in the "
                "reward), or use kl_placement='both'."
            )
        if self.kl_aggregation == "token" and self.kl_placement in ("none", "reward"):
            raise ValueError(
                f"kl_aggregation='token' averages the KL loss and kl_placement={self.kl_placement!r} has none: remove "
                "it."
            )
        if self.kl_is_cap is not None and self.kl_importance_sampling == "none":
            raise ValueError(
                f"kl_is_cap={self.kl_is_cap} bounds an importance weight and kl_importance_sampling='none' has none: "
                "remove it, or set kl_importance_sampling='token'."
            )
        if self.kl_is_cap is not None and (self.kl_estimator, self.kl_importance_sampling) == ("exact", "token"):
            raise ValueError(
                f"kl_is_cap={self.kl_is_cap} has no effect: an exact KL takes no token weight (it averages over the "
                "policy's tokens itself); remove it, or set kl_importance_sampling='prefix'."
            )
        if self.kl_is_mode == "mask" and self.kl_is_cap is None:
            raise ValueError("kl_is_mode='mask' drops the weights above kl_is_cap: set kl_is_cap, for example 2.0.")
        if self.kl_credit != "return_to_go" and self.kl_placement in ("none", "loss"):
            raise ValueError(
                f"kl_credit={self.kl_credit!r} says how the reward is charged and kl_placement={self.kl_placement!r} "
                "has no KL in the reward: remove it, or set kl_placement='reward'."
            )
        if self.kl_value_cap is not None and self.kl_placement in ("none", "reward"):
            raise ValueError(
                f"kl_value_cap={self.kl_value_cap} bounds the value of the KL loss and kl_placement="
                f"{self.kl_placement!r} has none: remove it (a bound on the reward would bend its gradient)."
            )

    def _check_exact_only_options(self) -> None:
        if self.kl_direction == "forward" and self.kl_estimator != "exact":
            raise ValueError(
                f"kl_direction='forward' needs the full vocabulary and kl_estimator is {self.kl_estimator!r}: set "
                "kl_estimator='exact', or remove kl_direction."
            )
        if self.kl_direction == "forward" and self.kl_signal == "exact":
            raise ValueError(
                "kl_signal='exact' would be the forward KL with kl_direction='forward', and targets and budgets are of "
                "the reverse KL: use kl_signal='k3'."
            )
        if self.kl_signal == "exact" and self.kl_estimator != "exact" and "exact" not in (self.kl_monitor or ()):
            raise ValueError(
                "kl_signal='exact' needs the exact KL to be computed: set kl_estimator='exact', or add exact to "
                "kl_monitor."
            )

    def _check_controller(self) -> None:
        kind = self.kl_controller
        for name, kinds in CONTROLLER_SETTINGS.items():
            if getattr(self, name) is not None and kind not in kinds:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with kl_controller={kind!r}: remove it, or set "
                    f"kl_controller to {' or '.join(repr(k) for k in kinds)}."
                )
        if kind == "fixed":
            return
        if not self.kl_is_penalised:
            raise ValueError(
                f"kl_controller={kind!r} has nothing to steer with kl_placement={self.kl_placement!r} and "
                f"{self.kl_coef_name}={self.kl_coef_start}: give {self.kl_coef_name} a positive start and the KL a "
                "placement, or set kl_controller='fixed'."
            )
        if kind in CONTROLLER_SETTINGS["kl_target"] and self.kl_target is None:
            raise ValueError(f"kl_controller={kind!r} needs a target: set kl_target (nats per {self.kl_target_unit}).")
        if kind in CONTROLLER_SETTINGS["kl_coef_end"] and self.kl_coef_end is None:
            raise ValueError(f"kl_controller={kind!r} needs a value to end at: set kl_coef_end.")
        low, high = self.kl_coef_min, self.kl_coef_max
        if not (low or 0) <= self.kl_coef_start <= (high or math.inf):
            raise ValueError(
                f"{self.kl_coef_name}={self.kl_coef_start} must lie between kl_coef_min={low} and kl_coef_max={high}."
            )

    def _check_kl_is_on(self) -> None:
        """At beta 0, TRL's default for GRPO, a chosen estimator or placement would silently do nothing."""
        if self.kl_is_measured:
            return
        defaults = type(self).__dataclass_fields__
        for name in _NEED_KL:
            if getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect at {self.kl_coef_name}=0: give {self.kl_coef_name} "
                    "a positive value, for example 0.04, or measure without a penalty by kl_placement='none'."
                )

    def _check_gradient(self) -> None:
        """Refuse what has no KL's gradient; the verdict comes from the table that the tests prove."""
        if self.kl_placement == "none":
            return
        weighted = self.kl_importance_sampling != "none"
        gradient = expected_gradient(self.kl_estimator, self.kl_placement, self.kl_credit, weighted)
        if gradient in SOUND:
            return
        remedy = _REMEDY.get((self.kl_estimator, self.kl_placement), "kl_credit='return_to_go'")
        verdict = (
            f"kl_estimator={self.kl_estimator!r} with kl_placement={self.kl_placement!r}, "
            f"kl_credit={self.kl_credit!r} and kl_importance_sampling={self.kl_importance_sampling!r} "
            f"{EXPLANATION[gradient.name]}"
        )
        if not self.allow_biased_kl:
            raise ValueError(f"{verdict}; use {remedy}, or set allow_biased_kl=true to run it all the same.")
        warnings.warn(f"{verdict} (expected gradient: {gradient.name}).", UserWarning, stacklevel=4)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")


def _estimator_name(option: str, value: str) -> str:
    name = ESTIMATOR_ALIASES.get(str(value), value)
    if name not in ESTIMATORS:
        raise ValueError(_unknown(option, value, (*ESTIMATORS, *ESTIMATOR_ALIASES)))
    return name


def _unknown(option: str, value: object, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{option}={value!r} does not exist; {hint}choose one of {', '.join(choices)}."
