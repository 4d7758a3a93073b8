"""What a sampled KL reads on answers of a cut or sharpened distribution: enumerated exactly on small policies."""

import torch
from torch import Tensor

from .estimators import Estimator, kl_estimate
from .variance import DISTANCES, World, world

KL = 0.10  # nats per answer of the policy to its reference, in the family of `variance`


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
