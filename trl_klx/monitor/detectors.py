"""What a health alarm is: functions of plain numbers that say what is wrong with a run, or None.

Each takes readings, (step, value) in order of time, and gives a `Finding`: what was seen against which threshold, what
the likely cause is and what to change. The thresholds are the constants at the top, each with its reason. KL in nats.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

# One batch is noise, and a controller may overshoot once: what lasts for so many logged readings is neither.
SEVERAL = 3

# A controller that works keeps the KL within a factor of its target; the PID's overshoot in the starter recipes is 1.3.
FAR_FROM_TARGET = 3.0
# At its largest beta a controller has nothing left to do, so a smaller excess, the one that counts as "held", suffices.
OFF_TARGET, AT_MAXIMUM = 1.25, 0.99
# Beyond any useful size, when both: the answers are such as the reference gives once in e^20 = 5e8 (a KL of 20 nats is
# that of the best of 1.3e9 samples), and that is not the sum of many small changes, but e = 2.7 times at every token.
# Short answers may need the second (an answer of one token that was right once in ten: 2.3 nats), long ones the first.
USELESS_PER_SEQUENCE, USELESS_PER_TOKEN = 20.0, 1.0
# Explosive: doubled from reading to reading, SEVERAL times, up to a quarter of that size. From zero everything doubles.
GROWTH, NOTABLE = 2.0, 0.25

# By Pinsker's inequality at most sqrt(0.001 / 2) = 2 % of the answers' probability has moved: nothing is learnt.
NOTHING = 1e-3
NOISE_MARGIN = 1.2  # a KL that is no more than that of step 0, which one batch measured, is scoring noise
LEARNING_STEPS, LEARNING_READINGS = 50, 5  # after the warm-up; a working run has moved by then (starter: 0.05 nats)
NO_SIGNAL = 0.95  # share of prompts whose answers all get one reward

# e^0.05: the policy has 1.05 choices per token. Some tasks end there, with one right answer to each prompt; so the
# entropy must also have fallen to a quarter of its first value, and the KL be more than picking the one answer in
# e^10 = 22,000 of the reference's own.
NO_CHOICE, FALLEN, PICKED = 0.05, 0.25, 10.0

# Below half, the weights' variance is larger than their squared mean: the rule of thumb at which particle filters
# resample (Doucet and Johansen 2009, section 3.5).
FEW_EFFECTIVE = 0.5
# An engine in bf16 with the trainer's weights differs by 0.05 nats per token (standard deviation; huggingface/trl issue
# 6789), a KL of 0.05^2 / 2 = 0.00125. This is four times that deviation, 0.2.
SAMPLER_KL = 0.02

# Lengths differ by a tenth; the length difference explains half of the margin's variance (a correlation of 0.7), and,
# by the slope, 0.5 nats of it on average. By chance 16 pairs correlate so in 0.2 % of readings.
LENGTHS_DIFFER, EXPLAINED, MARGIN_BY_LENGTH = 0.1, 0.5, 0.5
ANSWERS_GREW = 1.3  # the policy's answers, towards the length of the chosen ones: beyond the noise of 64 answers

# Of the KL; and nats per answer: the smallest KL that the starter recipes hold is 0.2.
MOST, WORTH_HIDING = 0.5, 0.1


class Reading(NamedTuple):
    """One logged number."""

    step: int
    value: float


class Target(NamedTuple):
    """What a controller read, and what it set."""

    step: int
    kl: float
    target: float
    coef: float


class Finding(NamedTuple):
    """One alarm, in sentences without their full stops."""

    evidence: str
    cause: str
    remedy: str


Readings = Sequence[Reading]


def runaway(
    targets: Sequence[Target], per_token: Readings, per_sequence: Readings, *, coef_max: float | None, coef_name: str
) -> Finding | None:
    """KL far beyond its target; without a target, beyond any useful size or on its way there.

    Args:
        targets: of runs with a controller that has a target; where there are any, only they count.
        per_token, per_sequence: the KL in both units, at the same steps.
        coef_max: the largest beta that the controller may set, None if it has no bound.
        coef_name: what beta is called.
    """
    if targets:
        return _beyond_target(targets[-SEVERAL:], coef_max, coef_name)
    tokens, sequences = _values(per_token), _values(per_sequence)
    remedy = f"raise {coef_name} or set kl_controller: pid with a kl_target, lower learning_rate"
    if _lasts(tokens, lambda kl: kl > USELESS_PER_TOKEN) and _lasts(sequences, lambda kl: kl > USELESS_PER_SEQUENCE):
        seen = (
            f"the KL is at least {min(tokens[-SEVERAL:]):.3g} nats per token (threshold {USELESS_PER_TOKEN:g}) and "
            f"{min(sequences[-SEVERAL:]):.3g} per sequence (threshold {USELESS_PER_SEQUENCE:g}) {_over(per_token)}"
        )
        return Finding(seen, "nothing holds the policy near the reference, whose judgement it has left", remedy)
    recent = tokens[-SEVERAL - 1 :]
    doubles = len(recent) > SEVERAL and all(b >= GROWTH * a > 0 for a, b in itertools.pairwise(recent))
    is_notable = doubles and recent[-1] > NOTABLE * USELESS_PER_TOKEN and sequences[-1] > NOTABLE * USELESS_PER_SEQUENCE
    if is_notable:
        course = ", ".join(f"{kl:.3g}" for kl in recent)
        seen = (
            f"the KL per token has at least doubled from reading to reading {_over(per_token, SEVERAL + 1)}: {course} "
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
    gain: Readings,
    *,
    first_kl: float,
    same_reward: float | None,
    entropy: float | None,
    weight: str,
) -> Finding | None:
    """Nothing is learnt: KL near zero and a gain that does not rise.

    Args:
        per_sequence: KL since the end of the warm-up.
        gain: the reward, or DPO's margin, over the same steps.
        first_kl: KL per sequence before the first update: scoring noise.
        same_reward: share of prompts whose answers all get the same reward, None where not known.
        entropy: last entropy per token, None where not measured.
        weight: beta and learning rate, in words.
    """
    long_enough = per_sequence and per_sequence[-1].step - per_sequence[0].step >= LEARNING_STEPS
    if not long_enough or min(len(per_sequence), len(gain)) < LEARNING_READINGS:
        return None
    threshold = max(NOTHING, NOISE_MARGIN * first_kl)
    largest = max(_values(per_sequence))
    if largest > threshold or not is_flat(_values(gain)):
        return None
    mean = sum(_values(gain)) / len(gain)
    seen = (
        f"the KL is at most {largest:.2g} nats per sequence (threshold {threshold:.2g}) and the "
        f"gain flat at {mean:.3g} {_over(per_sequence, len(per_sequence))}"
    )
    if same_reward is not None and same_reward >= NO_SIGNAL:
        seen += f"; {same_reward:.0%} of the prompts have answers of one reward only"
        return Finding(seen, "the rewards do not differ", "use a finer reward, or prompts that are solved now and then")
    if entropy is not None and entropy <= NO_CHOICE:
        seen += f"; entropy {entropy:.2g} nats per token (threshold {NO_CHOICE:g})"
        return Finding(seen, "the policy hardly varies its answers", "raise temperature, or start from another model")
    return Finding(
        f"{seen}; {weight}", "the KL outweighs the reward, or steps are too small", "lower beta or raise learning_rate"
    )


def mode_collapse(entropy: Readings, per_sequence: Readings, *, first_entropy: float) -> Finding | None:
    """The policy has one answer left: entropy near zero at a high KL. `first_entropy` is that of the first reading."""
    values, kl = _values(entropy), _values(per_sequence)
    threshold = min(NO_CHOICE, FALLEN * first_entropy)
    if not _lasts(values, lambda h: h < threshold) or not _lasts(kl, lambda nats: nats > PICKED):
        return None
    return Finding(
        f"entropy at most {max(values[-SEVERAL:]):.2g} nats per token (threshold {threshold:.2g}; at first "
        f"{first_entropy:.2g}) at a KL of at least {min(kl[-SEVERAL:]):.3g} nats per sequence (threshold {PICKED:g}) "
        f"{_over(entropy)}",
        "one kind of answer earns the reward wherever it is given",
        "raise beta, look at the answers and the reward function, add an entropy bonus (entropy_coef)",
    )


def wrong_reference(
    first: Reading | None, *, noise: float, precision: str, mismatches: Sequence[str] = ()
) -> Finding | None:
    """The policy does not start as its reference.

    Args:
        first: what was measured before the first update, in the unit of `noise`.
        noise: the most that scoring in this `precision` explains.
        mismatches: other differences between policy and reference, in words.
    """
    seen = list(mismatches)
    if first is not None and abs(first.value) > noise:
        seen.append(
            f"before the first update the policy is {abs(first.value):.2g} nats per token away from the reference "
            f"(threshold {noise:.2g}: scoring noise of {precision})"
        )
    if not seen:
        return None
    return Finding(
        "; ".join(seen),
        "the reference is another model than the policy starts from (path, revision, adapter, tokenizer), or one of "
        "the two runs with dropout or in a lower precision",
        "give the reference that the policy starts from; if another one is meant, this is its distance",
    )


def stale_sampler(ess: Readings, sampler_kl: Readings) -> Finding | None:
    """Answers come from a policy that is no longer the one that is trained.

    Args:
        ess: effective sample size of the importance weights, as a fraction.
        sampler_kl: KL(sampler || trainer) at the same weights, nats per token.
    """
    if _lasts(_values(ess), lambda fraction: fraction < FEW_EFFECTIVE):
        return Finding(
            f"the importance weights leave at most {max(_values(ess)[-SEVERAL:]):.0%} of the samples effective "
            f"(threshold {FEW_EFFECTIVE:.0%}) {_over(ess)}",
            "the policy moves far between sampling and its last update",
            "take fewer updates per rollout (num_iterations, steps_per_generation, num_ppo_epochs), lower "
            "learning_rate, set kl_is_cap",
        )
    if _lasts(_values(sampler_kl), lambda kl: kl > SAMPLER_KL):
        return Finding(
            f"sampler and trainer differ by at least {min(_values(sampler_kl)[-SEVERAL:]):.2g} nats per token "
            f"(threshold {SAMPLER_KL:g}) {_over(sampler_kl)}",
            "the inference engine has old weights, another precision, temperature or truncation (top_p, top_k)",
            "check that weights are synchronised before each rollout, and that both score at one temperature",
        )
    return None


def length_bias(
    correlation: Readings, slope: Readings, chosen: Readings, rejected: Readings, answers: Readings
) -> Finding | None:
    """DPO learns a length: the margin follows it, or the policy's answers do.

    Args:
        correlation: of log-ratio margin and length difference, over pairs.
        slope: nats of margin per token of difference.
        chosen, rejected: mean lengths in the data, tokens.
        answers: mean length of the policy's own answers, the first before the first update.
    """
    if not chosen or not rejected:
        return None
    difference = chosen[-1].value - rejected[-1].value
    relative = difference / max((chosen[-1].value + rejected[-1].value) / 2, 1.0)
    if abs(relative) < LENGTHS_DIFFER:
        return None
    data = f"chosen answers have {chosen[-1].value:.3g} tokens and rejected ones {rejected[-1].value:.3g}"
    cause = f"the pairs prefer {'longer' if difference > 0 else 'shorter'} answers, whatever else they prefer"
    remedy = "balance the lengths of the pairs, set ld_alpha below 1, or use a loss that divides by length"
    values, slopes = _values(correlation), _values(slope)
    explained = _lasts(values, lambda r: r * r >= EXPLAINED)
    if explained and _lasts(slopes, lambda nats: abs(nats * difference) >= MARGIN_BY_LENGTH):
        return Finding(
            f"{data}; the length difference explains at least {min(r * r for r in values[-SEVERAL:]):.0%} of the "
            f"margin's variance (threshold {EXPLAINED:.0%}), {slopes[-1]:+.2g} nats per token {_over(correlation)}",
            cause,
            remedy,
        )
    if answers and answers[0].value > 0:
        first, factor = answers[0].value, ANSWERS_GREW if difference > 0 else 1 / ANSWERS_GREW
        if _lasts(_values(answers[1:]), lambda n: n > factor * first if difference > 0 else n < factor * first):
            return Finding(
                f"{data}; the policy's own answers went from {first:.3g} tokens to {answers[-1].value:.3g} (threshold "
                f"{factor * first:.3g}) {_over(answers)}",
                cause,
                remedy,
            )
    return None


def hidden_kl(share: Readings, nats: Readings) -> Finding | None:
    """The measured KL misses most of it.

    Args:
        share: of the KL, on tokens that the policy made and the loss mask leaves out.
        nats: that KL per answer, over all answers.
    """
    if not _lasts(_values(share), lambda s: s > MOST) or not _lasts(_values(nats), lambda kl: kl > WORTH_HIDING):
        return None
    return Finding(
        f"at least {min(_values(share)[-SEVERAL:]):.0%} of the KL (threshold {MOST:.0%}), {nats[-1].value:.3g} nats "
        f"per answer (threshold {WORTH_HIDING:g}), lies on tokens that the loss mask leaves out {_over(share)}",
        "answers that are cut off drift where neither reward nor KL sees them (mask_truncated_completions, env_mask)",
        "raise max_completion_length, set mask_truncated_completions: false, check env_mask",
    )


def is_flat(values: Sequence[float]) -> bool:
    """Whether the second half does not lie above the first by more than two standard errors of the difference."""
    half = len(values) // 2
    early, late = values[:half], values[half:]
    if len(early) < 2:
        return False
    means = [sum(part) / len(part) for part in (early, late)]
    squares = sum(sum((v - mean) ** 2 for v in part) for part, mean in zip((early, late), means, strict=True))
    variance = squares / (len(values) - 2)
    return means[1] - means[0] <= 2 * math.sqrt(variance * (1 / len(early) + 1 / len(late)))


def _values(readings: Readings) -> list[float]:
    return [reading.value for reading in readings]


def _lasts(values: Sequence[float], is_bad) -> bool:
    return len(values) >= SEVERAL and all(map(is_bad, values[-SEVERAL:]))


def _over(readings: Readings, count: int = SEVERAL) -> str:
    recent = readings[-count:]
    return f"at the readings of steps {recent[0].step} to {recent[-1].step}"
