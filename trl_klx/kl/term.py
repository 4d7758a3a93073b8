"""One KL configuration as a pure function: what a trainer adds to its loss and to its advantages."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .estimators import kl_estimate
from .exact import Direction
from .gradients import Gradient, credit_in_use, expected_gradient
from .importance import WeightMode, bounded_weights, importance_weights
from .loss import kl_loss, value_with_slope
from .masking import fill_masked
from .reward import Credit, kl_credit

EstimatorOrExact = Literal["k1", "k2", "k3", "exact"]
Placement = Literal["none", "loss", "reward", "both"]
RewardCredit = Literal["return_to_go", "immediate", "sequence"]
WeightChoice = Literal["none", "token", "prefix", "sequence"]


@dataclass(frozen=True)
class KLTerm:
    """Estimator, placement, credit and importance weight of a KL penalty, without its coefficient beta.

    `loss` and `credit` are what the trainers use and what the tests enumerate; `gradient` is what they amount to.
    """

    estimator: EstimatorOrExact = "k3"
    placement: Placement = "loss"
    reward_credit: RewardCredit = "return_to_go"
    weight_level: WeightChoice = "token"
    weight_mode: WeightMode = "truncate"
    weight_cap: float | None = None
    value_cap: float | None = None
    direction: Direction = "reverse"

    @property
    def in_loss(self) -> bool:
        return self.placement in ("loss", "both")

    @property
    def in_reward(self) -> bool:
        return self.placement in ("reward", "both")

    @property
    def weighted(self) -> bool:
        return self.weight_level != "none"

    @property
    def takes_weights(self) -> bool:
        """Whether the loss is multiplied by importance weights.

        An exact KL needs no token weight: it averages over the policy's tokens itself, so a token weight of mean 1
        would only add variance.
        """
        return self.weighted and not (self.weight_level == "token" and self.estimator == "exact")

    @property
    def gradient(self) -> Gradient:
        """Expected on-policy gradient (with direction "reverse")."""
        return expected_gradient(self.estimator, self.placement, self.reward_credit, self.weighted)

    def weights(self, logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor | None:
        """(B, T) importance weights on the KL loss, or None where `takes_weights` is False."""
        if self.weight_level == "none" or not self.takes_weights:
            return None
        return importance_weights(
            logps, sampler_logps, mask, level=self.weight_level, mode=self.weight_mode, cap=self.weight_cap
        )

    def loss(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
        weights: Tensor | None = None,
        exact: Tensor | None = None,
    ) -> Tensor:
        """(B, T) KL loss in nats per token, 0 on masked positions.

        Args:
            logps: (B, T) log-probs of the sampled tokens under the policy, with gradient.
            ref_logps: (B, T) the same under the reference.
            mask: (B, T) tokens that count.
            sampler_logps: (B, T) the same under the policy that sampled; None on-policy.
            weights: (B, T) untruncated importance weights at `weight_level`, where the caller has them already.
            exact: (B, T) exact KL with gradient; needed by the estimator "exact" only.

        Raises:
            ValueError: the estimator is "exact" and `exact` is None.
        """
        if weights is None:
            weights = self.weights(logps, logps if sampler_logps is None else sampler_logps, mask)
        else:
            weights = bounded_weights(weights, mode=self.weight_mode, cap=self.weight_cap)
        if self.estimator != "exact":
            per_token = kl_loss(logps, ref_logps, estimator=self.estimator, weights=weights, value_cap=self.value_cap)
        elif exact is None:
            raise ValueError("estimator='exact' needs the full-vocabulary KL of each token: pass exact.")
        else:
            slope = torch.ones_like(exact) if weights is None else weights
            value = slope * exact if self.value_cap is None else (slope * exact).clamp(max=self.value_cap)
            per_token = value_with_slope(exact, value, slope)
        return torch.where(mask.bool(), per_token, 0.0)

    @property
    def credit_kind(self) -> Credit:
        """What the reward charges a token for, `reward_credit` or "future" where the loss has the token's own KL."""
        used = credit_in_use(self.estimator, self.placement, self.reward_credit, self.weighted)
        return "future" if used == "future" else self.reward_credit

    def penalty(self, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, exact: Tensor | None = None) -> Tensor:
        """(B, T) KL of each token as a penalty in the reward: nats, without gradient, 0 on masked positions."""
        if self.estimator != "exact":
            return fill_masked(kl_estimate(logps.detach(), ref_logps.detach(), self.estimator), mask)
        if exact is None:
            raise ValueError("estimator='exact' needs the full-vocabulary KL of each token: pass exact.")
        return fill_masked(exact.detach(), mask)

    def credit(self, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, exact: Tensor | None = None) -> Tensor:
        """(B, T) nats that each token is charged for in the reward; subtract `beta` times it from the advantage."""
        penalty = self.penalty(logps, ref_logps, mask, exact=exact)
        return kl_credit(penalty, mask, credit=self.credit_kind)
