"""The maths of KL to a reference: pure functions of tensors, torch only.

One idea per file: `masking`, `estimators` (k1, k2, k3), `exact` (full vocabulary, dense), `chunked/` (the same in
chunks of tokens, with its own backward), `logits` (what a model does to its head's outputs), `importance` (off-policy
weights), `loss` (KL as a loss), `reward` (KL as a penalty in the reward), `term` (one configuration of them),
`gradients` (which gradient a configuration has), `variance` (how noisy that gradient is) and `sampling` (what an
estimate reads on another distribution's answers).
Everything is in nats.
"""

from .chunked import TokenScores, chunked_exact_kl, chunked_exact_kl_from_logits, float32_linear, token_scores
from .estimators import kl_estimate, log_ratio
from .exact import exact_kl
from .gradients import expected_gradient
from .importance import effective_sample_size, importance_weights, kl_to_sampler
from .loss import kl_loss
from .masking import fill_masked, last_token_index, masked_mean, masked_sum
from .reward import kl_credit, leave_one_out_baseline
from .term import KLTerm

__all__ = [
    "KLTerm",
    "TokenScores",
    "chunked_exact_kl",
    "chunked_exact_kl_from_logits",
    "effective_sample_size",
    "exact_kl",
    "expected_gradient",
    "fill_masked",
    "float32_linear",
    "importance_weights",
    "kl_credit",
    "kl_estimate",
    "kl_loss",
    "kl_to_sampler",
    "last_token_index",
    "leave_one_out_baseline",
    "log_ratio",
    "masked_mean",
    "masked_sum",
    "token_scores",
]
