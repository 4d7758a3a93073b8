"""GRPO with a chosen KL: `KLXGRPOTrainer`.

TRL's loss is computed by TRL, with its own KL switched off; ours is added to it. A KL in the reward is subtracted from
the advantages after TRL has normalised them, or, with prefix and sequence weights, is a loss of its own that is made of
the present policy at every update. A rollout keeps credit and baseline in nats, and the loss multiplies them by beta: a
controller's new beta acts at once, also on answers that several optimizer steps use.

Shape legend: B answers, P prompt tokens, C completion tokens, H hidden.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ...config.names import trainer_with_old_names
from ...kl import importance_weights
from ..checks.start import check_start, config_for
from ..exact.forward import ExactKLForward, exact_kl_between
from ..exact.tokens import AnswerTokens
from ..reference.adapters import as_reference
from ..reference.build import reference_as_given
from ..reference.moving import MovingReference
from ..reference.resumed import ReferenceKeeper
from ..rewarding.gold import GOLD, check_gold_reward
from ..seams import check_trl_version, swapped
from ..session.applied import KL_IN_REWARD, KL_MEASURED, REACHED, check_rollout, not_applied
from ..session.coefficient import KLCoefficient
from ..session.groups import group_names
from ..session.metrics import PooledSums
from ..session.prompts import RolloutPrompts
from ..shared.baseline import baseline_of_others
from ..shared.drift import SamplerDrift
from ..shared.lifecycle import Lifecycle
from ..shared.step_guard import KL, POLICY, REFERENCE, REWARDS
from .aggregation import TOKEN_MEANS, mean_as_trl
from .batch import (
    VISION_INPUTS,
    RefStates,
    attention_to_cut_answers,
    health_metrics,
    health_sums,
    loss_mask,
    ref_states_of,
    sampled_kls,
    sampler_logps_of,
)
from .checked import CheckedGRPOTrainer
from .config import KLXGRPOConfig
from .engine import measure_sampler
from .tape import Ask, Scoring, Tape

check_trl_version()


@trainer_with_old_names(KLXGRPOConfig)
class KLXGRPOTrainer(Lifecycle, CheckedGRPOTrainer):
    """`GRPOTrainer` whose KL to the reference you choose: see `KLXGRPOConfig` and the table in the README.

    Takes `GRPOTrainer`'s arguments, with a `KLXGRPOConfig` as `args`. Where the policy is given in memory rather than
    by path, the reference is a copy of it as given (TRL would reload it from disk, and under ZeRO-3 still does).

    Args:
        gold_reward_func: a function like those of `reward_funcs`, which the reward stands for. It scores the answers of
            every evaluation and is never trained on; `overoptimisation` follows it: see docs/overoptimisation.md.

    Raises:
        TypeError: `args` is not a `KLXGRPOConfig`.
        ValueError: the exact KL cannot be computed for this model or this kind of sharding, or the gold reward not
            followed.
    """

    _tag_names = ["trl", "grpo", "trl_klx"]
    _name = "KLX-GRPO"
    _trl_sends_answers = True
    args: KLXGRPOConfig
    beta = KLCoefficient()
    _tape: Tape | None = None  # of the call of TRL's code that runs

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: KLXGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *positional: Any,
        gold_reward_func: Any = None,
        **kwargs: Any,
    ) -> None:
        args = config_for(KLXGRPOConfig, args, model, "GRPO")
        kl_groups = group_names(args, train_dataset, eval_dataset)
        check_gold_reward(args, gold_reward_func)
        check_start(args, model, processing_class, **kwargs)
        data = train_dataset, eval_dataset, processing_class
        with reference_as_given(args, model, kwargs.get("peft_config")):
            super().__init__(model, reward_funcs, args, *data, *positional, **kwargs)
        moving = MovingReference(self, self._reuses_rollout) if args.sync_ref_model else None
        keeper = ReferenceKeeper(self, in_policy=args.kl_is_measured, moving=moving)
        self.drift = SamplerDrift(self)
        self._hold_parts(keeper, kl_groups, gold_reward_func, more=[self.drift])
        self._prompts = RolloutPrompts(self.accelerator)
        self.kl_term = args.kl_term()
        self._exact: ExactKLForward | None = None
        if args.kl_needs_exact:
            direction = self.kl_term.direction
            self._exact = exact_kl_between(self, self.model, temperature=self.temperature, direction=direction)
        self._health_sums = PooledSums(self.accelerator, ("seen", "hidden", "answers"))
        scale = None if self.scale_rewards == "none" else 1.0
        self._watch_health(self.model, gain="reward", entropy="entropy", tokenizer=self._tokenizer, reward_scale=scale)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.left_out = self.drift.stopped and self._reuses_rollout()
        loss = self._left_out_step() if self.left_out else super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self.left_out:
            self.drift.end_update(is_last=not self._reuses_rollout())
        return loss

    def _left_out_step(self) -> Tensor:
        """A micro-batch without forward and backward: where no parameter has a gradient, no optimizer moves any."""
        self._step += 1
        if self.accelerator.sync_gradients:
            self.drift.leave_out(1)
            self._end_step()
        return torch.zeros((), device=self.accelerator.device)

    def _checkpoint_state(self) -> dict[str, Any]:
        return {**super()._checkpoint_state(), "micro_batches": self._step}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Also where TRL stood among the micro-batches that share a rollout: it would take the first for the next."""
        super()._load_checkpoint_state(state)
        self._step = int(state.get("micro_batches", 0))
        self._buffered_inputs = None

    @property
    def _looks_behind_mask(self) -> bool:
        """Whether the KL of answers that are cut off and masked is looked at, though it counts nowhere.

        A router's loss counts every token that is not masked: there, they stay as TRL masks them.
        """
        return self.args.kl_health and self.args.kl_is_measured and not self.aux_loss_enabled

    def _attention(self, attention_mask: Tensor, ids: Tensor, length: int) -> Tensor:
        """(B, P + C) TRL's attention mask, and what it hides of the answers, the last `length` tokens."""
        if not (self._looks_behind_mask and self.mask_truncated_completions):
            return attention_mask
        return attention_to_cut_answers(attention_mask, ids, length, self._tokenizer.pad_token_id)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        attention_mask = self._attention(attention_mask, input_ids, logits_to_keep)
        inputs = model, input_ids, attention_mask, logits_to_keep
        score = functools.partial(super()._get_per_token_logps_and_entropies, *inputs, *args, **kwargs)
        return score() if self._tape is None else self._tape.record(score, model, attention_mask[:, -logits_to_keep:])

    @torch.no_grad()
    def _score(self, model: Any, batch: dict, ask: Ask) -> Scoring:
        """Score the answers of a rollout in TRL's own way."""
        options: Any = self.args.gradient_checkpointing_kwargs
        tape = Tape(self._exact, ask)
        with disable_gradient_checkpointing(self.model, options), swapped(self, _tape=tape):
            self._get_per_token_logps_and_entropies(
                model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=self._rows_at_once,
                **{name: batch[name] for name in VISION_INPUTS if name in batch},
            )
        return self._applied(tape.one())

    @property
    def _rows_at_once(self) -> int:
        return self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size

    def _applied(self, scoring: Scoring | None) -> Scoring:
        if scoring is None:
            raise not_applied(self, KL_MEASURED)
        return scoring

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.guard.sampling():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.guard.check_weights()
        if self.model.training:
            self.drift.begin_rollout()
        if not self.args.kl_is_measured:
            return super()._generate_and_score_completions(inputs)
        in_reward = self.kl_term.in_reward and self.args.kl_is_penalised
        # TRL scores the policy where its loss needs that: these hidden states serve an exact KL in the reward, too.
        tape = Tape(self._exact, Ask(hidden=in_reward and self.kl_term.estimator == "exact"))
        self._drop_ref_states()
        with swapped(self, beta=0.0, _tape=tape):  # the reference is scored here
            batch = super()._generate_and_score_completions(inputs)
        if "unscored" not in batch:  # then it was not TRL's rollout that ran
            raise not_applied(self, KL_MEASURED)
        by_environments = self.environment_factories is not None
        batch["kl_prompts"] = self._prompts.numbers(inputs, self._group_size, made_by_environments=by_environments)
        groups = self.kl.group_numbers(inputs)
        if groups is not None:
            batch["kl_groups"] = groups
        self._score_reference(batch)
        if in_reward:
            credit, baseline = self._credit(batch, tape.one())
            at_update = self.kl_term.reward_at_update
            batch |= {"kl_baseline": baseline} if at_update else {"kl_credit": credit - baseline}
        return batch

    def _score_reference(self, batch: dict) -> None:
        """Add the reference's log-probs and, for an exact KL, its hidden states: `RefStates` of each answer."""
        answers = batch["completion_mask"], batch["completion_ids"], batch["completion_ids"].size(1)
        tokens = None if self._exact is None else AnswerTokens.of(loss_mask(batch), self._attention(*answers))
        model = self.model if self.ref_model is None else self.ref_model
        policy = self.accelerator.unwrap_model(self.model)
        with as_reference(policy) if self.ref_model is None else nullcontext():
            scoring = self._score(model, batch, Ask(hidden=tokens is not None, tokens=tokens))
            ask = Ask(tokens=tokens)
            origin_logps = self.reference.origin_logps(scoring.logps, lambda: self._score(model, batch, ask).logps)
        batch |= {"ref_per_token_logps": scoring.logps, "origin_per_token_logps": origin_logps}
        if tokens is not None and scoring.hidden is not None:
            batch["ref_hidden_states"] = list(map(RefStates, scoring.hidden, tokens.scored))

    def _drop_ref_states(self) -> None:
        """Free the reference's hidden states of the last rollout, which TRL keeps until it has the next."""
        if self.model.training:
            for micro_batch in self._buffered_inputs or ():  # type: ignore[var-annotated]
                micro_batch.pop("ref_hidden_states", None)

    @property
    def _group_size(self) -> int:
        """Answers per prompt."""
        return (self.num_generations if self.model.training else self.num_generations_eval) or 1

    @torch.no_grad()
    def _credit(self, batch: dict, policy: Scoring | None) -> tuple[Tensor, Tensor]:
        """(B, C) KL credit of each token and its leave-one-out baseline, in nats; a difference times -beta is an
        advantage.

        `policy` is TRL's own scoring of the policy as it is now; where TRL makes none the answers are scored here.
        """
        mask, ref_logps = loss_mask(batch), batch["ref_per_token_logps"]
        if policy is None:
            charges_exact = self.kl_term.estimator == "exact"
            policy = self._score(self.model, batch, self._ask(batch, grad=False) if charges_exact else Ask())
        exact = policy.exact
        if policy.hidden is not None and policy.tokens is not None and self._exact is not None:
            kept = policy.hidden, policy.tokens, *ref_states_of(batch)
            exact = self._exact.of_hidden_states(*kept, at_once=self._rows_at_once)
        credit = self.kl_term.credit(policy.logps, ref_logps, mask, exact=exact)
        return credit, baseline_of_others(self.accelerator, credit, mask, self._group_size)

    def _ask(self, batch: dict, *, grad: bool) -> Ask:
        """For the exact KL of the policy, where one is wanted."""
        if "ref_hidden_states" not in batch:
            return Ask()
        ref_hidden, tokens = ref_states_of(batch)
        return Ask(tokens=tokens, ref_hidden=ref_hidden, grad=grad)

    def _calculate_rewards(self, inputs: Any, prompts: list, *given: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, *given)
        self.answers.add(self.mode, prompts, given[0], self.reward_func_names, rewards)
        if self.gold is not None and not self.model.training:
            proxy = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            only_gold = {"reward_funcs": [self.gold.reward], "reward_processing_classes": [None]}
            with swapped(self, **only_gold, reward_func_names=[GOLD]):
                gold = self._rewards_as_given(inputs, prompts, *given)[:, 0]
            self.gold.measure(prompts, proxy.masked_fill(rewards.isnan().all(1), torch.nan), gold)
        return rewards

    def _compute_loss(self, model, inputs):
        if self.model.training and "unscored" in inputs:
            self.guard.watch(REWARDS, torch.where(inputs["unscored"], torch.nan, 0.0))
        is_measured = self.args.kl_is_measured
        if not is_measured and self.args.kl_sampler_target is None and self.args.kl_step_limit is None:
            return super()._compute_loss(model, inputs)
        if is_measured:
            check_rollout(self, inputs)
        mask = loss_mask(inputs)
        tape = Tape(self._exact, self._ask(inputs, grad=self.kl_term.estimator == "exact" and self.kl_term.in_loss))
        penalised = self._with_kl_advantages(inputs)
        with swapped(self, beta=0.0, _tape=tape):  # TRL's own KL is off
            loss = super()._compute_loss(model, penalised)
        policy = self._applied(tape.one())
        sampler_logps = sampler_logps_of(policy.logps.detach(), inputs)
        if self.model.training:
            self.step_limit.before(policy.logps, mask, lambda: self._score(self.model, inputs, Ask()).logps)
        if sampler_logps is not None and self.model.training:
            self.drift.add(policy.logps, sampler_logps, mask)
        if not is_measured:
            return loss
        self.sampling.tell_what_changed(policy.logps.detach(), inputs, mask)
        self._measure(policy, inputs, mask, sampler_logps)
        return self._with_kl(loss, policy, inputs, mask, sampler_logps) if self.args.kl_is_penalised else loss

    def _with_kl(
        self, loss: Tensor, policy: Scoring, inputs: dict, mask: Tensor, sampler_logps: Tensor | None
    ) -> Tensor:
        """TRL's loss with what the KL adds to it."""
        given = {"sampler_logps": sampler_logps, "exact": policy.exact, "baseline": inputs.get("kl_baseline")}
        losses = self.kl_term.at_update(policy.logps, inputs["ref_per_token_logps"], mask, **given)
        for placement, per_token in losses.items():
            self.kl.reached.add(REACHED[placement])
            kl_loss = self._aggregate(self._beta_of(inputs) * per_token, mask, inputs)
            loss = loss + kl_loss
            if placement == "loss":
                self.metrics.defer(self.mode, "kl/loss", kl_loss * self._accumulation)
        return loss

    def _beta_of(self, inputs: dict) -> Tensor | float:
        """Beta, (B, 1) where it differs by group."""
        return self.kl.coef_of(inputs["kl_groups"]) if "kl_groups" in inputs else self.beta

    def _with_kl_advantages(self, inputs: dict) -> dict:
        """Subtract beta times the KL credit, (B, C), from the normalised advantages, (B,). Beta is today's."""
        if "kl_credit" not in inputs:
            return inputs
        self.kl.reached.add(KL_IN_REWARD)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return {**inputs, "advantages": advantages - self._beta_of(inputs) * inputs["kl_credit"]}

    def _measure(self, policy: Scoring, inputs: dict, mask: Tensor, sampler_logps: Tensor | None) -> None:
        """Take the KL into the statistics: of the policy's own tokens, in the states of whoever sampled them.

        An exact KL averages over these tokens itself; the estimates are weighted.
        """
        logps, ref_logps = policy.logps.detach(), inputs["ref_per_token_logps"]
        token_weights = None if sampler_logps is None else importance_weights(logps, sampler_logps, mask)
        sampled = sampled_kls(logps, inputs, self.kl.names, token_weights)
        if token_weights is not None:
            own = self.kl, self.metrics, self.mode, self.args, self.kl_term
            measure_sampler(*own, logps, inputs, mask, token_weights, is_first_use=self._is_first_use)
        exact = {} if policy.exact is None else {"exact": policy.exact.detach()}
        self.kl.measure(self.mode, sampled | exact, mask, inputs["kl_prompts"], inputs.get("kl_groups"))
        if self.model.training:
            if self.args.kl_health:
                self._health_sums.add(**health_sums(logps, inputs, self._tokenizer.pad_token_id))
            for what, measured in ((POLICY, logps), (REFERENCE, ref_logps), *((KL, value) for value in exact.values())):
                self.guard.watch(what, measured, mask)

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
            share = accumulation / self.args.micro_batches_per_rollout if self.model.training else 1.0
            return per_token.sum() / (tokens * share)
        return mean_as_trl(per_token, mask, kind, self.max_completion_length) / accumulation  # type: ignore[arg-type]
