"""PPO with a chosen KL: `KLXPPOTrainer`. One step of transformers' loop is one rollout and its updates:

    rows -> Answers -> Rewarded -> Rollout   sampled, rewarded, scored             `PPOSampler`
    Rollout -> Experience                    rewards and KL become advantages      `_shape`
    Experience -> LossOutputs                of each micro-batch of each update    `_update`

Shape legend of this folder: B answers, P prompt tokens, T answer tokens, L = P + T, H hidden size, V vocabulary,
F rewards.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ...config.names import trainer_with_old_names
from ...hub.papers import PAPERS
from ...kl import fill_masked, importance_weights, kl_credit, last_token_index, masked_sum
from ..exact.scored_head import Entropy, scored_heads
from ..reference.moving import MovingReference
from ..reference.resumed import ReferenceKeeper
from ..seams import check_trl_version
from ..session.applied import KL_IN_REWARD, REACHED
from ..session.coefficient import KLCoefficient
from ..shared.baseline import baseline_of_others
from ..shared.drift import SamplerDrift
from ..shared.engine import policy_ratio
from ..shared.lifecycle import Lifecycle
from ..shared.step_guard import KL, LOSS, POLICY, REFERENCE, VALUES
from .config import KLXPPOConfig
from .loop import PPOLoop
from .loss import Clipping, generalized_advantages, mean_and_std, next_token_values, policy_loss, value_loss
from .prepare import Given, Model, prepare
from .prompts import RolloutFunction, Rows
from .rollout import Experience, LossOutputs, Rollout
from .sampler import PPOSampler

check_trl_version()


@trainer_with_old_names(KLXPPOConfig)
class KLXPPOTrainer(Lifecycle, PPOLoop):
    r"""PPO whose KL to the reference you choose: see `KLXPPOConfig` and the table in the README.

    The same on every version of TRL. Where TRL has a `PPOTrainer` (1.12), this is a subclass of it.

    Maximises E[reward] - kl_coef * KL(policy || reference). With the KL in the reward each token is charged, through
    the value model and generalized advantages, for the KL from it to the end of the answer; with
    `kl_placement="both"`, for the KL after it, while the loss charges its own. Whitening divides advantages and KL
    loss by one number, the standard deviation of the advantages, so that `kl_coef` weighs reward against KL alike in
    every placement.

    With `kl_importance_sampling="prefix"` or "sequence" the KL in the reward is a loss of its own, made of the present
    policy at every update: `KLTerm.credit_loss`. No value model predicts it, no gamma or lam discounts it, nothing
    clips it: its gradient is exact however often a rollout is used and whatever sampled it, unless the weights are
    bounded. What stays approximate is the gradient of the *reward*: the clipped surrogate in the states of the sampler,
    and GAE, which is unbiased for lam = 1, and below it as far as the value model is right.

    Args:
        args: the config.
        processing_class: the policy's tokenizer; None: that of the policy's path.
        model: the policy, or its path.
        ref_model: the reference, or its path. None: the policy as given, by copy or without its adapter.
        reward_model: a sequence classifier with one output, or its path; one more reward.
        train_dataset: a column `prompt`, of strings or messages, or `input_ids`; others go to the reward functions.
        value_model: sequence classifier with one output and a head named `score`, or the path of a model to make it
            from. None: a copy of the policy's backbone under a head of zeros.
        data_collator: an argument of TRL's; must be None.
        eval_dataset: the same, for `evaluate`, which samples an answer to each prompt.
        optimizers, callbacks, peft_config, quantization_config: as in TRL's trainers; the adapter is the policy's.
        reward_funcs: as GRPO's: functions (sync or async), reward models or their paths, one or several.
        reward_processing_classes: tokenizers of the reward models among `reward_funcs`, None for each other.
        rollout_func: as GRPO's: samples the answers itself; `env_mask` marks what the policy produced (1) and what
            tools did (0), which counts nowhere.
        gold_reward_func: a function like those of `reward_funcs`, which they stand for. It scores evaluations and is
            never trained on; `overoptimisation` follows it: see docs/overoptimisation.md.

    Raises:
        TypeError: `args` is not a `KLXPPOConfig`.
        ValueError: no reward, too few prompts, or a model that PPO or the exact KL cannot use.
    """

    _tag_names = ["trl", "ppo", "trl_klx"]
    _name = "KLX-PPO"
    _paper = PAPERS["ppo"]._asdict()  # what TRL's own PPO trainer cites
    kl_coef = KLCoefficient()

    def __init__(
        self,
        args: KLXPPOConfig,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: Model | None = None,
        ref_model: Model | None = None,
        reward_model: Model | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        value_model: Model | None = None,
        data_collator: None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        optimizers: tuple = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        rollout_func: RolloutFunction | None = None,
        gold_reward_func: Any = None,
        quantization_config: Any = None,
    ) -> None:
        if data_collator is not None:
            raise ValueError("data_collator has no effect: prompts are tokenised and padded by the trainer; remove it.")
        models = (processing_class, model, ref_model, value_model, reward_model, peft_config, quantization_config)
        given = Given(*models, reward_funcs, reward_processing_classes, gold_reward_func)
        made = prepare(args, given, (train_dataset, eval_dataset), more_columns=rollout_func is not None)
        self.given_args = args
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        own = {"optimizers": optimizers, "callbacks": callbacks}
        super().__init__(args, made.model, made.reference, made.tokenizer, **data, **own)
        self.reward_func_names, adapter = made.rewards.names, args.ref_adapter_name
        keeper = ReferenceKeeper(
            self,
            is_an_argument=True,
            in_policy=args.kl_is_measured,
            adapter=adapter,
            moving=MovingReference(self) if args.sync_ref_model else None,
        )
        self.drift = SamplerDrift(self)
        engine = [] if self.engine is None else [self.engine]
        self._hold_parts(keeper, made.kl_groups, gold_reward_func, more=[*engine, self.drift])
        self.kl_term = term = args.kl_term()
        self.kl_in_reward = args.kl_is_penalised and term.in_reward
        self.kl_in_loss = args.kl_is_penalised and term.in_loss
        self.kl_at_update = args.kl_is_penalised and term.reward_at_update
        made.rewards.rewards = [self.frozen(r) if isinstance(r, nn.Module) else r for r in made.rewards.rewards]
        heads = scored_heads(self, self.model.policy, temperature=args.temperature, with_exact=args.kl_needs_exact)
        self.sampler = PPOSampler(self, made.prompts, made.rewards, rollout_func, heads)
        self._clipping = Clipping(args.cliprange, args.cliprange_value)
        self._watch_health(made.model.policy, gain="reward", entropy="policy/entropy_avg", tokenizer=made.tokenizer)

    @property
    def _saved_model(self) -> Any:
        return self.policy  # without the value model beside it

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One rollout and all its optimizer steps but the last, which transformers' loop clips, takes and logs."""
        self.kl.start(self.state.max_steps)
        model.train()
        self.guard.check_weights()
        rollout = self._make_rollout(inputs)
        self._watch(rollout)
        if self.guard.skips(model):
            loss = torch.zeros((), device=self.accelerator.device)
        else:
            loss, outputs = self._update(model, self._shape(rollout))
            self._record_update(outputs)
        self.metrics.set("train", "episode", (self.state.global_step + 1) * self.rollout_prompts)
        self._end_step()
        return loss

    @torch.no_grad()
    def _make_rollout(self, rows: Rows) -> Rollout:
        # The KL is that of every answer; what is learnt from counts only where a reward applies.
        with self.without_checkpointing():
            return self.sampler.rollout(rows).without_unscored()

    def _watch(self, rollout: Rollout) -> None:
        """All that advantages, their whitening and the baseline of a KL are made of."""
        watched = [(POLICY, rollout.old_logps), (VALUES, rollout.values)]
        of_kl = [(REFERENCE, rollout.ref_logps), (KL, rollout.exact)] if self.kl_in_reward else []
        for what, values in [*watched, *of_kl]:
            if values is not None:
                self.guard.watch(what, values, rollout.mask)

    @torch.no_grad()
    def _shape(self, rollout: Rollout) -> Experience:
        """Rewards and KL to advantages, and to returns for the value model to learn."""
        mask, gamma, lam = rollout.mask, self.args.gamma, self.args.lam
        rewards, direct = self._shape_rewards(rollout)
        scale = torch.ones_like(rewards[0, 0])
        if self.args.whiten_rewards:
            scale = scale / mean_and_std(rewards, mask, self._sum)[1]
        advantages, returns = generalized_advantages(scale * rewards, rollout.values, mask, gamma=gamma, lam=lam)
        advantages = advantages + scale * direct
        if self.args.whiten_advantages:
            mean, std = mean_and_std(advantages, mask, self._sum)
            advantages, scale = torch.where(mask, (advantages - mean) / std, 0.0), scale / std
        ratio = None
        if rollout.engine_logps is not None:
            ratio = policy_ratio(rollout.old_logps, rollout.engine_logps, mask, self.args)
        return Experience(rollout, advantages, returns, scale, ratio, self._kl_baseline(rollout))

    def _kl_baseline(self, rollout: Rollout) -> Tensor | None:
        """(B, T) mean KL credit of the *other* answers at each token, where the KL in the reward is charged at the
        updates.
        """
        if rollout.ref_logps is None or not self.kl_at_update:
            return None
        credit = self.kl_term.credit(rollout.old_logps, rollout.ref_logps, rollout.mask, exact=rollout.exact)
        return baseline_of_others(self.accelerator, credit, rollout.mask)

    def _shape_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(B, T) reward after each token, which the value model learns to predict; and credit for the advantages alone.

        The score comes with the last token that the policy produced. Credit "return_to_go" charges a token's KL as a
        reward; "future" charges it one token earlier, so that the return holds the KL after the token; "immediate" and
        "sequence" are not sums of later rewards: they go to the advantages directly, minus a leave-one-out baseline.
        What is charged at the updates is in neither.
        """
        mask, term = rollout.mask, self.kl_term
        last = last_token_index(mask).unsqueeze(1)
        paid = fill_masked(rollout.scores.unsqueeze(1), last >= 0)
        rewards = torch.zeros_like(rollout.old_logps)
        rewards = rewards.scatter(1, last.clamp(min=0), paid.to(rewards.dtype))
        charged, direct = torch.zeros_like(rewards), torch.zeros_like(rewards)
        if rollout.ref_logps is not None and self.kl_in_reward and not self.kl_at_update:
            self.kl.reached.add(KL_IN_REWARD)
            coef, credit_kind = self.kl.coef_of(rollout.groups), term.credit_kind
            penalty = term.penalty(rollout.old_logps, rollout.ref_logps, mask, exact=rollout.exact)
            if credit_kind == "return_to_go":
                charged = -coef * penalty
            elif credit_kind == "future":
                # Paid a token early, so discounted here: the KL of token s weighs gamma^(s-t) in every credit.
                charged = -coef * self.args.gamma * next_token_values(penalty, mask)
            else:
                credit = kl_credit(penalty, mask, credit=credit_kind)
                direct = -coef * (credit - baseline_of_others(self.accelerator, credit, mask))
        return rewards + charged, direct

    def _update(self, model: Any, experience: Experience) -> tuple[Tensor, list[LossOutputs]]:
        """All optimizer steps of a rollout but the last; their mean loss, and the outputs of all micro-batches."""
        minibatches = list(self._minibatches(len(experience.rollout.scores)))
        tokens = self._tokens(experience.rollout, minibatches)
        total = torch.zeros((), device=self.accelerator.device)
        outputs: list[LossOutputs] = []
        self.drift.begin_rollout()
        some = experience.rollout.rows(slice(self.args.per_device_train_batch_size))
        self.step_limit.before(some.old_logps, some.mask, lambda: self.sampler.logps(some))
        for number, (rows, count) in enumerate(zip(minibatches, tokens, strict=True)):
            if number > 0:
                self._optimizer_step(model)
            is_first_use = number < self.args.num_mini_batches
            loss, parts = self._accumulate(model, experience, rows, count, is_first_use=is_first_use)
            if not count:  # nothing was scored, and without a gradient nothing moves, not by momentum either
                model.zero_grad()
            total += loss
            outputs += parts
            left = len(minibatches) - number - 1
            self.drift.end_update(is_last=left == 0)
            if self.drift.stopped:
                self.drift.leave_out(left)
                break
        return total / (number + 1), outputs

    def _tokens(self, rollout: Rollout, minibatches: list[Tensor]) -> list[int]:
        """The tokens of each minibatch that count, on all processes."""
        counts = torch.tensor(rollout.counts)
        here = torch.stack([counts[rows].sum() for rows in minibatches])
        return self._sum(here.to(self.accelerator.device, non_blocking=True)).tolist()

    def _minibatches(self, answers: int) -> Iterator[Tensor]:
        """Rows of each optimizer step: every epoch a new permutation of the rollout, cut into num_mini_batches."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(answers).chunk(self.args.num_mini_batches)

    def _accumulate(
        self, model: Any, experience: Experience, rows: Tensor, count: int, *, is_first_use: bool
    ) -> tuple[Tensor, list[LossOutputs]]:
        """Add up the gradients of a minibatch, by micro-batches: of the mean over its `count` tokens."""
        tokens = max(count, 1) / self.accelerator.num_processes
        micro_batches = rows.split(self.args.per_device_train_batch_size)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        total, outputs = torch.zeros((), device=self.accelerator.device), []
        for number, part in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    output = self._loss(model, experience, part, is_first_use=is_first_use)
                    loss = self.guard.for_deepspeed(output.loss / tokens)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
            total += loss.detach()
            outputs.append(replace(output, loss=loss.detach()))
        self.guard.watch(LOSS, total)
        return total, outputs

    def _loss(self, model: Any, experience: Experience, rows: Tensor, *, is_first_use: bool = False) -> LossOutputs:
        """The loss of some answers; `is_first_use`: of which the policy has learnt nothing yet."""
        part, batch = experience.rollout.rows(rows), experience.batch(rows)
        entropy: Entropy = "trained" if self.args.entropy_coef else "measured"
        scores = self.sampler.scores(model, part, part.ref_hidden, entropy=entropy)
        assert scores.entropy is not None
        self.drift.add(scores.logps, part.sampler_logps, part.mask)
        per_token, policy_metrics = policy_loss(scores.logps, batch, self._clipping)
        value_error, value_metrics = value_loss(scores.values, batch, self._clipping)
        per_token = per_token + self.args.vf_coef * value_error - self.args.entropy_coef * scores.entropy
        metrics = policy_metrics | value_metrics | {"policy/entropy_avg": scores.entropy}
        used = None
        if part.ref_logps is not None and (self.kl_in_loss or self.kl_at_update):
            given = {"sampler_logps": part.sampler_logps, "exact": scores.exact, "baseline": batch.kl_baseline}
            for placement, kl in self.kl_term.at_update(scores.logps, part.ref_logps, part.mask, **given).items():
                self.kl.reached.add(REACHED[placement])
                self.guard.watch(KL, kl, part.mask)
                charged = self.kl.coef_of(part.groups) * (experience.scale * kl)
                per_token = per_token + charged
                if placement == "loss":
                    metrics["kl/loss"] = charged
            used = self._weights_used(scores.logps, part, is_first_use=is_first_use)
        sums = {name: masked_sum(values.detach(), part.mask) for name, values in metrics.items()}
        return LossOutputs(masked_sum(per_token, part.mask), part.mask.sum(), sums, used)

    def _weights_used(self, policy_logps: Tensor, part: Rollout, *, is_first_use: bool) -> tuple[Tensor, Tensor] | None:
        """(B, T) weights of the tokens, and their mask; None where the KL does not depend on what sampled."""
        if not self.kl_term.depends_on_sampler:
            return None
        token_weights = importance_weights(policy_logps, part.sampler_logps, part.mask)
        if is_first_use and part.engine_logps is None:  # those of an engine were measured when it had sampled
            self.kl.weight_mean.add("train", token_weights, part.mask, part.prompts)
        return token_weights, part.mask

    def _optimizer_step(self, model: Any) -> None:
        """What transformers' loop does at the end of a step. (DeepSpeed's engine has stepped in the backward.)"""
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, norm)  # drops gradients that are not finite
        self.optimizer.step()
        model.zero_grad()

    def _record_update(self, outputs: list[LossOutputs]) -> None:
        """Means over the real tokens of all updates of the rollout, on all processes."""
        names = outputs[0].sums  # a subclass's loss may have none: `AppliedKLCheck` ends a run whose KL it leaves out
        if names:
            tokens = torch.stack([output.tokens for output in outputs]).sum()
            self.metrics.pool("train", {n: (torch.stack([o.sums[n] for o in outputs]).sum(), tokens) for n in names})
        used = [output.weights for output in outputs if output.weights is not None]
        if used:
            weights, masks = (torch.cat(tensors) for tensors in zip(*used, strict=True))
            self.metrics.defer_weights("train", weights, masks, self.kl_term)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Sample, reward and score an answer to each prompt; there is no loss to report."""
        self._make_rollout(inputs)
        return None, None, None

    @torch.no_grad()
    def generate_completions(self, sampling: bool = False) -> None:
        """Print answers to the prompts of eval_dataset with their rewards; with `sampling`, of its first batch only."""
        with self.without_checkpointing():
            for rows in [] if self.eval_dataset is None else self.get_eval_dataloader():
                answers = self.sampler.answers(rows)
                self.sampler.print(answers, *self.sampler.rewards_of(answers, self.sampler.rewards))
                if sampling:
                    break
