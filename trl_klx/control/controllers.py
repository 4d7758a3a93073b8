"""Controllers of beta, the weight of the KL penalty.

A controller is given one KL reading per rollout or optimizer step and answers with the beta to use next:
`controller = make_controller("pid", 0.05, target=0.1)`, then `beta = controller.update(kl)`.

Units: readings and target are in nats, both per token or both per sequence.
Sign: a KL above the target raises beta, a KL below it lowers beta.
In distributed training give every process the same (reduced) reading, or their betas drift apart.
"""

from __future__ import annotations

import difflib
from typing import Any

from .adaptive import AdaptiveController
from .base import Controller, refusal
from .pid import PIDController
from .schedules import CosineController, FixedController, LinearController


def make_controller(kind: str, coef: float, *, target: float | None = None, **settings: Any) -> Controller:
    """Return the controller called `kind`, at beta = `coef`; None for a setting means its default.

    fixed takes no target and no settings; adaptive a target, horizon, coef_min and coef_max; pid a target,
    kp, ki, gain_min, coef_min and coef_max; linear and cosine coef_end and total (see the class of each kind).

    Raises ValueError for an unknown kind, a setting that is missing or not taken, and a value out of range.
    """
    if kind not in KINDS:
        nearest = difflib.get_close_matches(str(kind).lower(), KINDS, n=1, cutoff=0.0)[0]
        raise refusal("kind", kind, f"use {nearest!r} or another of {', '.join(KINDS)}")
    cls = KINDS[kind]
    given = {name: value for name, value in {"target": target, **settings}.items() if value is not None}
    for name, value in given.items():
        if name not in cls.takes:
            takers = " or ".join(repr(other) for other in KINDS if name in KINDS[other].takes)
            remedy = f"drop it or use kind {takers}" if takers else "drop it"
            raise refusal(name, value, f"{remedy}; kind {kind!r} takes {', '.join(cls.takes) or 'none'}")
    return cls(coef, **given)


KINDS: dict[str, type[Controller]] = {
    cls.kind: cls for cls in (FixedController, AdaptiveController, PIDController, LinearController, CosineController)
}
