"""What becomes of a KL whose answers another distribution gives: enumerated exactly on small policies.

`reading` is the value of an estimate on answers of a cut or sharpened distribution, `engine_error` the gradient on
those of an inference engine with other weights or another precision.
"""

import functools

import torch
from torch import Tensor

from .estimators import Estimator, kl_estimate
from .exact import exact_kl
from .reward import kl_credit
from .term import KLTerm
from .variance import DISTANCES, World, answers_mean, expected, sampler_behind, world

KL = 0.10  # nats per answer of the policy to its reference, in the family of `variance`
ENGINES = (0.01, 0.40)  # KL(policy || engine) in nats per answer: as close as one in bfloat16, and far behind


def sampler_logits(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(S, V) logits that a sampler draws from, -inf for tokens that it never gives, as transformers and vLLM cut.

    Args:
        logits: (S, V) of the policy, at the temperature at which it is scored.
        temperature: the sampler's, in units of that one.
        top_p: the smallest set of likeliest tokens with this much probability is kept.
        min_p: tokens with this part of the likeliest token's probability are kept.
    """
    logits = logits / temperature
    probs = logits.softmax(-1)
    ordered = probs.sort(-1, descending=True)
    likelier = torch.zeros_like(probs).scatter(-1, ordered.indices, ordered.values.cumsum(-1) - ordered.values)
    kept = (likelier < top_p) & (probs >= min_p * probs.amax(-1, keepdim=True))
    return logits.masked_fill(~kept, -torch.inf)


def reading(estimator: Estimator, sampler: Tensor, *, is_weighted: bool) -> float:
    """Expected sum of an estimate over an answer of `sampler`, (S, V) logits; the policy's own KL is `KL` nats.

    Args:
        estimator: k1, k2 or k3.
        sampler: logits that answers are drawn from, in the states of `enumerated_policy`.
        is_weighted: whether each token counts by its weight policy/sampler, as the trainers weigh it.
    """
    here = enumerated_policy()
    logps, sampler_logps = here.logps(here.policy), here.logps(sampler)
    drawn = sampler_logps.isfinite().all(-1)
    values = kl_estimate(logps, here.logps(here.ref), estimator)
    weights = (logps - sampler_logps).exp() if is_weighted else torch.ones_like(logps)
    return float((here.probs(sampler)[:, None] * weights * values)[drawn].sum())


def enumerated_policy() -> World:
    """The policy, `KL` nats from its reference, whose answers are enumerated."""
    return world(DISTANCES[KL])


def bounded_ratios(log_ratios: Tensor, mode: str, *, low: float | None, high: float | None) -> Tensor:
    """(N, T) ratios of policy to engine as TRL's `vllm_importance_sampling_mode` bounds them, all tokens counting.

    Args:
        log_ratios: (N, T) of the tokens.
        mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask"; "off" for none, 1.
        low, high: `vllm_importance_sampling_clip_min` and `_max`.
    """
    if mode == "off":
        return torch.ones_like(log_ratios)
    whole = mode.startswith("sequence")
    ratios = (log_ratios.sum(-1, keepdim=True).expand_as(log_ratios) if whole else log_ratios).exp()
    bounded = ratios if low is None and high is None else ratios.clamp(low, high)
    return bounded if mode.endswith("truncate") else torch.where(bounded == ratios, ratios, 0.0)


@functools.cache
def engine_error(term: KLTerm, behind: float, mode: str, low: float | None, high: float | None) -> float:
    """How far the expected gradient is from that on the policy's own answers, as a part of it.

    The engine samples, the trainer scores: the values of a KL in the reward are the policy's, and TRL's ratio stands
    before them; a KL in the loss has its own weight of policy to engine.

    Args:
        term: what the KL is.
        behind: KL(policy || engine) in nats per answer, one of `ENGINES`.
        mode, low, high: as in `bounded_ratios`.
    """
    here = enumerated_policy()
    engine = sampler_behind(here, behind)
    logits = here.policy[here.states].clone().requires_grad_()
    logps = logits.log_softmax(-1).gather(-1, here.actions[..., None]).squeeze(-1)
    ref_logps, engine_logps, probs = here.logps(here.ref), here.logps(engine), here.probs(engine)
    mask = torch.ones_like(here.actions, dtype=torch.bool)
    exact = exact_kl(logits, here.ref[here.states], term.direction)
    mean = None
    if term.reward_at_update:
        mean = (probs[:, None] * term.credit(logps, ref_logps, mask, exact=exact)).sum(0)
    losses = term.at_update(logps, ref_logps, mask, sampler_logps=engine_logps, exact=exact, baseline=mean)
    objective = sum((loss.sum() for loss in losses.values()), torch.zeros((), dtype=torch.float64))
    if term.in_reward and not term.reward_at_update:
        credit = kl_credit(term.penalty(logps, ref_logps, mask, exact=exact), mask, credit=term.credit_kind)
        credit = credit - (probs[:, None] * credit).sum(0)
        ratios = bounded_ratios((logps - engine_logps).detach(), mode, low=low, high=high)
        objective = objective + (ratios * credit * logps).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    found, wanted = answers_mean(here, gradient, probs), expected(here, term)
    return float((found - wanted).norm() / wanted.norm())
