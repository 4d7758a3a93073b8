"""The first half of a PPO step: answers are sampled, rewarded, scored and measured. Shape legend: see trainer.py."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.utils import print_prompt_completions_sample

from ...kl import fill_masked, importance_weights, kl_estimate, masked_sum
from ...kl.estimators import SAMPLED_ESTIMATORS
from ..exact.scored_head import Asked, Entropy, ScoredHead
from ..reference.adapters import as_reference
from ..rewarding.functions import RewardFunctions, finite_rewards
from ..session.prompts import prompt_numbers
from ..session.session import ORIGIN
from ..shared.engine import cut_ratios, engine_kl, weighted
from ..shared.generation import until_stop
from ..shared.step_guard import REWARDS
from .prompts import PromptReader, RolloutFunction, Rows, take_answers
from .rollout import Answers, Rewarded, Rollout, Scores, padded

if TYPE_CHECKING:
    from .trainer import KLXPPOTrainer

# A compiled model (torch_compile) would keep a graph of the function that stands in for its head for one call.
_uncompiled = partial(torch.compiler.set_stance, "force_eager")

_PRINTED = 5  # answers that num_sample_generations shows at a time


class PPOSampler:
    """Makes rollouts, the same way for training and for evaluation, and records their rewards and their KL.

    Args:
        trainer: whose policy answers, and whose models score.
        prompts: reads the rows.
        rewards: the reward functions and models.
        rollout_func: samples the answers in the policy's place; None: the policy does.
        heads: output heads of policy and reference, which score the tokens.
    """

    def __init__(
        self,
        trainer: "KLXPPOTrainer",
        prompts: PromptReader,
        rewards: RewardFunctions,
        rollout_func: RolloutFunction | None,
        heads: tuple[ScoredHead, ScoredHead],
    ) -> None:
        self._trainer, self._prompts, self.rewards = trainer, prompts, rewards
        self._rollout_func = rollout_func
        self._head, self._ref_head = heads

    def rollout(self, rows: Rows) -> Rollout:
        """An answer to each prompt, with its rewards and scores. Call without gradients."""
        trainer, size = self._trainer, self._trainer.args.local_rollout_forward_batch_size
        answers = self.answers(rows)
        rewarded = self._rewarded(answers, trainer.kl.group_numbers(rows))
        if trainer.gold is not None and trainer.mode == "eval":
            gold = RewardFunctions([trainer.gold.reward], None, None, trainer.processing_class)
            gold_rewards, _ = self.rewards_of(answers, gold)
            trainer.gold.measure(
                answers.prompts, *trainer.accelerator.gather((rewarded.scores, gold_rewards[:, 0].to(rewarded.scores)))
            )
        parts = [rewarded.rows(slice(start, start + size)) for start in range(0, len(rows), size)]
        rollout = Rollout.joined([self._scored(part) for part in parts])
        self._record_kl(rollout)
        return rollout

    # Answers and rewards

    def answers(self, rows: Rows) -> Answers:
        """One answer to each prompt."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "input_ids")}
        prompts, prompt_ids = self._prompts.read(rows)
        if self._rollout_func is None:
            self._prompts.check(prompt_ids, "a prompt")
            with self._trainer.guard.sampling():
                completion_ids, engine_logps = self._sampled(prompt_ids)
            policy_made = [[1] * len(ids) for ids in completion_ids]
        else:
            engine_logps = None
            if self._trainer.engine is not None:
                self._trainer.engine.update()  # the function may ask it, as TRL's for GRPO do
            given = dict(self._rollout_func(prompts, self._trainer))
            prompt_ids, completion_ids, policy_made = take_answers(given, len(prompts))
            given.pop("logprobs", None)  # the trainer scores at its own temperature
            columns |= given
            self._prompts.check([*prompt_ids, *completion_ids], "what rollout_func returned")
        texts: list = self._trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return Answers(prompts, texts, prompt_ids, completion_ids, policy_made, engine_logps, columns)

    def _sampled(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        """An answer to each prompt, up to its end; and log-probs of its tokens where an engine has sampled them."""
        trainer = self._trainer
        if trainer.engine is not None:
            return trainer.engine.sample(prompt_ids)
        return [until_stop(ids, trainer.stop_tokens) for ids in trainer.generate(prompt_ids)], None

    def _rewarded(self, answers: Answers, groups: Tensor | None) -> Rewarded:
        args, state, device = self._trainer.args, self._trainer.state, self._trainer.accelerator.device
        fill = self._trainer.processing_class.pad_token_id
        prompt_ids, prompt_mask = padded(answers.prompt_ids, fill, "left", device)
        completion_ids, completion_mask = padded(answers.completion_ids, fill, "right", device)
        policy_made, _ = padded(answers.policy_made, 0, "right", device)
        engine_logps = None
        if answers.engine_logps is not None:
            engine_logps, _ = padded(answers.engine_logps, 0, "right", device)
        given, extra = self.rewards_of(answers, self.rewards)
        rewards = self._finite(given).to(device, non_blocking=True)
        scores = self.rewards.total(rewards).masked_fill(rewards.isnan().all(1), torch.nan)
        finished = torch.tensor(answers.finished(self._trainer.stop_tokens)).to(device, non_blocking=True)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~finished).float()
        self._record_rewards(rewards, scores, finished, completion_mask)
        mode, names = self._trainer.mode, self.rewards.names
        self._trainer.answers.add(mode, answers.prompts, answers.completions, names, given)
        times = args.num_sample_generations
        if times and self._trainer.mode == "train" and state.global_step % max(1, state.max_steps // times) == 0:
            self.print(answers, given, extra)
        return Rewarded(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
            mask=policy_made.bool(),
            prompts=prompt_numbers(answers.prompts, device),
            groups=groups,
            scores=scores,
            engine_logps=engine_logps,
            counts=[sum(made) for made in answers.policy_made],
        )

    def rewards_of(self, answers: Answers, functions: RewardFunctions) -> tuple[Tensor, dict[str, list]]:
        """(B, F) rewards of some functions, on the CPU, and the columns that they log beside them (`log_extra`)."""
        logged: dict[str, list[float]] = defaultdict(list)
        extra: dict[str, list] = {}
        columns = {
            **answers.columns,
            "trainer_state": self._trainer.state,
            "log_metric": lambda name, value: logged[name].append(float(value)),
            "log_extra": extra.__setitem__,
        }
        device = self._trainer.accelerator.device
        rewards = functions(answers.prompts, answers.completions, answers.completion_ids, columns, device)
        if logged:  # the same names on every process, as TRL's GRPO requires too
            pairs = torch.tensor([[sum(v), len(v)] for _, v in sorted(logged.items())])
            totals = pairs.to(device, non_blocking=True)
            self._pool({name: (total, count) for name, (total, count) in zip(sorted(logged), totals, strict=True)})
        return rewards, extra

    def _finite(self, rewards: Tensor) -> Tensor:
        """(B, F) without infinite rewards; a rollout in which no answer has a reward is not learnt from."""
        infinite = rewards.isinf().sum(0)
        rewards, _ = finite_rewards(rewards, self.rewards.names)
        counted = torch.cat([(~rewards.isnan()).any(1).sum(0, keepdim=True), infinite])
        counted = counted.to(self._trainer.accelerator.device, non_blocking=True)
        scored, *infinite = self._trainer.accelerator.reduce(counted, reduction="sum").tolist()
        for name, count in zip(self.rewards.names, infinite, strict=True):
            if count:
                self._trainer.metrics.add(self._trainer.mode, f"rewards/{name}/infinite", float(count))
        if not scored and self._trainer.mode == "train":
            self._trainer.guard.watch(REWARDS, torch.nan)
        return rewards

    # Scores

    def _scored(self, part: Rewarded) -> Rollout:
        """Answers as policy, value model and reference score them now."""
        trainer, ref_logps, hidden, origin_logps = self._trainer, None, None, None
        if trainer.args.kl_is_measured:
            ref_logps, hidden = self._reference_scores(part, keeps_hidden=trainer.args.kl_needs_exact)
            origin_logps = trainer.reference.origin_logps(ref_logps, lambda: self._reference_scores(part)[0])
        ref_hidden = None if hidden is None else list(hidden.split(part.counts))
        scores = self.scores(trainer.model, part, ref_hidden)
        at_update = trainer.kl_in_loss or trainer.kl_at_update
        learns_exact = trainer.mode == "train" and at_update and trainer.kl_term.estimator == "exact"
        return Rollout(
            **vars(part),
            old_logps=scores.logps,
            values=scores.values,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden if learns_exact else None,  # the largest tensor of all
            exact=scores.exact,
            origin_logps=origin_logps,
        )

    def scores(
        self, model: Any, part: Rewarded, ref_hidden: list[Tensor] | None, *, entropy: Entropy = "none"
    ) -> Scores:
        """Of policy and value model in one forward of `model`; and the exact KL, where `ref_hidden` is given."""
        asked = self._asked(self._head, part, entropy=entropy)
        if ref_hidden is not None:
            direction = self._trainer.kl_term.direction
            hidden = torch.cat(ref_hidden)
            asked = replace(asked, ref_hidden=hidden, reference=self._ref_head, direction=direction)
        with _uncompiled():
            output = model(part.input_ids, part.attention_mask, asked)
        values = fill_masked(output.state_values.float(), part.mask)
        return Scores(output.logps, values, output.get("entropy"), output.get("exact"))

    def logps(self, part: Rewarded) -> Tensor:
        """(B, T) log-probs under the policy as it is, without a gradient."""
        with torch.no_grad(), self._trainer.without_checkpointing():
            return self.scores(self._trainer.model, part, None).logps

    def _reference_scores(self, part: Rewarded, *, keeps_hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs and, for an exact KL, the (N, H) hidden states of the tokens that count."""
        trainer, model, reference = self._trainer, self._trainer.model, self._trainer.ref_model
        asked = self._asked(self._ref_head, part, keeps_hidden=keeps_hidden)
        with _uncompiled():
            if reference is None:
                with as_reference(trainer.policy, trainer.args.ref_adapter_name):
                    output = model(part.input_ids, part.attention_mask, asked, with_values=False)
            else:
                wrapper = trainer.accelerator.unwrap_model(model)
                output = wrapper.run(reference, part.input_ids, part.attention_mask, asked)
        return output.logps, None if output.hidden is None else output.hidden.tensor

    def _asked(self, head: ScoredHead, part: Rewarded, **more: Any) -> Asked:
        return Asked(head, part.input_ids[:, -part.length :], part.mask, sum(part.counts), **more)

    # Metrics

    def _record_rewards(self, rewards: Tensor, scores: Tensor, finished: Tensor, completion_mask: Tensor) -> None:
        rows, scored = torch.ones_like(scores).sum(), (~scores.isnan()).sum()
        sums = {
            "reward": (scores.nansum(), scored),
            "objective/scores": (scores.nansum(), scored),
            "completions/mean_length": (completion_mask.sum(), rows),
            "completions/clipped_ratio": ((~finished).sum(), rows),
        }
        for name, column in zip(self.rewards.names, rewards.unbind(1), strict=True):
            sums[f"rewards/{name}/mean"] = (column.nansum(), (~column.isnan()).sum())
        self._pool(sums)
        reduce = self._trainer.accelerator.reduce
        total, count = reduce(torch.stack([scores.nansum(), scored.to(scores)]), reduction="sum")
        # NaN where no answer has a reward, on any process: then nothing is logged.
        spread = reduce((scores - total / count).square().nansum().where(count > 0, torch.nan), reduction="sum")
        self._trainer.metrics.defer(self._trainer.mode, "reward_std", (spread / (count - 1).clamp(min=1)).sqrt())

    def _record_kl(self, rollout: Rollout) -> None:
        """The KL is measured where it is unbiased: on fresh answers, before any of the step's updates."""
        trainer, logps, mask = self._trainer, rollout.old_logps, rollout.mask
        rows = torch.ones_like(rollout.scores).sum()
        weights = None if rollout.engine_logps is None else self._record_engine(rollout, rollout.engine_logps)

        def of_policy(values: Tensor) -> Tensor:
            return values if weights is None else weighted(weights, values)

        sums = {"objective/entropy": (-masked_sum(of_policy(logps), mask), rows)}
        if rollout.ref_logps is not None:
            names = [name for name in SAMPLED_ESTIMATORS if name in trainer.kl.names]
            values: dict[str, Tensor] = {name: of_policy(kl_estimate(logps, rollout.ref_logps, name)) for name in names}
            if rollout.exact is not None:
                values["exact"] = rollout.exact
            if rollout.origin_logps is not None:
                values[ORIGIN] = of_policy(kl_estimate(logps, rollout.origin_logps, "k3"))
            trainer.kl.measure(trainer.mode, values, mask, rollout.prompts, rollout.groups)
            kl = values[trainer.kl_term.estimator]
            sums["objective/kl"] = (masked_sum(kl, mask), rows)
            if trainer.args.kl_is_penalised:  # what every placement maximises
                charged = masked_sum(trainer.kl.coef_of(rollout.groups) * kl, mask, dim=1)
                scored = ~rollout.scores.isnan()
                sums["objective/non_score_reward"] = (-masked_sum(charged, scored), scored.sum())
                sums["objective/rlhf_reward"] = (masked_sum(rollout.scores - charged, scored), scored.sum())
        self._pool(sums)

    def _record_engine(self, rollout: Rollout, engine_logps: Tensor) -> Tensor:
        """How far the engine is from the policy; (B, T) weights of policy to engine, which correct what is measured."""
        trainer, old_logps, mask = self._trainer, rollout.old_logps, rollout.mask
        mode, args = trainer.mode, trainer.args
        apart, scored = engine_kl(old_logps, engine_logps, mask)
        weights = importance_weights(old_logps, rollout.sampler_logps, mask, level="token")
        trainer.kl.sampler_kl.add(mode, apart, scored, rollout.prompts)
        trainer.kl.weight_mean.add(mode, weights, scored, rollout.prompts)
        if args.vllm_importance_sampling_correction:
            self._pool({"kl/ratio_cut": cut_ratios(old_logps, engine_logps, mask, args)})
        if mode == "eval" or not (args.kl_is_penalised and trainer.kl_term.depends_on_sampler):  # else at the updates
            trainer.metrics.defer_weights(mode, weights, mask, trainer.kl_term)
        return weights

    def _pool(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._trainer.metrics.pool(self._trainer.mode, sums)

    def print(self, answers: Answers, rewards: Tensor, extra: dict[str, list]) -> None:
        """Show a few answers with their rewards."""
        if self._trainer.accelerator.is_main_process:
            columns = dict(zip(self.rewards.names, rewards.T.tolist(), strict=True))
            step = self._trainer.state.global_step
            print_prompt_completions_sample(answers.prompts, answers.completions, columns, None, step, _PRINTED, extra)
