"""The first half of a PPO step: sample answers, reward them, score them under policy, value model and reference.

Shape legend: B answers, P prompt tokens, T answer tokens, L = P + T, H hidden size, V vocabulary, F rewards.
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.distributed import DistributedBackend
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import print_prompt_completions_sample, selective_log_softmax

from ...kl import kl_estimate, masked_sum
from ...kl.estimators import SAMPLED_ESTIMATORS
from ..checks.vocabulary import check_tokens, vocabulary_size
from ..exact.forward import ExactKLForward, exact_kl_between
from ..rewarding.functions import RewardFunctions, finite_rewards
from ..rewarding.gold import GoldWatch
from ..session.coefficient import KLCoefficient
from ..session.prompts import prompt_numbers
from ..session.session import KLControl
from ..shared.generation import end_tokens, until_stop
from ..shared.step_guard import KL, POLICY, REFERENCE, REWARDS, VALUES, StepGuard
from .config import KLXPPOConfig
from .loop import PPOLoop
from .rollout import (
    Answers,
    Rollout,
    RolloutFunction,
    Rows,
    check_answers,
    completions_like,
    padded,
    read_prompts,
    sample,
    take_answers,
)

_PRINTED = 5  # answers that num_sample_generations shows at a time


class PPOSampler(GoldWatch, PPOLoop):
    """Makes rollouts, the same way for training and for evaluation, and records their rewards and their KL.

    Args:
        rewards: the reward functions and models.
        rollout_func: samples the answers in place of `generate`, or None.
        kl_groups: the groups of `kl_group_column`.
        *args, **kwargs: see `PPOLoop`.
    """

    args: KLXPPOConfig
    kl_coef = KLCoefficient()
    _prompt_padding: int | None = None  # what fills up prompts that come as tokens without attention_mask

    def __init__(
        self,
        rewards: RewardFunctions,
        rollout_func: RolloutFunction | None,
        kl_groups: tuple[str, ...],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        config, tokenizer = self.args, self.processing_class
        self._rewards, self._rollout_func = rewards, rollout_func
        self.reward_func_names = rewards.names
        rewards.rewards = [self._frozen(r) if isinstance(r, nn.Module) else r for r in rewards.rewards]
        self.stop_tokens = _stop_tokens(config, self._policy, tokenizer)
        self.generation_config = GenerationConfig(
            max_new_tokens=config.response_length,
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.stop_tokens or None,
        )
        self._metrics: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        # Sums and counts by name: what _record_means pools until the next log.
        self._pooled: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self._backend = DistributedBackend(self.accelerator)
        self.kl = KLControl(config, self.accelerator, kl_groups)
        self.guard = StepGuard(self.accelerator)
        self.kl_term = config.kl_term()
        self._exact = self._exact_forward() if config.kl_needs_exact else None

    def _exact_forward(self) -> ExactKLForward:
        temperature, direction = self.args.temperature, self.kl_term.direction
        return exact_kl_between(self, self.model.policy, temperature=temperature, direction=direction)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @torch.no_grad()
    def generate_completions(self, sampling: bool = False) -> None:
        """Print answers to the prompts of eval_dataset with their rewards; with `sampling`, of its first batch only."""
        if self.eval_dataset is None:
            return
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):  # type: ignore[arg-type]
            for rows in self.get_eval_dataloader():
                answers = self._answer(rows)
                extra: dict[str, list] = {}
                self._print(answers, self._rewards_of(answers, extra), extra)
                if sampling:
                    break

    @torch.no_grad()
    def _make_rollout(self, rows: Rows) -> Rollout:
        """Sample, reward and score an answer to each prompt, and record its rewards and its KL.

        The KL is that of every answer; what the rollout returns counts only where a reward applies.
        """
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):  # type: ignore[arg-type]
            rollout = self._reward(self._answer(rows))
            rollout.groups = self.kl.group_numbers(rows)
            size = self.args.local_rollout_forward_batch_size
            parts = [self._score(rollout.rows(slice(i, i + size))) for i in range(0, len(rows), size)]
        rollout = Rollout.joined(parts)
        self._record_kl(rollout)
        return rollout.without_unscored()

    # Answers and rewards

    def _answer(self, rows: Rows) -> Answers:
        tokenizer: Any = self.processing_class
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "input_ids")}
        prompts, prompt_ids = read_prompts(rows, tokenizer, self.args.chat_template_kwargs, self._prompt_padding)  # type: ignore[arg-type]
        policy_made, vocabulary = None, vocabulary_size(self._policy)
        if self._rollout_func is None:
            check_tokens(prompt_ids, vocabulary, "a prompt")
            completion_ids = [until_stop(ids, self.stop_tokens) for ids in self._sample(prompt_ids)]
        else:
            given = dict(self._rollout_func(prompts, self))
            prompt_ids, completion_ids, policy_made = take_answers(given)
            given.pop("logprobs", None)  # the trainer scores at its own temperature
            columns |= given
            check_tokens([*prompt_ids, *completion_ids], vocabulary, "what rollout_func returned")
        if policy_made is None:
            policy_made = [[1] * len(ids) for ids in completion_ids]
        check_answers(len(prompts), prompt_ids, completion_ids, policy_made)
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return Answers(prompts, completions_like(prompts, texts), prompt_ids, completion_ids, policy_made, columns)

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        gather = self.args.ds3_gather_for_generation
        with (
            self.accelerator.autocast(),
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, gather) as unwrapped,
            self._backend.summon_full_params(self.model_wrapped, recurse=False),
        ):
            batch_size = self.args.local_rollout_forward_batch_size
            return sample(unwrapped, prompt_ids, self.generation_config, batch_size, self.accelerator.device)

    def _reward(self, answers: Answers) -> Rollout:
        device, fill = self.accelerator.device, self.processing_class.pad_token_id
        prompt_ids, prompt_mask = padded(answers.prompt_ids, fill, "left", device)
        completion_ids, completion_mask = padded(answers.completion_ids, fill, "right", device)
        policy_made, _ = padded(answers.policy_made, 0, "right", device)
        extra: dict[str, list] = {}
        rewards = self._finite(self._rewards_of(answers, extra))
        scores = self._rewards.total(rewards).masked_fill(rewards.isnan().all(1), torch.nan)
        finished = torch.tensor(answers.finished(self.stop_tokens), device=device)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~finished).float()
        self._record_rewards(rewards, scores, finished, completion_mask)
        if self.gold_reward_func is not None and not self.model.training:
            gold = self._rewards_of(
                answers, {}, RewardFunctions([self.gold_reward_func], None, None, self.processing_class)
            )
            self._measure_gold(answers.prompts, *self.accelerator.gather((scores, gold[:, 0])))
        times = self.args.num_sample_generations
        if times and self.model.training and self.state.global_step % max(1, self.state.max_steps // times) == 0:
            self._print(answers, rewards, extra)
        return Rollout(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
            mask=policy_made.bool(),
            prompts=prompt_numbers(answers.prompts, device),
            scores=scores,
        )

    def _rewards_of(self, answers: Answers, extra: dict[str, list], functions: RewardFunctions | None = None) -> Tensor:
        """(B, F) rewards, of `functions` where given; `extra` takes what they log beside them."""
        logged: dict[str, list[float]] = defaultdict(list)
        columns = {
            **answers.columns,
            "trainer_state": self.state,
            "log_metric": lambda name, value: logged[name].append(float(value)),
            "log_extra": extra.__setitem__,
        }
        device = self.accelerator.device
        rewards = (functions or self._rewards)(
            answers.prompts, answers.completions, answers.completion_ids, columns, device
        )
        if logged:  # the same names on every process, as TRL's GRPO requires too
            pairs = {name: torch.tensor([sum(v), len(v)], device=device) for name, v in sorted(logged.items())}
            self._record_means({name: (pair[0], pair[1]) for name, pair in pairs.items()})
        return rewards

    def _finite(self, rewards: Tensor) -> Tensor:
        """(B, F) without infinite rewards; a rollout in which no answer has a reward is not learnt from."""
        rewards, counts = finite_rewards(rewards, self._rewards.names)
        scored = (~rewards.isnan()).any(1).sum()
        counted = torch.stack([scored, *(scored.new_tensor(counts.get(name, 0)) for name in self._rewards.names)])
        scored, *infinite = self.accelerator.reduce(counted, reduction="sum").tolist()
        for name, count in zip(self._rewards.names, infinite, strict=True):
            if count:
                self._metrics[self._mode][f"rewards/{name}/infinite"].append(float(count))
        if not scored and self.model.training:
            self.guard.watch(REWARDS, torch.nan)
        return rewards

    def _watch(self, rollout: Rollout) -> None:
        """All that advantages and their whitening are made of."""
        watched = {POLICY: rollout.sampler_logps, VALUES: rollout.values}
        if self.kl_term.in_reward and self.args.kl_is_penalised:
            watched |= {REFERENCE: rollout.ref_logps, KL: rollout.exact}
        for what, values in watched.items():
            if values is not None:
                self.guard.watch(what, values, rollout.mask)

    # Scores

    def _score(self, part: Rollout) -> Rollout:
        """Log-probs under policy and reference at the sampling temperature, values, and the exact KL."""
        if self.args.kl_is_measured:
            part.ref_logps, part.ref_hidden = self._score_reference(part)
        with self._exact_kl(self.model, part, with_grad=False) as exact:
            output = self.model(part.input_ids, part.attention_mask, part.length)
        part.sampler_logps = self._logps(output.logits, part)
        part.values = torch.where(part.mask, output.state_values.float(), 0.0)
        part.exact = exact[0] if exact else None
        if not self._exact_is_in_loss:
            part.ref_hidden = None  # the largest tensor of all
        return part

    def _score_reference(self, part: Rollout) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs and, where the exact KL needs them, (B, T, H) hidden states, in one forward."""
        runner = self.model if self.ref_model is None else self.ref_model
        capture: Any = nullcontext([]) if self._exact is None else self._exact.hidden_states(runner, part.length)
        with capture as hidden:
            if self.ref_model is None:
                with self.null_ref_context():
                    output = self.model(part.input_ids, part.attention_mask, part.length, with_values=False)
            else:
                wrapper = self.accelerator.unwrap_model(self.model)
                output = wrapper.run(self.ref_model, part.input_ids, part.attention_mask, part.length)
        return self._logps(output.logits, part), hidden[0] if hidden else None

    @property
    def _exact_is_in_loss(self) -> bool:
        return self.kl_term.estimator == "exact" and self.kl_term.in_loss and self.args.kl_is_penalised

    def _exact_kl(self, model: Any, part: Rollout, *, with_grad: bool) -> Any:
        """While active, forwards of `model` compute the exact KL where it is wanted; collects it."""
        if self._exact is None or part.ref_hidden is None:
            return nullcontext([])
        return self._exact.exact_kl(model, part.ref_hidden, part.mask, with_grad=with_grad)

    def _logps(self, logits: Tensor, part: Rollout) -> Tensor:
        """(B, T) log-probs of the answer's tokens at the sampling temperature, 0 on masked positions."""
        logps = selective_log_softmax(logits.float() / self.args.temperature, part.input_ids[:, -part.length :])
        return torch.where(part.mask, logps, 0.0)

    # Records

    def _record_means(self, sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Log sum over count of each, pooled over processes and until the next log; returns those of this call.

        One collective: call on every process, with the same names.
        """
        flat = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        totals = self.accelerator.reduce(flat, reduction="sum").tolist()
        pooled, means = self._pooled[self._mode], {}
        for name, (total, count) in zip(sums, totals, strict=True):
            if count > 0 and math.isfinite(total):  # one infinite KL would hide all others until the next log
                before = pooled.get(name, (0.0, 0.0))
                pooled[name], means[name] = (before[0] + total, before[1] + count), total / count
        return means

    def _record_rewards(self, rewards: Tensor, scores: Tensor, finished: Tensor, completion_mask: Tensor) -> None:
        rows, scored = torch.ones_like(scores).sum(), (~scores.isnan()).sum()
        sums = {
            "reward": (scores.nansum(), scored),
            "objective/scores": (scores.nansum(), scored),
            "completions/mean_length": (completion_mask.sum(), rows),
            "completions/clipped_ratio": ((~finished).sum(), rows),
        }
        for name, column in zip(self._rewards.names, rewards.unbind(1), strict=True):
            sums[f"rewards/{name}/mean"] = (column.nansum(), (~column.isnan()).sum())
        means = self._record_means(sums)
        if "reward" not in means:  # on any process
            return
        spread = (scores - means["reward"]).square().nansum()
        variance = self.accelerator.reduce(torch.stack([spread, scored.to(spread)]), reduction="sum")
        self._metrics[self._mode]["reward_std"].append(float((variance[0] / (variance[1] - 1).clamp(min=1)).sqrt()))

    def _record_kl(self, rollout: Rollout) -> None:
        """The KL is measured where it is unbiased: on fresh answers, before any of the step's updates."""
        logps, mask = rollout.sampler_logps, rollout.mask
        rows = torch.ones_like(rollout.scores).sum()
        sums = {"objective/entropy": (-masked_sum(logps, mask), rows)}  # type: ignore[arg-type]
        if self.args.kl_is_measured:
            names = [name for name in SAMPLED_ESTIMATORS if name in self.kl.names]
            values: dict[str, Tensor] = {name: kl_estimate(logps, rollout.ref_logps, name) for name in names}  # type: ignore[arg-type]
            if rollout.exact is not None:
                values["exact"] = rollout.exact
            self.kl.measure(self._mode, values, mask, rollout.prompts, rollout.groups)
            kl = masked_sum(values[self.kl_term.estimator], mask)
            sums["objective/kl"] = (kl, rows)
            if self.args.kl_is_penalised:  # what every placement maximises
                coef = self.kl_coef if rollout.groups is None else self.kl.coef_of(rollout.groups)
                charged = masked_sum(coef * values[self.kl_term.estimator], mask, dim=1)
                scored = ~rollout.scores.isnan()
                sums["objective/non_score_reward"] = (-charged[scored].sum(), scored.sum())
                sums["objective/rlhf_reward"] = ((rollout.scores - charged)[scored].sum(), scored.sum())
        self._record_means(sums)

    def _print(self, answers: Answers, rewards: Tensor, extra: dict[str, list]) -> None:
        if self.accelerator.is_main_process:
            columns = dict(zip(self._rewards.names, rewards.T.tolist(), strict=True))
            step = self.state.global_step
            print_prompt_completions_sample(answers.prompts, answers.completions, columns, None, step, _PRINTED, extra)


def _stop_tokens(config: KLXPPOConfig, policy: nn.Module, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer; none where answers have full length."""
    if config.stop_token == "eos":
        return end_tokens(policy, tokenizer)
    return [] if config.stop_token_id is None else [config.stop_token_id]
