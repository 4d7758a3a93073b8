"""Alarms about the course of a run: a KL out of hand, nothing learnt, one answer left.

Functions of plain numbers that give what was seen against which threshold, the likely cause and what to change, or
None. The thresholds are the constants, each with its reason. KL is in nats.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from .readings import SEVERAL, Finding, Readings, lasts, over, values_of

# A controller that works keeps the KL within a factor of its target: within 1.4 in the starter recipes.
FAR_FROM_TARGET = 3.0
# At its largest beta a controller has nothing left to do, so a smaller excess, the one that counts as "held", suffices.
OFF_TARGET, AT_MAXIMUM = 1.25, 0.99
# Beyond any useful size, when both: the answers are such as the reference gives once in e^20 = 5e8 (a KL of 20 nats is
# that of the best of 1.3e9 samples), and that is not the sum of many small changes, but e = 2.7 times at every token.
# Alone the second may be of use (an answer of one token that was right once in ten: 2.3 nats), as the first may be.
USELESS_PER_SEQUENCE, USELESS_PER_TOKEN = 20.0, 1.0
RECOVERED = 0.5  # of that size: from there on the run has come back
# Explosive: doubled from reading to reading, SEVERAL times, up to a quarter of that size. From zero everything doubles.
GROWTH, NOTABLE = 2.0, 0.25

# By Pinsker's inequality at most sqrt(0.001 / 2) = 2 % of the answers' probability has moved: nothing is learnt.
NOTHING = 1e-3
NOISE_MARGIN = 1.2  # a KL that is no more than that of step 0, which one batch measured, is scoring noise
# At a beta that drowns the reward, the optimizer's noise still makes a KL. What a policy pays, beta * KL, it has to
# earn: more than one standard deviation of the reward, while the reward has not risen, is paid for nothing.
PAID = 1.0
LEARNING_STEPS, LEARNING_READINGS = 50, 5  # after the warm-up; a working run has moved by then (starter: 0.05 nats)
NO_SIGNAL = 0.95  # share of prompts whose answers all get one reward

# e^0.05: the policy has 1.05 choices per token. Some tasks end there, with one right answer to each prompt; so the
# entropy must also have fallen to a quarter of its first value, and the KL be more than picking the one answer in
# e^10 = 22,000 of the reference's own.
NO_CHOICE, FALLEN, PICKED = 0.05, 0.25, 10.0


class Target(NamedTuple):
    """What a controller read, and what it set."""

    step: int
    kl: float
    target: float
    coef: float


def runaway(
    targets: Sequence[Target],
    per_token: Readings,
    per_sequence: Readings,
    *,
    coef_max: float | None,
    coef_name: str,
    ongoing: bool = False,
) -> Finding | None:
    """KL far beyond its target; without a target, beyond any useful size or on its way there.

    Args:
        targets: of runs with a controller that has a target; where there are any, only they count.
        per_token, per_sequence: the KL in both units, at the same steps.
        coef_max: the largest beta that the controller may set, None if it has no bound.
        coef_name: what beta is called.
        ongoing: whether the alarm has begun; a useless KL has to fall to half before it ends.
    """
    if targets:
        return _beyond_target(targets[-SEVERAL:], coef_max, coef_name)
    tokens, sequences = values_of(per_token), values_of(per_sequence)
    remedy = f"raise {coef_name} or set kl_controller: pid with a kl_target, lower learning_rate"
    useless = [size * (RECOVERED if ongoing else 1.0) for size in (USELESS_PER_TOKEN, USELESS_PER_SEQUENCE)]
    if lasts(tokens, lambda kl: kl > useless[0]) and lasts(sequences, lambda kl: kl > useless[1]):
        seen = (
            f"the KL is at least {min(tokens[-SEVERAL:]):.3g} nats per token (threshold {useless[0]:g}) and "
            f"{min(sequences[-SEVERAL:]):.3g} per sequence (threshold {useless[1]:g}) {over(per_token)}"
        )
        return Finding(seen, "nothing holds the policy near the reference any more", remedy)
    recent = tokens[-SEVERAL - 1 :]
    doubles = len(recent) > SEVERAL and all(b >= GROWTH * a > 0 for a, b in itertools.pairwise(recent))
    is_notable = doubles and recent[-1] > NOTABLE * USELESS_PER_TOKEN and sequences[-1] > NOTABLE * USELESS_PER_SEQUENCE
    if is_notable:
        course = ", ".join(f"{kl:.3g}" for kl in recent)
        seen = (
            f"the KL per token has at least doubled from reading to reading {over(per_token, SEVERAL + 1)}: {course} "
            f"nats (threshold {NOTABLE * USELESS_PER_TOKEN:g}), {sequences[-1]:.3g} per sequence (threshold "
            f"{NOTABLE * USELESS_PER_SEQUENCE:g})"
        )
        return Finding(seen, "the learning rate is too high for this penalty, or the reward can be gamed", remedy)
    return None


def _beyond_target(recent: Sequence[Target], coef_max: float | None, coef_name: str) -> Finding | None:
    if len(recent) < SEVERAL:
        return None
    last, ratio = recent[-1], min(entry.kl / entry.target for entry in recent)
    at_maximum = [coef_max is not None and entry.coef >= AT_MAXIMUM * coef_max for entry in recent]
    threshold = OFF_TARGET if all(at_maximum) else FAR_FROM_TARGET
    if ratio <= threshold:
        return None
    seen = (
        f"the KL is at least {ratio:.3g} times its target (threshold {threshold:g}"
        f"{' at the largest ' + coef_name if all(at_maximum) else ''}) at the readings of steps {recent[0].step} to "
        f"{last.step}; last {last.kl:.3g} nats, target {last.target:.3g}, {coef_name} {last.coef:.3g}"
    )
    if at_maximum[-1]:
        return Finding(seen, "the controller has reached its largest beta", "raise kl_coef_max, lower learning_rate")
    return Finding(
        seen,
        "the controller moves too slowly, or its target fell",
        f"start from a larger {coef_name}, raise kl_kp (or lower kl_horizon), lower learning_rate",
    )


def collapse(
    per_sequence: Readings,
    first_gain: Readings,
    gain: Readings,
    paid: Readings,
    *,
    first_kl: float,
    spread: float | None,
    same_reward: float | None,
    entropy: float | None,
    weight: str,
    coef_name: str,
) -> Finding | None:
    """Nothing is learnt: a gain that has not risen, at a KL near zero or one that costs more than the reward can give.

    Args:
        per_sequence: KL since the end of the warm-up.
        first_gain, gain: the first readings of reward or DPO's margin in the run, and the latest.
        paid: beta times the KL per sequence, in units of the reward.
        first_kl: KL per sequence before the first update: scoring noise.
        spread: standard deviation of the reward as the loss sees it, None where there is none.
        same_reward: share of prompts whose answers all get the same reward, None where not known.
        entropy: last entropy per token, None where not measured.
        weight: beta and learning rate, in words.
        coef_name: what beta is called.
    """
    long_enough = per_sequence and per_sequence[-1].step - per_sequence[0].step >= LEARNING_STEPS
    if not long_enough or len(per_sequence) < LEARNING_READINGS or not is_flat(first_gain, gain):
        return None
    threshold = max(NOTHING, NOISE_MARGIN * first_kl)
    largest, costs = max(values_of(per_sequence)), values_of(paid)[-SEVERAL:]
    worth = math.inf if spread is None else PAID * spread
    too_dear = lasts(costs, lambda cost: cost > worth)
    if largest > threshold and not too_dear:
        return None
    early, late = (sum(values_of(part)) / len(part) for part in (first_gain, gain))
    seen = f"the gain went from {early:.3g} to {late:.3g}, within two standard errors, while the KL was "
    if largest <= threshold:
        seen += f"at most {largest:.2g} nats per sequence (threshold {threshold:.2g}) "
        seen += over(per_sequence, len(per_sequence))
    else:
        seen += f"paid for with at least {min(costs):.2g} (threshold {worth:.2g}, the reward's deviation) "
        seen += over(paid)
    seen += f"; {weight}"
    if same_reward is not None and same_reward >= NO_SIGNAL:
        seen += f"; {same_reward:.0%} of the prompts have answers of one reward only"
        return Finding(seen, "the rewards do not differ", "use a finer reward, or prompts that are sometimes solved")
    if largest > threshold:
        remedy = f"lower {coef_name}; where a controller has raised it, lower learning_rate, whose noise is in the KL"
        return Finding(seen, "the KL outweighs the reward", remedy)
    if entropy is not None and entropy <= NO_CHOICE:
        seen += f"; entropy {entropy:.2g} nats per token (threshold {NO_CHOICE:g})"
        return Finding(seen, "the policy hardly varies its answers", "raise temperature, or start from another model")
    return Finding(
        seen, "steps are too small, or the KL outweighs the reward", f"raise learning_rate or lower {coef_name}"
    )


def mode_collapse(entropy: Readings, per_sequence: Readings, *, first_entropy: float, coef_name: str) -> Finding | None:
    """The policy has one answer left: entropy near zero at a high KL. `first_entropy` is that of the first reading."""
    values, kl = values_of(entropy), values_of(per_sequence)
    threshold = min(NO_CHOICE, FALLEN * first_entropy)
    if not lasts(values, lambda h: h < threshold) or not lasts(kl, lambda nats: nats > PICKED):
        return None
    return Finding(
        f"entropy at most {max(values[-SEVERAL:]):.2g} nats per token (threshold {threshold:.2g}; at first "
        f"{first_entropy:.2g}) at a KL of at least {min(kl[-SEVERAL:]):.3g} nats per sequence (threshold {PICKED:g}) "
        f"{over(entropy)}",
        "one kind of answer earns the reward wherever it is given",
        f"raise {coef_name}, look at the answers and the reward function, add an entropy bonus (entropy_coef)",
    )


def is_flat(early: Readings, late: Readings) -> bool:
    """Whether there are enough of both, apart, and the later mean is at most two standard errors above the earlier."""
    if min(len(early), len(late)) < LEARNING_READINGS or late[0].step <= early[-1].step:
        return False
    parts = values_of(early), values_of(late)
    means = [sum(part) / len(part) for part in parts]
    squares = sum((value - mean) ** 2 for part, mean in zip(parts, means, strict=True) for value in part)
    variance = squares / (len(early) + len(late) - 2)
    return means[1] - means[0] <= 2 * math.sqrt(variance * (1 / len(early) + 1 / len(late)))
