"""One KL configuration as a pure function: what a trainer adds to its loss and to its advantages."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .estimators import kl_estimate
from .exact import Direction
from .gradients import Gradient, credit_in_use, expected_gradient
from .importance import (
    WeightLevel,
    WeightMode,
    answers_kept,
    bounded_weights,
    importance_weights,
    weight_products,
)
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

    `loss`, `credit` and `credit_loss` are what the trainers use and the tests enumerate; `gradient` is what they amount
    to.
    """

    estimator: EstimatorOrExact = "k3"
    placement: Placement = "loss"
    reward_credit: RewardCredit = "return_to_go"
    weight_level: WeightChoice = "token"
    weight_mode: WeightMode = "truncate"
    weight_cap: float | None = None  # of a token's weight; prefix and sequence weights are products of bounded ones
    answer_cap: float | None = None  # of the geometric mean of an answer's weights: `answers_kept`
    veto: float | None = None  # smallest weight of a token in an answer that counts
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
    def reward_at_update(self) -> bool:
        """Whether the KL in the reward is `credit_loss`, made of the present policy at every update.

        Else it is `credit`, made once of the policy that sampled, and the policy gradient's own ratio weighs it.
        """
        return self.in_reward and self.weight_level in ("prefix", "sequence")

    @property
    def gradient(self) -> Gradient:
        """Expected on-policy gradient (with direction "reverse")."""
        return expected_gradient(self.estimator, self.placement, self.reward_credit, self.weighted)

    @property
    def leaves_answers_out(self) -> bool:
        return self.answer_cap is not None or self.veto is not None

    @property
    def depends_on_sampler(self) -> bool:
        """Whether it matters to the penalty at an update which policy sampled the answers."""
        return self.takes_weights or self.leaves_answers_out

    def unbounded_weights(self, token_weights: Tensor, mask: Tensor) -> Tensor:
        """(B, T) what the KL is weighted by if nothing bounds the tokens' weights; these, where it takes none."""
        before = self.estimator == "exact" and not self.reward_at_update
        return weight_products(token_weights, mask, level=self._level, before=before)

    def kept(self, token_weights: Tensor, mask: Tensor) -> Tensor:
        """(B, 1) bool: which answers count, by the unbounded weights of their tokens."""
        return answers_kept(token_weights, mask, geometric_cap=self.answer_cap, veto=self.veto)

    def weights(self, logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor | None:
        """(B, T) what the KL loss is weighted by, bounded; None where it is weighted by nothing."""
        if not self.depends_on_sampler:
            return None
        kept, bounded = self._corrected(logps, sampler_logps, mask)
        if not self.takes_weights:
            bounded = torch.ones_like(bounded)
        # An exact KL belongs to the state: the weight of its own token would only add variance.
        products = weight_products(bounded, mask, level=self._level, before=self.estimator == "exact")
        return torch.where(kept, products, 0.0)

    def loss(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
        exact: Tensor | None = None,
    ) -> Tensor:
        """(B, T) KL loss in nats per token, 0 on masked positions.

        Args:
            logps: (B, T) log-probs of the sampled tokens under the policy, with gradient.
            ref_logps: (B, T) the same under the reference.
            mask: (B, T) tokens that count.
            sampler_logps: (B, T) the same under the policy that sampled; None on-policy. NaN where it is not known.
            exact: (B, T) exact KL with gradient; needed by the estimator "exact" only.

        Raises:
            ValueError: the estimator is "exact" and `exact` is None.
        """
        weights = self.weights(logps, logps if sampler_logps is None else sampler_logps, mask)
        if self.estimator != "exact":
            per_token = kl_loss(logps, ref_logps, estimator=self.estimator, weights=weights, value_cap=self.value_cap)
        elif exact is None:
            raise ValueError("estimator='exact' needs the full-vocabulary KL of each token: pass exact.")
        else:
            slope = torch.ones_like(exact) if weights is None else weights
            value = slope * exact if self.value_cap is None else (slope * exact).clamp(max=self.value_cap)
            per_token = value_with_slope(exact, value, slope)
        return torch.where(mask.bool(), per_token, 0.0)

    def credit_loss(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
        exact: Tensor | None = None,
        baseline: Tensor | None = None,
    ) -> Tensor:
        r"""(B, T) the KL in the reward as a loss in nats, on the answers of any sampler; 0 on masked positions.

        Value and gradient are those of a surrogate, w_t a_t and w_t a_t g_t, where a_t = c_t - W_{<t} b_t and c_t is
        the credit of `kl_credit` with the weights of `weight_level`. `weight_cap` bounds them token by token; nothing
        clips the surrogate. Without a cap its expectation is what the reward has on-policy.

        Args:
            logps, ref_logps, mask, sampler_logps, exact: as in `loss`. The values charged are those of `logps`.
            baseline: (B, T) nats, b_t, no row of which depends on its own answer; None for 0.
        """
        kept, weights = self._corrected(logps, logps if sampler_logps is None else sampler_logps, mask)
        values = self.penalty(logps, ref_logps, mask, exact=exact)
        if self._level == "sequence":
            own = weight_products(weights, mask, level="sequence")
            slope = own * kl_credit(values, mask, credit=self.credit_kind)
        else:
            own = weight_products(weights, mask, level="prefix")
            if self.credit_kind == "future" and self.estimator != "exact":
                values = torch.where(weights == 0, 0.0, weights * values)
            slope = weights * kl_credit(values, mask, credit=self.credit_kind, weights=weights)
        if baseline is not None:
            slope = slope - own * baseline
        slope = torch.where(kept & mask.bool(), slope, 0.0)
        return torch.where(mask.bool(), value_with_slope(logps, slope, slope), 0.0)

    def at_update(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
        exact: Tensor | None = None,
        baseline: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All that an update adds to the loss, by placement: `loss` and, where `reward_at_update`, `credit_loss`."""
        given = logps, ref_logps, mask
        losses = {}
        if self.in_loss:
            losses["loss"] = self.loss(*given, sampler_logps=sampler_logps, exact=exact)
        if self.reward_at_update:
            losses["reward"] = self.credit_loss(*given, sampler_logps=sampler_logps, exact=exact, baseline=baseline)
        return losses

    def _corrected(self, logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1) answers that count, and (B, T) the bounded weights pi/mu of their tokens."""
        of_tokens = importance_weights(logps, sampler_logps, mask)
        return self.kept(of_tokens, mask), bounded_weights(of_tokens, mode=self.weight_mode, cap=self.weight_cap)

    @property
    def _level(self) -> WeightLevel:
        return "token" if self.weight_level == "none" else self.weight_level

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
        """(B, T) nats that each token is charged for in the reward; subtract `beta` times it from the advantage.

        Right on the policy's own answers: see `credit_loss` for those of another.
        """
        penalty = self.penalty(logps, ref_logps, mask, exact=exact)
        return kl_credit(penalty, mask, credit=self.credit_kind)
