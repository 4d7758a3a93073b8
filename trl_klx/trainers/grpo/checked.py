"""TRL's GRPO trainer with checked data, rewards and sampling. Nothing here knows of a KL.

Every override of a private method of `GRPOTrainer`'s that is not about the KL is in this class; `seams` lists them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from ..checks.inputs import check_inputs, check_lengths
from ..checks.rows import PROMPTS, check_prompts
from ..checks.vocabulary import check_tokens, known_tokens
from ..rewarding.calls import checked_for_trl
from ..rewarding.functions import distinct_names, finite_rewards
from ..rewarding.models import loaded_rewards, loading_of, model_rewards, with_padding_of_its_own
from ..seams import ONE_END_TOKEN, swapped
from .batch import is_cut_off, shuffled
from .sampling import Sampling


@dataclass
class _RolloutNotes:
    """What is known inside TRL's rollout only, and not in the batch that it returns."""

    policy_made: list[list[int]] | None = None  # of each answer: 0 for tool output; None without tools
    unscored: Tensor | None = None  # bool, whether no answer has a reward


class CheckedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` that reports in one sentence what is wrong with its data and rewards, and samples from the policy.

    Reward models read texts as in PPO. Left to itself, TRL would load a checkpoint without a head, whose rewards are
    random, take the first of several outputs, and leave out the special tokens that a text begins with.

    A batch holds more than TRL's: `unscored`, a bool tensor, where no answer of the rollout has a reward, and with
    tools or an environment's mask `policy_made`, (B, C), 0 for what the policy has not written.

    Raises:
        ValueError: a dataset or a reward function cannot be used.
    """

    args: Any
    model: PreTrainedModel
    reward_funcs: list[Any]
    _notes = _RolloutNotes()  # of the rollout that runs

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        rewards: list[Any] = (
            reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] * (reward_funcs is not None)
        )
        more = any(kwargs.get(name) is not None for name in ("rollout_func", "environment_factory"))
        has_prompts = kwargs.get("environment_factory") is None
        check_inputs(PROMPTS, args, train_dataset, eval_dataset, rewards, more=more, has_prompts=has_prompts)
        loaded = loaded_rewards(rewards, loading_of(args)) if reward_funcs is not None else None
        known, self._vocabulary = known_tokens(model, args, processing_class)
        super().__init__(model, loaded, args, train_dataset, eval_dataset, known, *positional, **kwargs)
        for index, reward in enumerate(self.reward_funcs):
            if isinstance(reward, nn.Module):
                own = self.reward_processing_classes[index]
                self.reward_processing_classes[index] = with_padding_of_its_own(reward, own)
        self.reward_func_names = distinct_names(self.reward_func_names, self.reward_funcs)
        check_lengths(PROMPTS, args, train_dataset, eval_dataset, self._tokenizer, self.model.config)
        self.sampling = Sampling(self, may_change=args.kl_is_measured)
        self.eos_token_ids = self.sampling.ends  # what TRL 1.16 reads

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with swapped(grpo_trainer, shuffle_sequence_dict=shuffled):
            return super()._prepare_inputs(generation_batch)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self._vocabulary is not None:
            check_tokens(prompt_ids, self._vocabulary, "a prompt")
        with self.sampling.from_the_policy() as sampled:
            completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.sampling.cut(completion_ids, logps, sampled)

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self._notes.policy_made = output[2]
        if self._ends_are_miscounted:
            self._count_ends(completion_ids=output[1], tool_mask=output[2])
        return output

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _is_first_use(self) -> bool:
        """Whether the policy has not been trained on the answers of this micro-batch (`num_iterations`)."""
        earlier_uses = self._step // self.args.micro_batches_per_rollout % self.num_iterations
        return not self.model.training or earlier_uses == 0

    def _reuses_rollout(self) -> bool:
        """Whether the next step trains on answers of the rollout in use (TRL's own condition)."""
        return self._step % (self.args.micro_batches_per_rollout * self.num_iterations) != 0

    @property
    def _accumulation(self) -> float:
        """Micro-batches that one optimizer step sums up; evaluation takes each batch for itself."""
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    @property
    def _ends_are_miscounted(self) -> bool:
        return ONE_END_TOKEN and len(self.sampling.ends) > 1

    def _count_ends(self, completion_ids: list[list[int]], tool_mask: list[list[int]] | None) -> None:
        """Replace TRL's latest metrics of answers that are cut off, and of the lengths of the others."""
        ends = {*self.sampling.ends, self._tokenizer.pad_token_id}
        device = self.accelerator.device
        is_cut = torch.tensor([not ids or ids[-1] not in ends for ids in completion_ids], device=device)
        counts = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(row) for row in tool_mask]
        is_cut, lengths = self.accelerator.gather((is_cut, torch.tensor(counts, device=device)))
        ended = lengths[~is_cut].float() if not is_cut.all() else torch.zeros(1)
        metrics = self._metrics[self._mode]
        metrics["completions/clipped_ratio"][-1] = is_cut.float().mean().item()
        for name, value in (("mean", ended.mean()), ("min", ended.min()), ("max", ended.max())):
            metrics[f"completions/{name}_terminated_length"][-1] = value.item()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # Environments may make the prompts.
        check_prompts([row["prompt"] for row in inputs if "prompt" in row or self.environment_factories is None])
        masks_here = self.mask_truncated_completions and self._ends_are_miscounted
        notes = _RolloutNotes()
        masks = self.mask_truncated_completions and not masks_here
        with swapped(self, _notes=notes, mask_truncated_completions=masks):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if notes.unscored is not None:
            output["unscored"] = notes.unscored
        if notes.policy_made is not None:  # TRL's tool_mask is 0 all over an answer that is cut off and masked
            output["policy_made"] = torch.zeros_like(output["completion_mask"])
            for row, made in zip(output["policy_made"], notes.policy_made, strict=True):
                row[: len(made)] = torch.tensor(made)
        return self._without_cut_answers(output) if masks_here else output

    def _without_cut_answers(self, output: dict[str, Any]) -> dict[str, Any]:
        """Mask answers that are cut off, as TRL does with `mask_truncated_completions`."""
        ends = [*self.sampling.ends, self._tokenizer.pad_token_id]
        kept = ~is_cut_off(output["completion_ids"], output["completion_mask"], ends).unsqueeze(1)
        masks: dict[str, Any] = {
            name: output[name] * kept for name in ("completion_mask", "tool_mask") if name in output
        }
        mask: Tensor = masks["completion_mask"] * masks.get("tool_mask", 1)
        return {**output, **masks, "num_items_in_batch": self.accelerator.gather(mask.sum()).sum()}

    def _calculate_rewards(self, *given: Any) -> Tensor:
        """(answers of all processes, rewards); TRL takes NaN for a reward that does not apply."""
        rewards, infinite = finite_rewards(self._rewards_as_given(*given), self.reward_func_names)
        for name, count in infinite.items():
            self._metrics[self._mode][f"rewards/{name}/infinite"].append(count)
        self._notes.unscored = rewards.isnan().all()
        return rewards

    def _rewards_as_given(self, *given: Any) -> Tensor:
        """TRL's, of functions that return floats or raise a `RewardError`; TRL would take the keys of a dict."""
        scored_by = zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names, strict=True)
        functions = [
            functools.partial(self._model_rewards, reward, tokenizer)
            if isinstance(reward, nn.Module)
            else checked_for_trl(name, reward, can_wait=self._has_async_funcs)
            for reward, tokenizer, name in scored_by
        ]
        with swapped(self, reward_funcs=functions):
            return super()._calculate_rewards(*given)

    def _model_rewards(
        self, model: nn.Module, tokenizer: Any, prompts: list, completions: list, **_: Any
    ) -> list[float]:
        kwargs: Any = self.chat_template_kwargs
        return model_rewards(model, tokenizer, prompts, completions, kwargs, self.accelerator.device).tolist()
