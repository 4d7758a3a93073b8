"""GRPO with a chosen KL: `KLXGRPOTrainer`.

TRL's loss is computed by TRL, with its own KL switched off; ours is added to it. A KL in the reward is subtracted from
the advantages after TRL has normalised them. Shape legend: B answers, P prompt tokens, C completion tokens, H hidden.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kl import importance_weights, kl_estimate
from ...kl.estimators import SAMPLED_ESTIMATORS
from ..checks.start import check_start
from ..exact.forward import ExactKLForward, exact_kl_between
from ..reference.adapters import trainable_as_before
from ..reference.build import reference_as_given
from ..rewarding.functions import finite_rewards
from ..rewarding.gold import GOLD, GoldWatch, check_gold_reward
from ..seams import check_trl_version, swapped
from ..session.applied import KL_IN_LOSS, KL_IN_REWARD, check_rollout, scored, the_only
from ..session.coefficient import KLCoefficient
from ..session.groups import group_names
from ..session.metrics import PooledSums
from ..session.prompts import RolloutPrompts
from ..session.session import KLControl
from ..shared.lifecycle import KLControlledTrainer
from ..shared.step_guard import KL, POLICY, REFERENCE, REWARDS, StepGuard
from .aggregation import TOKEN_MEANS, mean_as_trl
from .config import KLXGRPOConfig
from .credit import RewardCredit
from .inputs import CheckedGRPOTrainer
from .sampling import PolicySampling
from .scoring import (
    Scoring,
    attention_to_cut_answers,
    health_metrics,
    health_sums,
    joined,
    loss_mask,
    sampler_logps_of,
    scored_by_sampler,
    weighted,
)

check_trl_version()


class KLXGRPOTrainer(KLControlledTrainer, PolicySampling, RewardCredit, GoldWatch, CheckedGRPOTrainer):
    """`GRPOTrainer` whose KL to the reference you choose: see `KLXGRPOConfig` and the table in the README.

    Takes `GRPOTrainer`'s arguments, with a `KLXGRPOConfig` as `args`. Where the policy is given in memory rather than
    by path, the reference is a copy of it as given (TRL would reload it from disk, and under ZeRO-3 still does).

    Args:
        gold_reward_func: a function like those of `reward_funcs`, which the reward stands for. It scores the answers of
            every evaluation and is never trained on; `overoptimisation` follows it: see docs/overoptimisation.md.

    Raises:
        TypeError: `args` is no `KLXGRPOConfig`.
        ValueError: the exact KL cannot be computed for this model or this kind of sharding, or the gold reward not
            followed.
    """

    _tag_names = ["trl", "grpo", "trl_klx"]
    _name = "KLX-GRPO"
    args: KLXGRPOConfig
    model: PreTrainedModel
    beta = KLCoefficient()

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: KLXGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        gold_reward_func: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = KLXGRPOConfig(f"{name.split('/')[-1] or 'model'}-GRPO")
        if not isinstance(args, KLXGRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}: KLXGRPOTrainer takes a KLXGRPOConfig.")
        kl_groups = group_names(args, train_dataset, eval_dataset)
        check_gold_reward(args, gold_reward_func)
        check_start(args, model, *positional[:1], **kwargs)
        self._scorings: list[Scoring] | None = None
        self._keep_ref_hidden = False
        self._exact_request: tuple[Tensor, Tensor, bool] | None = None  # reference hidden states, mask, with gradient
        with reference_as_given(args, model, kwargs.get("peft_config")):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, *positional, **kwargs)
        self._set_up_sampling()
        self.kl = KLControl(args, self.accelerator, kl_groups)
        self._prompts = RolloutPrompts(self.accelerator)
        self.guard = StepGuard(self.accelerator)
        self._is_unscored = False  # whether no answer of the rollout has a reward
        self.kl_term = args.kl_term()
        self._exact = self._exact_forward() if args.kl_needs_exact else None
        self._health_sums = PooledSums(self.accelerator, ("seen", "hidden", "answers", "sampler_kl", "sampled"))
        # A router's loss counts every token that is not masked: there, cut-off answers have to stay as TRL masks them.
        self._looks_behind_mask = args.kl_health and args.kl_is_measured and not self.aux_loss_enabled
        scale = None if self.scale_rewards == "none" else 1.0
        self._watch_health(self.model, gain="reward", entropy="entropy", tokenizer=self._tokenizer, reward_scale=scale)
        self._watch_gold(gold_reward_func)

    def _exact_forward(self) -> ExactKLForward:
        return exact_kl_between(self, self.model, temperature=self.temperature, direction=self.kl_term.direction)

    def _checkpoint_state(self) -> dict[str, Any]:
        return {**super()._checkpoint_state(), "micro_batches": self._step}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Also where TRL stood among the micro-batches that share a rollout: it would take the first for the next."""
        super()._load_checkpoint_state(state)
        self._step = int(state.get("micro_batches", 0))
        self._buffered_inputs = None

    @contextmanager
    def _recording(
        self, *, ref_hidden: bool = False, exact: tuple[Tensor, Tensor, bool] | None = None
    ) -> Iterator[list[Scoring]]:
        """Record every scoring call made inside; `exact` asks them for the exact KL, `ref_hidden` for hidden states."""
        self._scorings, self._keep_ref_hidden, self._exact_request = [], ref_hidden, exact
        try:
            yield self._scorings
        finally:
            self._scorings, self._keep_ref_hidden, self._exact_request = None, False, None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._looks_behind_mask and self.mask_truncated_completions:
            # They count nowhere, but their KL is looked at: score them as they are.
            pad = self._tokenizer.pad_token_id
            attention_mask = attention_to_cut_answers(attention_mask, input_ids, logits_to_keep, pad)
        hidden: AbstractContextManager[list[Tensor]] = nullcontext([])
        exact: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._exact is not None and self._keep_ref_hidden:
            hidden = self._exact.hidden_states(model, logits_to_keep)
        if self._exact is not None and self._exact_request is not None:
            ref_hidden, mask, with_grad = self._exact_request
            exact = self._exact.exact_kl(model, ref_hidden, mask, with_grad=with_grad)
        inputs = model, input_ids, attention_mask, logits_to_keep
        with hidden as hidden_parts, exact as exact_parts:
            out = super()._get_per_token_logps_and_entropies(*inputs, *args, **kwargs)
        if self._scorings is not None:
            if not self._shares_hidden:  # the reference is scored last, and only its hidden states are wanted
                for earlier in self._scorings:
                    earlier.hidden = None
            self._scorings.append(Scoring(scored(self, out), joined(hidden_parts), joined(exact_parts)))
        return out

    def _generate_and_score_completions(self, inputs):
        self._check_weights()
        if not self.args.kl_is_measured:
            return super()._generate_and_score_completions(inputs)
        recording = self._recording(ref_hidden=self._exact is not None)
        # TRL tests `self.beta != 0` for two things we need apart: to score the reference, and to add its own KL.
        with swapped(self, beta=1.0), trainable_as_before(self.model), recording as scorings:
            output = super()._generate_and_score_completions(inputs)
        by_environments = self.environment_factories is not None
        output["kl_prompts"] = self._prompts.numbers(inputs, self._group_size, made_by_environments=by_environments)
        check_rollout(self, output)
        groups = self.kl.group_numbers(inputs)
        if groups is not None:
            output["kl_groups"] = groups
        if self._exact is not None:
            ref_scoring = the_only([s for s in scorings if s.logps is output["ref_per_token_logps"]], self)
            output["ref_hidden_states"] = ref_scoring.hidden
        if self.kl_term.in_reward and self.args.kl_is_penalised:
            old = [s for s in scorings if s.logps is output.get("old_per_token_logps")]
            output["kl_credit"] = self._kl_credit(output, old[0] if old else None)
        return output

    def _calculate_rewards(self, inputs: Any, prompts: list, *args: Any, **kwargs: Any) -> Tensor:
        """(answers of all processes, rewards); TRL takes NaN for a reward that does not apply."""
        given = super()._calculate_rewards(inputs, prompts, *args, **kwargs)
        rewards, counts = finite_rewards(given, self.reward_func_names)
        for name, count in counts.items():
            self._metrics[self._mode][f"rewards/{name}/infinite"].append(count)
        if self.model.training:
            self._is_unscored = bool(rewards.isnan().all())
        elif self.gold_reward_func is not None:
            proxy = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            only_gold = {"reward_funcs": [self.gold_reward_func], "reward_processing_classes": [None]}
            with swapped(self, **only_gold, reward_func_names=[GOLD]):
                gold = super()._calculate_rewards(inputs, prompts, *args, **kwargs)[:, 0]
            self._measure_gold(prompts, proxy.masked_fill(rewards.isnan().all(1), torch.nan), gold)
        return rewards

    def _compute_loss(self, model, inputs):
        if self._is_unscored and self.model.training:
            self.guard.watch(REWARDS, torch.nan)
        if not self.args.kl_is_measured:
            return super()._compute_loss(model, inputs)
        check_rollout(self, inputs)
        mask = loss_mask(inputs)
        exact_has_grad = self.kl_term.estimator == "exact" and self.kl_term.in_loss
        exact = (inputs["ref_hidden_states"], mask, exact_has_grad) if self._exact is not None else None
        penalised = self._with_kl_advantages(inputs)
        with swapped(self, beta=0.0), self._recording(exact=exact) as scorings:
            loss = super()._compute_loss(model, penalised)
        policy = the_only(scorings, self)
        self._tell_changed_sampling(policy.logps.detach(), inputs, mask)
        token_weights, weights = self._importance_weights(policy.logps.detach(), inputs, mask)
        self._measure(policy, inputs, mask, token_weights, weights)
        if not (self.kl_term.in_loss and self.args.kl_is_penalised):
            return loss
        self.kl.reached.add(KL_IN_LOSS)
        per_token_kl = self.kl_term.loss(
            policy.logps,
            inputs["ref_per_token_logps"],
            mask,
            weights=weights,
            exact=policy.exact,
        )
        kl_loss = self._aggregate(self._beta_of(inputs) * per_token_kl, mask, inputs)
        shown = kl_loss.detach() * self._accumulation
        self._metrics[self._mode]["kl/loss"].append(self.accelerator.gather(shown).mean().item())
        return loss + kl_loss

    def _beta_of(self, inputs: dict) -> Tensor | float:
        """Beta, (B, 1) where it differs by group."""
        return self.kl.coef_of(inputs["kl_groups"]) if "kl_groups" in inputs else self.beta

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulation(self) -> float:
        """Micro-batches that one optimizer step sums up; evaluation takes each batch for itself."""
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _with_kl_advantages(self, inputs: dict) -> dict:
        """Subtract beta times the KL credit, (B, C), from the normalised advantages, (B,). Beta is today's."""
        if "kl_credit" not in inputs:
            return inputs
        self.kl.reached.add(KL_IN_REWARD)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return {**inputs, "advantages": advantages - self._beta_of(inputs) * inputs["kl_credit"]}

    def _importance_weights(self, logps: Tensor, inputs: dict, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(B, C) untruncated weights of policy over sampler, of the tokens and on the loss.

        None where both are the same, and on a loss that takes none.
        """
        sampler_logps = sampler_logps_of(logps, inputs)
        if sampler_logps is logps:
            return None, None
        of_tokens = importance_weights(logps, sampler_logps, mask, level="token")
        level = self.kl_term.weight_level
        if not self.kl_term.takes_weights or level == "token":
            return of_tokens, of_tokens if self.kl_term.takes_weights else None
        return of_tokens, importance_weights(logps, sampler_logps, mask, level=level)

    @property
    def _is_first_use(self) -> bool:
        """Whether the policy has not been trained on the answers of this micro-batch (`num_iterations`)."""
        earlier_uses = self._step // self.args.steps_per_generation % self.num_iterations  # type: ignore[operator]
        return not self.model.training or earlier_uses == 0

    def _measure(
        self, policy: Scoring, inputs: dict, mask: Tensor, token_weights: Tensor | None, weights: Tensor | None
    ) -> None:
        """Take the KL into the statistics: of the policy's own tokens, in the states of whoever sampled them.

        An exact KL averages over these tokens itself; the estimates are weighted.
        """
        logps, ref_logps = policy.logps.detach(), inputs["ref_per_token_logps"]
        sampled = {name: kl_estimate(logps, ref_logps, name) for name in SAMPLED_ESTIMATORS if name in self.kl.names}
        if token_weights is not None:
            sampled = {name: weighted(token_weights, values) for name, values in sampled.items()}
            if self._is_first_use:
                scored = scored_by_sampler(inputs, mask)
                self.kl.weight_mean.add(self._mode, token_weights, scored, inputs["kl_prompts"])
        exact = {} if policy.exact is None else {"exact": policy.exact.detach()}
        self.kl.measure(self._mode, sampled | exact, mask, inputs["kl_prompts"], inputs.get("kl_groups"))
        if self.model.training:
            if self.args.kl_health:
                self._health_sums.add(**health_sums(logps, inputs, self._tokenizer.pad_token_id))
            for what, measured in ((POLICY, logps), (REFERENCE, ref_logps), *((KL, value) for value in exact.values())):
                self.guard.watch(what, measured, mask)
        if weights is not None:
            for name, value in self.kl.weight_metrics(weights, mask).items():
                self._metrics[self._mode][name].append(value)

    def _health_metrics(self) -> dict[str, float]:
        has_mask = self.mask_truncated_completions or bool(self.tools) or self.rollout_func is not None
        return health_metrics(self._health_sums.take(), behind_mask=has_mask and self._looks_behind_mask)

    def _aggregate(self, per_token: Tensor, mask: Tensor, inputs: dict) -> Tensor:
        """Reduce (B, C) to the scalar that TRL's loss_type would make of it (or the token mean: kl_aggregation)."""
        kind = "dapo" if self.args.kl_aggregation == "token" else self.loss_type
        accumulation = self._accumulation
        if kind in TOKEN_MEANS:
            # num_items_in_batch counts the tokens of the generation batch, on all processes.
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            share = accumulation / self.args.steps_per_generation if self.model.training else 1.0  # type: ignore[operator]
            return per_token.sum() / (tokens * share)
        return mean_as_trl(per_token, mask, kind, self.max_completion_length) / accumulation  # type: ignore[arg-type]
