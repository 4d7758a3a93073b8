"""The first half of a PPO step: rows of the dataset to answers, answers to rewards. Shape legend: see trainer.py."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import print_prompt_completions_sample

from ..rewarding.functions import RewardFunctions, finite_rewards
from ..session.metrics import Metrics
from ..session.prompts import prompt_numbers
from ..shared.generation import until_stop
from ..shared.step_guard import REWARDS, StepGuard
from .loop import PPOLoop
from .prompts import PromptReader, RolloutFunction, Rows, all_made, completions_like, take_answers
from .rollout import Answers, Rewarded, padded

_PRINTED = 5  # answers that num_sample_generations shows at a time


class PPOSampler:
    """Answers prompts and rewards the answers, the same way for training and for evaluation.

    Args:
        loop: the trainer, whose policy answers.
        prompts: reads the rows.
        rewards: the reward functions and models.
        rollout_func: samples the answers in the policy's place; None: the policy does.
        metrics: takes the rewards.
        guard: is told where no answer has a reward.
    """

    def __init__(
        self,
        loop: PPOLoop,
        prompts: PromptReader,
        rewards: RewardFunctions,
        rollout_func: RolloutFunction | None,
        metrics: Metrics,
        guard: StepGuard,
    ) -> None:
        self._loop, self._prompts, self.rewards, self._rollout_func = loop, prompts, rewards, rollout_func
        self._metrics, self._guard = metrics, guard

    def answers(self, rows: Rows) -> Answers:
        """One answer to each prompt."""
        tokenizer: Any = self._loop.processing_class
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "input_ids")}
        prompts, prompt_ids = self._prompts.read(rows)
        if self._rollout_func is None:
            self._prompts.check(prompt_ids, "a prompt")
            stops = self._loop.stop_tokens
            completion_ids = [until_stop(ids, stops) for ids in self._loop.generate(prompt_ids)]
            policy_made = all_made(completion_ids)
        else:
            given = dict(self._rollout_func(prompts, self._loop))
            prompt_ids, completion_ids, policy_made = take_answers(given, len(prompts))
            given.pop("logprobs", None)  # the trainer scores at its own temperature
            columns |= given
            self._prompts.check([*prompt_ids, *completion_ids], "what rollout_func returned")
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return Answers(prompts, completions_like(prompts, texts), prompt_ids, completion_ids, policy_made, columns)

    def rewarded(self, answers: Answers, groups: Tensor | None) -> Rewarded:
        """The answers as tensors, with their scores; records the rewards, and now and then prints some answers.

        `groups`, (B,), are the places of the prompts' groups.
        """
        args, state, device = self._loop.args, self._loop.state, self._loop.accelerator.device
        fill = self._loop.processing_class.pad_token_id
        prompt_ids, prompt_mask = padded(answers.prompt_ids, fill, "left", device)
        completion_ids, completion_mask = padded(answers.completion_ids, fill, "right", device)
        policy_made, _ = padded(answers.policy_made, 0, "right", device)
        rewards, extra = self.rewards_of(answers, self.rewards)
        rewards = self._finite(rewards)
        scores = self.rewards.total(rewards).masked_fill(rewards.isnan().all(1), torch.nan)
        finished = torch.tensor(answers.finished(self._loop.stop_tokens), device=device)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~finished).float()
        self._record(rewards, scores, finished, completion_mask)
        times = args.num_sample_generations
        if times and self._loop.mode == "train" and state.global_step % max(1, state.max_steps // times) == 0:
            self.print(answers, rewards, extra)
        return Rewarded(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
            mask=policy_made.bool(),
            prompts=prompt_numbers(answers.prompts, device),
            groups=groups,
            scores=scores,
        )

    def rewards_of(self, answers: Answers, functions: RewardFunctions) -> tuple[Tensor, dict[str, list]]:
        """(B, F) rewards of some functions, and the columns that they log beside them (`log_extra`)."""
        logged: dict[str, list[float]] = defaultdict(list)
        extra: dict[str, list] = {}
        columns = {
            **answers.columns,
            "trainer_state": self._loop.state,
            "log_metric": lambda name, value: logged[name].append(float(value)),
            "log_extra": extra.__setitem__,
        }
        device = self._loop.accelerator.device
        rewards = functions(answers.prompts, answers.completions, answers.completion_ids, columns, device)
        if logged:  # the same names on every process, as TRL's GRPO requires too
            pairs = {name: torch.tensor([sum(v), len(v)], device=device) for name, v in sorted(logged.items())}
            self._metrics.pool(self._loop.mode, {name: (pair[0], pair[1]) for name, pair in pairs.items()})
        return rewards, extra

    def _finite(self, rewards: Tensor) -> Tensor:
        """(B, F) without infinite rewards; a rollout in which no answer has a reward is not learnt from."""
        names = self.rewards.names
        rewards, counts = finite_rewards(rewards, names)
        scored = (~rewards.isnan()).any(1).sum()
        counted = torch.stack([scored, *(scored.new_tensor(counts.get(name, 0)) for name in names)])
        scored, *infinite = self._loop.accelerator.reduce(counted, reduction="sum").tolist()
        for name, count in zip(names, infinite, strict=True):
            if count:
                self._metrics.add(self._loop.mode, f"rewards/{name}/infinite", float(count))
        if not scored and self._loop.mode == "train":
            self._guard.watch(REWARDS, torch.nan)
        return rewards

    def _record(self, rewards: Tensor, scores: Tensor, finished: Tensor, completion_mask: Tensor) -> None:
        rows, scored = torch.ones_like(scores).sum(), (~scores.isnan()).sum()
        sums = {
            "reward": (scores.nansum(), scored),
            "objective/scores": (scores.nansum(), scored),
            "completions/mean_length": (completion_mask.sum(), rows),
            "completions/clipped_ratio": ((~finished).sum(), rows),
        }
        for name, column in zip(self.rewards.names, rewards.unbind(1), strict=True):
            sums[f"rewards/{name}/mean"] = (column.nansum(), (~column.isnan()).sum())
        means = self._metrics.pool(self._loop.mode, sums)
        if "reward" not in means:  # on any process
            return
        spread = (scores - means["reward"]).square().nansum()
        squares, count = self._loop.accelerator.reduce(torch.stack([spread, scored.to(spread)]), reduction="sum")
        self._metrics.add(self._loop.mode, "reward_std", float((squares / (count - 1).clamp(min=1)).sqrt()))

    def print(self, answers: Answers, rewards: Tensor, extra: dict[str, list]) -> None:
        """Show a few answers with their rewards."""
        if self._loop.accelerator.is_main_process:
            columns = dict(zip(self.rewards.names, rewards.T.tolist(), strict=True))
            step = self._loop.state.global_step
            print_prompt_completions_sample(answers.prompts, answers.completions, columns, None, step, _PRINTED, extra)
