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
SAME_DISTANCE = 3.0  # an engine of another precision stays as far away as it was; old weights fall behind
# Ratios of policy to engine above TRL's bound, 3 by default: 5 % of the answers are then 15 % of what the policy does.
CUT = 0.05
# Weights of mean 1 but for log-probs that two forwards of one model give otherwise: a noise of 0.2 nats (the deviation
# of SAMPLER_KL) makes it e^(0.2^2 / 2) = 1.02. Few prompts have a wide error, and answers that are used again deviate
# together: so many readings, and so many standard errors of their mean.
WEIGHTS_OFF, WEIGHTS_READINGS, WEIGHTS_ERRORS = 0.03, 10, 5.0
PROBABLE_ERRORS = 3.0  # to choose between causes of what is certain

_RAW_LOGPS = (
    "the sampler's log-probs are not those it sampled by (raw ones, without temperature and filters; another model's)",
    "have the engine report processed log-probs (a server: vllm serve --logprobs-mode processed_logprobs), at the "
    "policy's temperature",
)

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


def stale_sampler(
    ess: Readings, sampler_kl: Readings, first: Reading | None = None, mean: Readings = (), error: Readings = ()
) -> Finding | None:
    """Answers come from a policy that is no longer the one that is trained.

    Args:
        ess: effective sample size of the importance weights, as a fraction.
        sampler_kl: KL(sampler || trainer) when the answers were sampled, nats per token.
        first: the first of these readings in the run.
        mean, error: of the weights, as in `wrong_weights`.
    """
    few = lasts(values_of(ess), lambda fraction: fraction < FEW_EFFECTIVE)
    apart = lasts(values_of(sampler_kl), lambda kl: kl > SAMPLER_KL)
    if not few and not apart:
        return None
    seen = []
    if few:
        seen.append(
            f"the importance weights leave at most {max(values_of(ess)[-SEVERAL:]):.0%} of the samples effective "
            f"(threshold {FEW_EFFECTIVE:.0%}) {over(ess)}"
        )
    if apart:
        seen.append(
            f"sampler and trainer differ by at least {min(values_of(sampler_kl)[-SEVERAL:]):.2g} nats per token "
            f"(threshold {SAMPLER_KL:g}) {over(sampler_kl)}"
        )
        return Finding("; ".join(seen), *_why_apart(first, values_of(mean)[-SEVERAL:], values_of(error)[-SEVERAL:]))
    return Finding(
        "; ".join(seen),
        "the policy moves far between sampling and its last update",
        "take fewer updates per rollout (num_iterations, steps_per_generation, num_ppo_epochs) or end them by "
        "kl_sampler_target, lower learning_rate, set kl_is_cap",
    )


def _why_apart(first: Reading | None, mean: Sequence[float], error: Sequence[float]) -> tuple[str, str]:
    """Likely cause and remedy where an engine is far from the trainer.

    Weights over what it really samples by average 1, however old it is; old weights were right at first.
    """
    if mean and error and sum(mean) / len(mean) - 1 > max(WEIGHTS_OFF, PROBABLE_ERRORS * _error_of_mean(error)):
        return _RAW_LOGPS
    if first is not None and first.value < SAMPLER_KL / SAME_DISTANCE:
        return (
            "the inference engine keeps old weights: it was close to the trainer at first",
            "check that weights reach the engine before each rollout (one server per run; in a rollout of your own, "
            "trainer.vllm_generation.sync_weights())",
        )
    return (
        "the inference engine has another model, a much coarser precision (quantised weights), another temperature or "
        "truncation (top_p, top_k)",
        "give the engine the trainer's model, precision and temperature, and sample from the whole distribution",
    )


def coarse_sampler(sampler_kl: Readings, first: Reading | None, *, noise: float, precision: str) -> Finding | None:
    """The engine has the trainer's weights and scores more coarsely.

    Args:
        sampler_kl, first: as in `stale_sampler`, which is raised beyond `SAMPLER_KL`.
        noise: the most that scoring in the trainer's `precision` explains, nats per token.
    """
    if first is None or first.value <= noise:
        return None
    most = min(SAMPLER_KL, SAME_DISTANCE * first.value)
    if not lasts(values_of(sampler_kl), lambda kl: noise < kl <= most):
        return None
    return Finding(
        f"sampler and trainer differ by {sampler_kl[-1].value:.2g} nats per token (threshold {noise:.2g}: scoring "
        f"noise of {precision}), as much as at first ({first.value:.2g})",
        "the inference engine runs in another dtype than the trainer; vLLM turns float32 checkpoints into bfloat16",
        "train in the engine's precision (bf16: true), or give the engine the trainer's (a server: --dtype); the "
        "weights correct a KL in the loss meanwhile",
    )


def cut_ratios(share: Readings) -> Finding | None:
    """TRL's bound on the ratio of policy to engine takes a part of the answers out of the policy gradient.

    Args:
        share: of answers (of tokens, in the token modes) whose ratio is out of bounds.
    """
    if not lasts(values_of(share), lambda cut: cut > CUT):
        return None
    return Finding(
        f"at least {min(values_of(share)[-SEVERAL:]):.0%} of the ratios of policy to engine (threshold {CUT:.0%}) are "
        f"clipped or dropped {over(share)}",
        "engine and trainer are apart over whole answers (precision adds up over long ones; old weights), and those "
        "that the policy prefers are lost, with their rewards and with a KL in the reward",
        "raise vllm_importance_sampling_clip_max, take vllm_importance_sampling_mode token_truncate with the KL in the "
        "loss, or bring the engine closer (precision, synchronisation)",
    )


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
    average, error_of_average = sum(values) / len(values), _error_of_mean(errors)
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
    return Finding(seen, *_RAW_LOGPS)


def _error_of_mean(error: Sequence[float]) -> float:
    return math.sqrt(sum(e * e for e in error)) / len(error)


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
