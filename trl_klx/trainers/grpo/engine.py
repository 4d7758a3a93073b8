"""How far the policy that sampled is from the one that is trained, above all where it is an inference engine.

Shape legend: B answers, C completion tokens.
"""

from typing import Any

from torch import Tensor

from ...kl.term import KLTerm
from ..session.metrics import Metrics
from ..session.session import KLSession
from ..shared.engine import cut_ratios, engine_kl
from .batch import scored_by_sampler


def measure_sampler(
    kl: KLSession,
    metrics: Metrics,
    mode: str,
    args: Any,
    term: KLTerm,
    policy_logps: Tensor,
    inputs: dict,
    mask: Tensor,
    token_weights: Tensor,
    *,
    is_first_use: bool,
) -> None:
    """Take a batch whose sampler is not the policy into `kl/weight_mean`, `kl/ess`, and with an engine the rest.

    Args:
        kl, metrics, mode, args, term: of the trainer.
        policy_logps: (B, C) of the policy, without gradient.
        inputs: TRL's batch.
        mask: (B, C) tokens that count.
        token_weights: (B, C) ratios of policy to sampler.
        is_first_use: whether the policy has not been trained on these answers yet.
    """
    if is_first_use:
        kl.weight_mean.add(mode, token_weights, scored_by_sampler(inputs, mask), inputs["kl_prompts"])
    by_engine = "sampling_per_token_logps" in inputs
    if by_engine:
        # TRL has the trainer's log-probs of the rollout where it needs them; else the policy has not moved since.
        both = inputs.get("old_per_token_logps", policy_logps), inputs["sampling_per_token_logps"]
        kl.sampler_kl.add(mode, *engine_kl(*both, mask), inputs["kl_prompts"])
        if "importance_sampling_ratio" in inputs:
            metrics.pool(mode, {"kl/ratio_cut": cut_ratios(*both, mask, args)})
    if by_engine or term.depends_on_sampler:
        metrics.defer_weights(mode, token_weights, mask, term)
