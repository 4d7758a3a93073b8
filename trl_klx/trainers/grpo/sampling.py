"""How GRPO samples: from the policy that it scores, and up to the first of all tokens that end an answer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, ProcessorMixin
from trl import GRPOTrainer

from ...kl import kl_estimate, masked_sum
from ..reference.build import causal_lm
from ..seams import swapped
from ..shared.generation import end_tokens, generating_with, until_stop
from .batch import scored_by_sampler
from .sampling_settings import changed_sampling, in_words

logger = get_logger(__name__)
_ANOTHER = "answers are sampled from another distribution than the one that is scored"


class SampledLogps(LogitsProcessor):
    """The last of `generate`'s processors: sees the scores as they are sampled from, and changes nothing.

    It is called before a token is sampled, so that each token is seen one call later, and the last one in the answers.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []  # (B, 1) each
        self._pending: Tensor | None = None  # (B, V) log-probs of the token that is sampled next

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self._pending = scores.float().log_softmax(-1)
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self._pending is not None:
            self._columns.append(self._pending.gather(1, tokens.unsqueeze(1)))

    def of(self, answers: list[list[int]]) -> list[list[float]]:
        """Log-probs of the tokens of the answers that were sampled, in their order; nats."""
        if self._pending is not None:
            place = len(self._columns)
            last = [ids[place] if len(ids) > place else 0 for ids in answers]  # 0 stands behind an answer's end
            self._take(torch.tensor(last, device=self._pending.device))
            self._pending = None
        rows = torch.cat(self._columns, dim=1).tolist() if self._columns else [[]] * len(answers)
        return [row[: len(ids)] for row, ids in zip(rows, answers, strict=True)]


@contextmanager
def recording_samples(model: nn.Module) -> Iterator[SampledLogps]:
    """While active, the next call of the model's `generate` records its log-probs.

    `generate` takes processors of the caller's as an argument, which TRL does not pass on, and puts its own (top_k,
    top_p, min_p) behind them: so what it builds its list with is wrapped.
    """
    holder: Any = causal_lm(model)
    build, recorder = holder._get_logits_processor, SampledLogps()

    def with_recorder(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        return LogitsProcessorList([*build(*args, **kwargs), recorder])

    with swapped(holder, _get_logits_processor=with_recorder):
        yield recorder


class Sampling:
    """Settles how a trainer samples, when TRL has set it up: what its config leaves open, and where answers end.

    TRL takes what is open from the model's generation config, which may suppress tokens, penalise repetition, cut the
    distribution: the scores know nothing of it, and the KL would be that of another policy.

    Args:
        trainer: TRL's, whose settings for `generate` or the inference engine are completed.
        may_change: whether the recipe's own changes of the distribution matter, as they do to a KL that is measured.

    Attributes:
        ends: the tokens that end an answer.
    """

    def __init__(self, trainer: GRPOTrainer, *, may_change: bool) -> None:
        self._trainer, policy = trainer, causal_lm(trainer.model)  # type: ignore[arg-type]
        ends = {*end_tokens(policy, trainer._tokenizer)}
        if trainer.use_vllm:
            given = trainer.vllm_generation.generation_kwargs
            ends |= {*(given.get("stop_token_ids") or ())}
            # The engine reads the end tokens of a model folder, not those of a model in memory.
            trainer.vllm_generation.generation_kwargs = {**given, "stop_token_ids": sorted(ends)}
        else:
            config = trainer.generation_config
            own = config.eos_token_id  # of generation_kwargs, or what TRL takes
            ends = {*ends, *(own if isinstance(own, list) else [own])} - {None}
            config.eos_token_id = sorted(ends)
            # None would become transformers' default, 50; vLLM's -1 is an error.
            config.top_k = max(config.top_k or 0, 0)
            if isinstance(trainer.processing_class, ProcessorMixin) and config.suppress_tokens is None:
                # A sampled image token would have no image.
                config.suppress_tokens = policy.generation_config.suppress_tokens
        self.ends = sorted(ends)
        changed = changed_sampling(trainer.args) if may_change and trainer.rollout_func is None else {}
        self._is_recorded = bool(changed) and not trainer.use_vllm
        if changed and not trainer.use_vllm and trainer.use_transformers_continuous_batching:
            logger.warning(f"{in_words(changed)}: {_ANOTHER}; nothing corrects or measures by how much.")
            self._is_recorded, changed = False, {}
        self._untold = changed  # what changes the distribution, until that has been reported

    @contextmanager
    def from_the_policy(self) -> Iterator[SampledLogps | None]:
        """While active, `generate` samples from the policy; records what it sampled where that has to be known."""
        trainer = self._trainer
        if trainer.use_vllm:
            yield None
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        with generating_with(model, trainer.generation_config):
            with recording_samples(model) if self._is_recorded else nullcontext() as sampled:
                yield sampled

    def cut(self, completion_ids: list, logps: list | None, sampled: SampledLogps | None) -> tuple[list, list | None]:
        """Answers up to their ends, and the sampler's log-probs of their tokens, where it gives them."""
        answers = [until_stop(ids, self.ends) for ids in completion_ids]
        if sampled is not None:
            logps = sampled.of(answers)
        if logps is not None:
            logps = [row[: len(ids)] for row, ids in zip(logps, answers, strict=True)]
        return answers, logps

    def tell_what_changed(self, policy_logps: Tensor, inputs: dict, mask: Tensor) -> None:
        """Warn once, with what the first rollout shows, that the recipe samples from another distribution than scored.

        The sampler's own log-probs are among the inputs. Call on every process.
        """
        if not self._untold:
            return
        changed, self._untold = self._untold, {}
        engine_logps = inputs["sampling_per_token_logps"]
        scored = scored_by_sampler(inputs, mask)
        weights, ones = (policy_logps - engine_logps).exp(), torch.ones_like(policy_logps)
        values = kl_estimate(engine_logps, policy_logps, "k3"), weights, ones
        sums = torch.stack([masked_sum(value, scored) for value in values])
        kl, weight, count = self._trainer.accelerator.reduce(sums)
        logger.warning(
            f"{in_words(changed)}: {_ANOTHER}, {kl / count:.2g} nats per token away from it at the "
            f"first rollout, where the weights policy/sampler average {weight / count:.3f} (below 1: the KL lacks what "
            "is never sampled); logged estimates and a weighted KL loss are corrected by these weights, a KL in the "
            "reward only with kl_importance_sampling='prefix'."
        )
