"""How GRPO samples: from the policy that it scores, and up to the first of all tokens that end an answer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from ...kl import kl_estimate, masked_sum
from ..reference.build import causal_lm
from ..seams import ONE_END_TOKEN, swapped
from ..shared.generation import end_tokens, generating_with, until_stop
from .sampled_logps import SampledLogps, recording_samples
from .sampling_settings import changed_sampling, in_words
from .scoring import is_cut_off, scored_by_sampler

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from ..shared.step_guard import GuardedSteps

    class _Trainer(GuardedSteps, GRPOTrainer): ...
else:
    _Trainer = object

logger = get_logger(__name__)
_ANOTHER = "answers are sampled from another distribution than the one that is scored"


class PolicySampling(_Trainer):
    """Mix in before `GRPOTrainer`, whose `generate` takes what its config leaves open from the model's own.

    A model's generation config may suppress tokens, penalise repetition, cut the distribution: the scores know nothing
    of it, and the KL would be that of another policy.
    """

    model: PreTrainedModel
    end_tokens: list[int]
    _changed_sampling: dict[str, Any] = {}  # by the recipe, as `changed_sampling` gives it
    _changed_sampling_is_told = False
    _policy_made: list[list[int]] | None = None  # of the latest answers: 0 for tool output; None without tools

    def _set_up_sampling(self) -> None:
        """Settle what the sampler's config leaves open, and where answers end. Call when the trainer is there."""
        ends = end_tokens(self.model, self._tokenizer)
        if self.use_vllm:
            given = self.vllm_generation.generation_kwargs
            ends = sorted({*ends, *(given.get("stop_token_ids") or ())})
            # The engine reads the end tokens of a model folder, not those of a model in memory.
            self.vllm_generation.generation_kwargs = {**given, "stop_token_ids": ends}
        else:
            config = self.generation_config
            own = config.eos_token_id  # of generation_kwargs, or what TRL takes
            ends = sorted({*ends, *(own if isinstance(own, list) else [own])} - {None})
            config.eos_token_id = ends
            # None would become transformers' default, 50; vLLM's -1 is an error.
            config.top_k = max(config.top_k or 0, 0)
            if isinstance(self.processing_class, ProcessorMixin) and config.suppress_tokens is None:
                # A sampled image token would have no image.
                config.suppress_tokens = causal_lm(self.model).generation_config.suppress_tokens
        self.end_tokens = self.eos_token_ids = ends  # the second is what TRL 1.16 reads
        if self.args.kl_is_measured and self.rollout_func is None:
            self._changed_sampling = changed_sampling(self.args)
        if self._changed_sampling and not self.use_vllm and self.use_transformers_continuous_batching:
            self._changed_sampling_is_told = True
            logger.warning(f"{in_words(self._changed_sampling)}: {_ANOTHER}; nothing corrects or measures by how much.")

    def _tell_changed_sampling(self, logps: Tensor, inputs: dict, mask: Tensor) -> None:
        """Say once, with what the first rollout shows, that the recipe samples from another distribution than scored.

        The sampler's own log-probs are among the inputs. Call on every process.
        """
        if not self._changed_sampling or self._changed_sampling_is_told:
            return
        self._changed_sampling_is_told = True
        engine_logps = inputs["sampling_per_token_logps"]
        scored = scored_by_sampler(inputs, mask)
        values = kl_estimate(engine_logps, logps, "k3"), (logps - engine_logps).exp(), torch.ones_like(logps)
        kl, weight, count = self.accelerator.reduce(torch.stack([masked_sum(value, scored) for value in values]))
        logger.warning(
            f"{in_words(self._changed_sampling)}: {_ANOTHER}, {kl / count:.2g} nats per token away from it at the "
            f"first rollout, where the weights policy/sampler average {weight / count:.3f} (below 1: the KL lacks what "
            "is never sampled); logged estimates and a weighted KL loss are corrected by these weights, a KL in the "
            "reward is not."
        )

    @contextmanager
    def _from_the_policy(self) -> Iterator[SampledLogps | None]:
        """While active, `generate` samples from the policy; records what it sampled where that has to be known."""
        if self.use_vllm:
            yield None
            return
        model = self.accelerator.unwrap_model(self.model)
        is_recorded = self._changed_sampling and not self.use_transformers_continuous_batching
        with generating_with(model, self.generation_config):
            with recording_samples(model) if is_recorded else nullcontext() as sampled:
                yield sampled

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._sampling(), self._from_the_policy() as sampled:
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        answers = [until_stop(ids, self.end_tokens) for ids in completion_ids]
        if sampled is not None:
            logprobs = sampled.of(answers)
        if logprobs is not None:
            logprobs = [row[: len(ids)] for row, ids in zip(logprobs, answers, strict=True)]
        return answers, logprobs

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self._policy_made = output[2]
        if self._ends_are_miscounted:
            self._count_ends(completion_ids=output[1], tool_mask=output[2])
        return output

    @property
    def _ends_are_miscounted(self) -> bool:
        return ONE_END_TOKEN and len(self.end_tokens) > 1

    def _count_ends(self, completion_ids: list[list[int]], tool_mask: list[list[int]] | None) -> None:
        """Replace TRL's latest metrics of answers that are cut off, and of the lengths of the others."""
        ends = {*self.end_tokens, self._tokenizer.pad_token_id}
        device = self.accelerator.device
        is_cut = torch.tensor([not ids or ids[-1] not in ends for ids in completion_ids], device=device)
        counts = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(row) for row in tool_mask]
        is_cut, lengths = self.accelerator.gather((is_cut, torch.tensor(counts, device=device)))
        ended = lengths[~is_cut].float() if not is_cut.all() else torch.zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = is_cut.float().mean().item()
        for name, value in (("mean", ended.mean()), ("min", ended.min()), ("max", ended.max())):
            metrics[f"completions/{name}_terminated_length"][-1] = value.item()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        masks_here = self.mask_truncated_completions and self._ends_are_miscounted
        with swapped(self, mask_truncated_completions=self.mask_truncated_completions and not masks_here):
            output = super()._generate_and_score_completions(inputs)
        if self._policy_made is not None:  # TRL's tool_mask is 0 all over an answer that is cut off and masked
            output["policy_made"] = torch.zeros_like(output["completion_mask"])
            for row, made in zip(output["policy_made"], self._policy_made, strict=True):
                row[: len(made)] = torch.tensor(made)
        return self._without_cut_answers(output) if masks_here else output

    def _without_cut_answers(self, output: dict[str, Any]) -> dict[str, Any]:
        """Mask answers that are cut off, as TRL does with `mask_truncated_completions`."""
        ends = [*self.end_tokens, self._tokenizer.pad_token_id]
        kept = ~is_cut_off(output["completion_ids"], output["completion_mask"], ends).unsqueeze(1)
        masks: dict[str, Any] = {
            name: output[name] * kept for name in ("completion_mask", "tool_mask") if name in output
        }
        mask: Tensor = masks["completion_mask"] * masks.get("tool_mask", 1)
        return {**output, **masks, "num_items_in_batch": self.accelerator.gather(mask.sum()).sum()}
