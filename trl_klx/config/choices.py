"""The values that KL fields may have, other spellings of them, and the sentences about a value that does not exist."""

import difflib
import math
from collections.abc import Iterable

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
    "kl_gain_min": ("pid",),
    "kl_coef_min": ("adaptive", "pid"),
    "kl_coef_max": ("adaptive", "pid"),
    "kl_coef_end": ("linear", "cosine"),
}


def with_aliases(estimators: tuple[str, ...]) -> dict[str, str]:
    """Every spelling of these estimators, and the name that it stands for."""
    aliases = {alias: name for alias, name in ESTIMATOR_ALIASES.items() if name in estimators}
    return {name: name for name in estimators} | aliases


def unknown(option: str, value: object, choices: Iterable[object]) -> str:
    """The sentence about a value that is not one of the choices."""
    names = list(map(str, choices))
    near = [name for name in names if name.lower() == str(value).lower()]
    near += [name for name in names if len(str(value)) > 2 and name.startswith(str(value))]
    near += difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{option}={value!r} does not exist; {hint}choose one of {', '.join(names)}."


def check_number(name: str, value: object) -> None:
    """Raises ValueError where the value is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
