"""The trainer's attribute that holds beta, as TRL has it: callbacks read it, and set it."""

import math
from typing import Any


class KLCoefficient:
    """`trainer.beta` or `trainer.kl_coef`: what the loss multiplies, the log shows and checkpoints keep.

    Where the coefficient is the one that `kl_controller` sets, the value is the controller's; setting it sets that of a
    fixed one, for good, and is refused for all others. A coefficient that no controller sets (DPO's other one) is the
    trainer's own.

    Args:
        may_be_zero: whether 0 has a meaning.

    Raises:
        ValueError: the value set is not a coefficient, or a controller or the config forbids it.
    """

    def __init__(self, *, may_be_zero: bool = True) -> None:
        self._may_be_zero = may_be_zero

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        if self._name in vars(trainer):  # `swapped`: what TRL's code is to see meanwhile
            return vars(trainer)[self._name]
        return trainer.kl.coef if self._is_steered(trainer) else vars(trainer)[f"_{self._name}"]

    def __set__(self, trainer: Any, value: float) -> None:
        if self._is_steered(trainer):
            trainer.kl.set_coef(value)
        else:
            vars(trainer)[f"_{self._name}"] = coefficient(self._name, value, may_be_zero=self._may_be_zero)

    def _is_steered(self, trainer: Any) -> bool:
        """Whether it is the controller's. Not while TRL's own `__init__` runs: there is none yet."""
        return "kl" in vars(trainer) and trainer.args.kl_coef_name == self._name


def coefficient(name: str, value: Any, *, may_be_zero: bool = True) -> float:
    """A value that `trainer.<name>` may have.

    Raises:
        ValueError: it is not a finite number, or negative.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, (bool, str)) or not 0 <= number < math.inf:
        raise ValueError(f"trainer.{name}={value!r} was set: it must be a finite number, zero or more.")
    if number == 0 and not may_be_zero:
        raise ValueError(f"trainer.{name}={value!r} was set: it must be more than zero, because losses divide by it.")
    return number
