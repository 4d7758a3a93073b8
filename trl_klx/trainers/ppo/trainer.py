"""PPO with a chosen KL: `KLXPPOTrainer`.

One step: sample answers to a batch of prompts, reward and score them (`PPOSampler`), turn rewards and KL into
advantages (`_shape`), and update policy and value model (`_update`). Shape legend: B answers, T answer tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import entropy_from_logits

from ...kl import importance_weights, kl_credit, last_token_index, leave_one_out_baseline, masked_sum
from ..checks.inputs import check_inputs, check_lengths
from ..checks.loading import loading_arguments
from ..checks.rows import PROMPTS_OR_TOKENS
from ..checks.start import check_start
from ..checks.vocabulary import check_vocabularies, vocabulary_size, with_known_padding
from ..rewarding.functions import RewardFunctions
from ..rewarding.gold import check_gold_reward
from ..rewarding.models import loaded_rewards
from ..session.applied import KL_IN_LOSS, KL_IN_REWARD
from ..session.groups import group_names
from ..shared.lifecycle import KLControlledTrainer
from ..shared.step_guard import ADVICE, KL, LOSS
from .config import KLXPPOConfig
from .loop import check_arguments
from .loss import Clipping, generalized_advantages, mean_and_std, next_token_values, policy_loss, value_loss
from .model import PolicyAndValue, load_policy, reference_of, value_model_of, with_adapter
from .rollout import Experience, Rollout, RolloutFunction, Rows, check_first_prompts
from .sampler import PPOSampler


class KLXPPOTrainer(KLControlledTrainer, PPOSampler):
    r"""`PPOTrainer` whose KL to the reference you choose: see `KLXPPOConfig` and the table in the README.

    Maximises E[reward] - kl_coef * KL(policy || reference). With the KL in the reward each token is charged, through
    the value model and generalized advantages, for the KL from it to the end of the answer; with
    `kl_placement="both"`, for the KL after it, while the loss charges its own. Whitening divides advantages and KL
    loss by one number, the standard deviation of the advantages, so that `kl_coef` weighs reward against KL alike in
    every placement.

    Args:
        args: the config.
        processing_class: the policy's tokenizer; None: that of the policy's path.
        model: the policy, or its path.
        ref_model: the reference, or its path. None: the policy as given, by copy or without its adapter.
        reward_model: a sequence classifier with one output, or its path; one more reward.
        train_dataset: a column `prompt`, of strings or messages, or `input_ids`; others go to the reward functions.
        value_model: sequence classifier with one output and a head named `score`, or the path of a model to make it
            from. None: a copy of the policy's backbone under a head of zeros.
        data_collator: in TRL's place; prompts need none, so it has to be None.
        eval_dataset: the same, for `evaluate`, which samples an answer to each prompt.
        optimizers, callbacks, peft_config, quantization_config: as in TRL's trainers; the adapter is the policy's.
        reward_funcs: as GRPO's: functions (sync or async), reward models or their paths, one or several.
        reward_processing_classes: tokenizers of the reward models among `reward_funcs`, None for each other.
        rollout_func: as GRPO's: samples the answers itself; `env_mask` marks what the policy produced (1) and what
            tools did (0), which counts nowhere.
        gold_reward_func: a function like those of `reward_funcs`, which the reward stands for. It scores the answers of
            every evaluation and is never trained on; `overoptimisation` follows it: see docs/overoptimisation.md.

    Raises:
        TypeError: `args` is no `KLXPPOConfig`.
        ValueError: no reward, too few prompts, or a model that PPO or the exact KL cannot use.
    """

    _tag_names = ["trl", "ppo", "trl_klx"]
    _name = "KLX-PPO"
    _takes_ref_model = True

    def __init__(
        self,
        args: KLXPPOConfig,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: PreTrainedModel | str | None = None,
        ref_model: PreTrainedModel | str | None = None,
        reward_model: PreTrainedModel | str | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        value_model: PreTrainedModel | str | None = None,
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
        check_arguments(args, model, ref_model, train_dataset, reward_model, value_model, data_collator)
        given = [*_as_list(reward_funcs), *_as_list(reward_model)]
        check_inputs(PROMPTS_OR_TOKENS, args, train_dataset, eval_dataset, given, more=rollout_func is not None)
        kl_groups = group_names(args, train_dataset, eval_dataset)
        check_gold_reward(args, gold_reward_func)
        others = {"ref_model": ref_model, "reward_model": reward_model, "value_model": value_model}
        tokenizer = check_start(args, model, processing_class, quantization_config=quantization_config, **others)
        self.given_args = args
        loading = loading_arguments(args.model_init_kwargs)  # type: ignore[arg-type]
        quantized = {**loading, **({} if quantization_config is None else {"quantization_config": quantization_config})}
        base = load_policy(model, quantized)  # type: ignore[arg-type]
        for name in ("revision", "quantization_config"):  # the policy's own
            loading.pop(name, None)
        self._prompt_padding, vocabulary = tokenizer.pad_token_id, vocabulary_size(base)
        tokenizer = with_known_padding(tokenizer, vocabulary, "the policy")
        template = args.chat_template_kwargs
        check_first_prompts((train_dataset, eval_dataset), tokenizer, template, self._prompt_padding, vocabulary)  # type: ignore[arg-type]
        check_lengths(PROMPTS_OR_TOKENS, args, train_dataset, eval_dataset, tokenizer, base.config)
        given = loaded_rewards(given, loading)
        tokenizers = [*_as_list(reward_processing_classes), *[None] * len(_as_list(reward_model))]
        read_by = None if reward_processing_classes is None else tokenizers
        rewards = RewardFunctions(given, args.reward_weights, read_by, tokenizer, template)  # type: ignore[arg-type]
        path = model if isinstance(model, str) else None
        value = value_model_of(base, value_model, path, loading, tokenizer)  # before an adapter is put on
        names, copied = (args.model_adapter_name, args.ref_adapter_name), args.kl_is_measured and ref_model is None
        policy = with_adapter(base, peft_config, *names, copied=copied)
        reference = None
        if args.kl_is_measured:
            reference = reference_of(policy, path, quantized) if ref_model is None else load_policy(ref_model, loading)
        if reference is not None:
            check_vocabularies(base, reference, "reference")
        super().__init__(
            rewards,
            rollout_func,
            kl_groups,
            args,
            PolicyAndValue(policy, value),
            reference,
            tokenizer,
            train_dataset,
            eval_dataset,
            optimizers=optimizers,
            callbacks=callbacks,
        )
        self._clipping = Clipping(args.cliprange, args.cliprange_value)
        self._token_sums: dict[str, list[Tensor]] = defaultdict(list)
        self._watch_health(self.model.policy, gain="reward", entropy="policy/entropy_avg", tokenizer=tokenizer)
        self._weights: list[Tensor] = []  # importance weights on the KL loss, of the step's updates
        self._watch_gold(gold_reward_func)

    @property
    def _saved_model(self) -> Any:
        return self._policy  # without the value model beside it

    @property
    def _reference_adapter(self) -> str | None:
        return self.args.ref_adapter_name or super()._reference_adapter

    def training_step(self, model: Any, inputs: Rows, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """One rollout and all its optimizer steps but the last, which transformers' loop clips, takes and logs."""
        self.kl.start(self.state.max_steps)
        model.train()
        self._check_weights()
        rollout = self._make_rollout(inputs)
        self._watch(rollout)
        if self._step_is_finite(model, decisive=ADVICE):
            loss = self._update(model, self._shape(rollout))
        else:
            self._judged, loss = True, torch.zeros((), device=self.accelerator.device)
        self._metrics["train"]["episode"] = [(self.state.global_step + 1) * self.args.batch_size]
        self._end_kl_step()
        return loss

    def prediction_step(self, model: Any, inputs: Rows, *args: Any, **kwargs: Any) -> tuple[None, None, None]:  # type: ignore[override]
        """Sample, reward and score an answer to each prompt; there is no loss to report."""
        self._make_rollout(inputs)
        return None, None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = self._mode
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        logs.update({f"{prefix}{name}": sum(v) / len(v) for name, v in self._metrics[mode].items()})
        logs.update({f"{prefix}{name}": total / count for name, (total, count) in self._pooled[mode].items()})
        self._metrics[mode].clear()
        self._pooled[mode].clear()
        super().log(logs, *args, **kwargs)

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        with self._sampling():
            return super()._sample(prompt_ids)

    # Rewards and KL to advantages

    @torch.no_grad()
    def _shape(self, rollout: Rollout) -> Experience:
        mask = rollout.mask
        rewards, direct = self._shape_rewards(rollout)
        scale = torch.ones_like(rewards[0, 0])
        if self.args.whiten_rewards:
            scale = scale / mean_and_std(rewards, mask, self._sum)[1]
        gamma, lam = self.args.gamma, self.args.lam
        advantages, returns = generalized_advantages(scale * rewards, rollout.values, mask, gamma=gamma, lam=lam)  # type: ignore[arg-type]
        advantages = advantages + scale * direct
        if self.args.whiten_advantages:
            mean, std = mean_and_std(advantages, mask, self._sum)
            advantages, scale = torch.where(mask, (advantages - mean) / std, 0.0), scale / std
        return Experience(rollout, advantages, returns, scale)

    def _shape_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(B, T) reward after each token, for the value model to predict; and what goes to the advantages directly.

        The score comes with the last token that the policy produced. Credit "return_to_go" charges a token's KL as a
        reward; "future" charges it one token earlier, so that the return holds the KL after the token; "immediate" and
        "sequence" are no returns of a reward, and are charged less a leave-one-out baseline.
        """
        mask, term = rollout.mask, self.kl_term
        last = last_token_index(mask)
        answered = (last >= 0).nonzero().squeeze(1)
        rewards = torch.zeros_like(rollout.sampler_logps)  # type: ignore[arg-type]
        rewards[answered, last[answered]] = rollout.scores[answered]
        charged, direct = torch.zeros_like(rewards), torch.zeros_like(rewards)
        if term.in_reward and self.args.kl_is_penalised:
            self.kl.reached.add(KL_IN_REWARD)
            coef = self._coef_of(rollout)
            penalty = term.penalty(rollout.sampler_logps, rollout.ref_logps, mask, exact=rollout.exact)  # type: ignore[arg-type]
            if term.credit_kind == "return_to_go":
                charged = -coef * penalty
            elif term.credit_kind == "future":
                # Paid a token early, so discounted here: the KL of token s weighs gamma^(s-t) in every credit.
                charged = -coef * self.args.gamma * next_token_values(penalty, mask)
            else:
                credit = kl_credit(penalty, mask, credit=term.credit_kind)  # type: ignore[arg-type]
                direct = -coef * (credit - leave_one_out_baseline(credit, mask, len(credit)))
        return rewards + charged, direct

    def _coef_of(self, rollout: Rollout) -> Tensor | float:
        """`kl_coef`, (B, 1) where it differs by group."""
        return self.kl_coef if rollout.groups is None else self.kl.coef_of(rollout.groups)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # Updates

    def _update(self, model: Any, experience: Experience) -> Tensor:
        """All optimizer steps of a rollout but the last; returns their mean loss."""
        total = torch.zeros((), device=self.accelerator.device)
        minibatches = list(self._minibatches(len(experience.rollout.scores)))
        for number, rows in enumerate(minibatches):
            if number > 0:
                self._optimizer_step(model)
            self._is_first_use = number < self.args.num_mini_batches
            total += self._accumulate(model, experience, rows)
        self._record_update()
        return total / len(minibatches)

    def _minibatches(self, answers: int) -> Iterator[Tensor]:
        """Rows of each optimizer step: every epoch a new permutation of the rollout, cut into num_mini_batches."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(answers).chunk(self.args.num_mini_batches)

    def _optimizer_step(self, model: Any) -> None:
        """What transformers' loop does at the end of a step. (DeepSpeed's engine has stepped in the backward.)"""
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, norm)  # drops gradients that are not finite
        self.optimizer.step()
        model.zero_grad()

    def _accumulate(self, model: Any, experience: Experience, rows: Tensor) -> Tensor:
        """Add up the gradients of a minibatch, by micro-batches: of the mean over its tokens on all processes."""
        count = self._sum(experience.rollout.mask[rows].sum())
        tokens = count.clamp(min=1) / self.accelerator.num_processes
        micro_batches = rows.split(self.args.per_device_train_batch_size)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        total = torch.zeros((), device=tokens.device)
        for number, part in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._loss_for_deepspeed(self._loss(model, experience, part) / tokens)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
            total += loss.detach()
        if not count:  # nothing was scored, and without a gradient nothing moves, not by momentum either
            model.zero_grad()
        self.guard.watch(LOSS, total)
        return total

    def _loss(self, model: Any, experience: Experience, rows: Tensor) -> Tensor:
        """Sum of the loss over the tokens of some answers."""
        part, batch = experience.rollout.rows(rows), experience.batch(rows)
        with self._exact_kl(model, part, with_grad=True) as exact:
            output = model(part.input_ids, part.attention_mask, part.length)
        policy_logps = self._logps(output.logits, part)
        per_token, policy_metrics = policy_loss(policy_logps, batch, self._clipping)
        value_error, value_metrics = value_loss(output.state_values.float(), batch, self._clipping)
        with torch.set_grad_enabled(self.args.entropy_coef != 0):
            entropy = entropy_from_logits(output.logits.float() / self.args.temperature)
        per_token = per_token + self.args.vf_coef * value_error - self.args.entropy_coef * entropy
        metrics = policy_metrics | value_metrics | {"policy/entropy_avg": entropy.detach()}
        if self.kl_term.in_loss and self.args.kl_is_penalised:
            kl_loss = experience.scale * self._kl_loss(policy_logps, part, exact[0] if exact else None)
            kl_loss = self._coef_of(part) * kl_loss
            per_token = per_token + kl_loss
            metrics["kl/loss"] = kl_loss.detach()
        for name, values in metrics.items():
            self._token_sums[name].append(masked_sum(values, part.mask))
        self._token_sums["tokens"].append(part.mask.sum())
        return masked_sum(per_token, part.mask)

    def _kl_loss(self, policy_logps: Tensor, part: Rollout, exact: Tensor | None) -> Tensor:
        """(B, T) KL loss in nats, weighted by the policy's ratio to what it was when it sampled."""
        self.kl.reached.add(KL_IN_LOSS)
        logps, sampler_logps, ref_logps = policy_logps, part.sampler_logps, part.ref_logps
        weights = None
        if self.kl_term.takes_weights:
            level = self.kl_term.weight_level
            weights = importance_weights(logps, sampler_logps, part.mask, level=level)  # type: ignore[arg-type]
            self._weights.append(weights[part.mask])
            if self._is_first_use:
                of_tokens = importance_weights(logps, sampler_logps, part.mask, level="token")  # type: ignore[arg-type]
                self.kl.weight_mean.add("train", of_tokens, part.mask, part.prompts)
        kl_loss = self.kl_term.loss(logps, ref_logps, part.mask, weights=weights, exact=exact)  # type: ignore[arg-type]
        self.guard.watch(KL, kl_loss, part.mask)
        return kl_loss

    def _record_update(self) -> None:
        """Means over the real tokens of all updates of the rollout, on all processes."""
        sums = {name: torch.stack(values).sum() for name, values in self._token_sums.items()}
        self._token_sums.clear()
        if not sums:  # the loss is not ours: `AppliedKLCheck` says so where a KL was wanted
            return
        tokens = sums.pop("tokens")
        self._record_means({name: (total, tokens) for name, total in sums.items()})
        if self._weights:
            weights = torch.cat(self._weights)
            self._weights.clear()
            for name, value in self.kl.weight_metrics(weights, torch.ones_like(weights)).items():
                self._metrics["train"][name].append(value)


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
