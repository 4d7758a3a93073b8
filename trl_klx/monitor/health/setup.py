"""Alarms about what a run is made of: its reference, its sampler, its pairs and its mask.

Functions of plain numbers, as in `course`.
"""

import math
from collections.abc import Sequence

from .readings import SEVERAL, Finding, Reading, Readings, lasts, over, values_of

# Below half, the weights' variance is larger than their squared mean: the rule of thumb at which particle filters
# resample (Doucet and Johansen 2009, "A Tutorial on Particle Filtering and Smoothing").
FEW_EFFECTIVE = 0.5
# An engine in bf16 with the trainer's weights differs by 0.05 nats per token (standard deviation; huggingface/trl issue
# 6789), a KL of 0.05^2 / 2 = 0.00125. This is four times that deviation, 0.2.
SAMPLER_KL = 0.02
# Weights of mean 1 but for log-probs that two forwards of one model give otherwise: a noise of 0.2 nats (the deviation
# of SAMPLER_KL) makes it e^(0.2^2 / 2) = 1.02. Few prompts have a wide error, and answers that are used again deviate
# together: so many readings, and so many standard errors of their mean.
WEIGHTS_OFF, WEIGHTS_READINGS, WEIGHTS_ERRORS = 0.03, 10, 5.0

# Lengths differ by a tenth; the length difference explains half of the margin's variance (a correlation of 0.7), and,
# by the slope, 0.5 nats of it on average. By chance 16 pairs correlate so in 0.2 % of readings.
LENGTHS_DIFFER, EXPLAINED, MARGIN_BY_LENGTH = 0.1, 0.5, 0.5
ANSWERS_GREW = 1.3  # the policy's answers, towards the length of the chosen ones: beyond the noise of 64 answers

# Of the KL; and nats per answer: the smallest KL that the starter recipes hold is 0.2.
MOST, WORTH_HIDING = 0.5, 0.1


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
        "give the model that the policy starts from as the reference; if another one is meant, this is its distance",
    )


def stale_sampler(ess: Readings, sampler_kl: Readings) -> Finding | None:
    """Answers come from a policy that is no longer the one that is trained.

    Args:
        ess: effective sample size of the importance weights, as a fraction.
        sampler_kl: KL(sampler || trainer) at the same weights, nats per token.
    """
    if lasts(values_of(ess), lambda fraction: fraction < FEW_EFFECTIVE):
        return Finding(
            f"the importance weights leave at most {max(values_of(ess)[-SEVERAL:]):.0%} of the samples effective "
            f"(threshold {FEW_EFFECTIVE:.0%}) {over(ess)}",
            "the policy moves far between sampling and its last update",
            "take fewer updates per rollout (num_iterations, steps_per_generation, num_ppo_epochs), lower "
            "learning_rate, set kl_is_cap",
        )
    if lasts(values_of(sampler_kl), lambda kl: kl > SAMPLER_KL):
        return Finding(
            f"sampler and trainer differ by at least {min(values_of(sampler_kl)[-SEVERAL:]):.2g} nats per token "
            f"(threshold {SAMPLER_KL:g}) {over(sampler_kl)}",
            "the inference engine has old weights, another precision, temperature or truncation (top_p, top_k)",
            "check that weights are synchronised before each rollout, and that both score at one temperature",
        )
    return None


def wrong_weights(mean: Readings, error: Readings, ess: Readings) -> Finding | None:
    """The importance weights are wrong: their mean is not 1, so the answers were sampled by something else.

    Args:
        mean: of the tokens' weights.
        error: its standard error, at the same steps.
        ess: effective sample size; where it is small the mean is not informative, and `stale_sampler` is raised
        instead.
    """
    values, errors = values_of(mean)[-WEIGHTS_READINGS:], values_of(error)[-WEIGHTS_READINGS:]
    if min(len(values), len(errors)) < WEIGHTS_READINGS or (ess and ess[-1].value < FEW_EFFECTIVE):
        return None
    average = sum(values) / len(values)
    error_of_average = math.sqrt(sum(e * e for e in errors)) / len(errors)
    if abs(average - 1) <= max(WEIGHTS_OFF, WEIGHTS_ERRORS * error_of_average):
        return None
    seen = (
        f"the importance weights average {average:.3f} +- {error_of_average:.2g} (threshold 1 +- {WEIGHTS_OFF:g} and "
        f"{WEIGHTS_ERRORS:g} standard errors) {over(mean, WEIGHTS_READINGS)}"
    )
    if average < 1:
        return Finding(
            seen,
            "the sampler never produces what the policy might (top_k, top_p, min_p, banned or forced tokens)",
            "sample from the whole policy at its temperature: top_p 1, top_k 0, no generation_kwargs that change it",
        )
    return Finding(
        seen,
        "the sampler's log-probs are not those it sampled by (raw ones at a temperature, another model's)",
        "have the engine report processed log-probs (logprobs_mode), at the policy's temperature",
    )


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
    values, slopes, seen = values_of(correlation), values_of(slope), ""
    explained = lasts(values, lambda r: r * r >= EXPLAINED)
    if explained and lasts(slopes, lambda nats: abs(nats * difference) >= MARGIN_BY_LENGTH):
        seen = (
            f"the length difference explains at least {min(r * r for r in values[-SEVERAL:]):.0%} of the margin's "
            f"variance (threshold {EXPLAINED:.0%}), {slopes[-1]:+.2g} nats per token {over(correlation)}"
        )
    elif answers and answers[0].value > 0:
        first, factor = answers[0].value, ANSWERS_GREW if difference > 0 else 1 / ANSWERS_GREW
        if lasts(values_of(answers[1:]), lambda n: n > factor * first if difference > 0 else n < factor * first):
            seen = (
                f"the policy's own answers went from {first:.3g} tokens to {answers[-1].value:.3g} (threshold "
                f"{factor * first:.3g}) {over(answers)}"
            )
    if not seen:
        return None
    return Finding(
        f"chosen answers have {chosen[-1].value:.3g} tokens and rejected ones {rejected[-1].value:.3g}; {seen}",
        f"the pairs prefer {'longer' if difference > 0 else 'shorter'} answers, whatever else they prefer",
        "balance the lengths of the pairs, set ld_alpha below 1, or use a loss that divides by length",
    )


def hidden_kl(share: Readings, nats: Readings) -> Finding | None:
    """The measured KL misses most of it.

    Args:
        share: of the KL, on tokens that the policy made and the loss mask leaves out.
        nats: that KL per answer, over all answers.
    """
    if not lasts(values_of(share), lambda s: s > MOST) or not lasts(values_of(nats), lambda kl: kl > WORTH_HIDING):
        return None
    return Finding(
        f"at least {min(values_of(share)[-SEVERAL:]):.0%} of the KL (threshold {MOST:.0%}), {nats[-1].value:.3g} nats "
        f"per answer (threshold {WORTH_HIDING:g}), lies on tokens that the loss mask leaves out {over(share)}",
        "answers that are cut off drift where neither reward nor KL sees them (mask_truncated_completions, env_mask)",
        "raise max_completion_length, set mask_truncated_completions: false, check env_mask",
    )
