"""The true KL where the training data does not show it: on answers that the policy samples to held-out prompts.

Shape legend: B answers, L tokens of prompt and answer, V vocabulary.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ...kl import kl_estimate, masked_sum
from ...kl.estimators import SAMPLED_ESTIMATORS
from ..exact.forward import ExactKLForward
from ..exact.tokens import AnswerTokens
from ..reference.resumed import ReferenceKeeper
from ..seams import FUSED_LM_HEAD
from ..session.metrics import PooledSums
from ..session.session import ORIGIN
from ..shared.generation import end_tokens, generating_with


class ProbeSteps(TrainerCallback):
    """Calls `probe` before the first micro-batch of every `every`-th optimizer step, the first included."""

    def __init__(self, probe: Callable[[], None], every: int) -> None:
        self._probe, self._every = probe, every

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self._every == 0:
            self._probe()


@dataclass
class ProbeBatch:
    """Prompts with sampled answers, padded on the right as DPO's own batches are."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    answer_mask: Tensor  # (B, L) the answer up to and including its end token; all 0 in a row that does not count
    prompts: Tensor  # (B,) number of the prompt

    @property
    def target_mask(self) -> Tensor:
        """(B, L-1) bool: predicted tokens that count."""
        return self.answer_mask[:, 1:].bool()


class GumbelSampling(LogitsProcessor):
    """Turns `generate`'s argmax into a sample at temperature 1, from one generator per row.

        argmax_v (z_v - log E_v),  E_v ~ Exp(1)   has the distribution softmax(z)

    So the samples depend neither on the global random state, which they leave alone, nor on how the prompts are
    divided into batches and over processes.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits -> (B, V) logits with Gumbel noise."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # A float32 exponential can round to 0, and -log 0 would make an impossible token certain.
        return scores.float() - noise.clamp(min=2**-25).log()


class KLProbe:
    """Samples one answer to each held-out prompt and computes the per-token KL there.

    Args:
        prompts: token ids of the prompts, distinct; the same list on every process.
        tokenizer: for padding and the end of an answer.
        max_new_tokens: largest length of an answer.
        batch_size: answers sampled and scored at once, per process.
        seed: of the run; with the step and the number of a prompt it fixes that prompt's answer.
        estimators: what to compute, among k1, k2, k3 and exact.
        exact: computes the exact KL; needed by "exact" only.
        accelerator: the prompts are divided over its processes.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
        estimators: tuple[str, ...],
        exact: ExactKLForward | None,
        accelerator: Accelerator,
    ) -> None:
        self._prompts, self._tokenizer = prompts, tokenizer
        self._max_new_tokens, self._batch_size, self._seed = max_new_tokens, batch_size, seed
        self._estimators, self._exact = estimators, exact if "exact" in estimators else None
        self._accelerator = accelerator
        self._sums = PooledSums(accelerator, ("answers", "tokens", "surprise"))

    def sample(self, model: nn.Module, step: int) -> list[ProbeBatch]:
        """This process's share of the answers that `model` (unwrapped, in eval mode) gives at `step`.

        Every process gets the same number of rows and batches: surplus rows repeat a prompt and do not count.
        """
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        numbers = [rank + processes * row for row in range(-(-len(self._prompts) // processes))]
        batches = [numbers[start : start + self._batch_size] for start in range(0, len(numbers), self._batch_size)]
        with self._plain_generation(model) as config:
            return [self._sample_batch(model, batch, step, config) for batch in batches]

    @contextmanager
    def _plain_generation(self, model: nn.Module) -> Iterator[GenerationConfig]:
        """The policy's own distribution, ended by the tokenizer's end token or the model's own."""
        config = GenerationConfig(
            do_sample=False,  # GumbelSampling samples
            max_new_tokens=self._max_new_tokens,
            eos_token_id=end_tokens(model, self._tokenizer),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        with generating_with(model, config):
            yield config

    @torch.no_grad()
    def _sample_batch(self, model: nn.Module, numbers: list[int], step: int, config: GenerationConfig) -> ProbeBatch:
        device = self._accelerator.device
        prompts = [torch.tensor(self._prompts[number % len(self._prompts)], device=device) for number in numbers]
        # Seeded by a string: Python hashes it, so that neighbouring steps and prompts share nothing.
        seeds = [random.Random(f"{self._seed} {step} {number}").getrandbits(63) for number in numbers]
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
        attention_mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        generated = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([GumbelSampling(seeds, device)]),
        )
        answers = _up_to_the_end(generated[:, input_ids.size(1) :], config.eos_token_id)
        rows = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        counts = [number < len(self._prompts) for number in numbers]
        answer_mask = [
            torch.arange(len(row), device=device).ge(len(prompt)).long() * count
            for row, prompt, count in zip(rows, prompts, counts, strict=True)
        ]
        return ProbeBatch(
            pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            pad_sequence(answer_mask, batch_first=True),
            torch.tensor(numbers, device=device),
        )

    def texts(self, batch: ProbeBatch) -> tuple[list[str], list[str]]:
        """The prompts of a batch and the answers to them."""
        counts = batch.answer_mask.any(-1)
        prompts = batch.attention_mask.bool() & ~batch.answer_mask.bool()
        ids = [
            [row[keep].tolist() for row, keep in zip(batch.input_ids[counts], mask[counts], strict=True)]
            for mask in (prompts, batch.answer_mask.bool())
        ]
        prompt_texts, answer_texts = (self._tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in ids)
        return prompt_texts, answer_texts

    @torch.no_grad()
    def values(
        self,
        policy: nn.Module,
        reference: nn.Module,
        as_reference: Callable[[], AbstractContextManager[Any]],
        batch: ProbeBatch,
        keeper: ReferenceKeeper,
    ) -> dict[str, Tensor]:
        """(B, L-1) KL in nats per token by estimator, at temperature 1; what `batch.target_mask` masks is garbage.

        Args:
            policy: the model as the trainer calls it, in eval mode.
            reference: likewise; the policy itself where PEFT makes it the reference while `as_reference()` is entered.
            batch: from `sample`.
            keeper: knows whether the KL to the start of the run is wanted (`ORIGIN`).
        """
        mask = batch.target_mask
        hidden: AbstractContextManager[list[Tensor]] = nullcontext([])
        exact: AbstractContextManager[list[Tensor]] = nullcontext([])
        tokens = None if self._exact is None else AnswerTokens.of(mask)
        if self._exact is not None and tokens is not None:
            hidden = self._exact.hidden_states(tokens)
        with as_reference(), hidden as ref_hidden:
            ref_logps = token_logps(reference, batch)
        with as_reference():
            origin_logps = keeper.origin_logps(ref_logps, lambda: token_logps(reference, batch))
        if self._exact is not None and tokens is not None:
            exact = self._exact.exact_kl(policy, tokens, ref_hidden, with_grad=False)
        with exact as exact_kl:
            logps = token_logps(policy, batch)
        self._sums.add(answers=mask.any(-1).sum(), tokens=mask.sum(), surprise=-masked_sum(logps, mask))
        wanted = [name for name in SAMPLED_ESTIMATORS if name in self._estimators]
        sampled: dict[str, Tensor] = {name: kl_estimate(logps, ref_logps, name) for name in wanted}
        if origin_logps is not None:
            sampled[ORIGIN] = kl_estimate(logps, origin_logps, "k3")
        return sampled | ({"exact": exact_kl[0]} if exact_kl else {})

    def answer_metrics(self) -> dict[str, float]:
        """Of the answers scored since the last call, on all processes: `probe/mean_length` in tokens, and
        `probe/entropy`, the policy's entropy per token in nats, estimated by -log pi. Call on every process.
        """
        sums = self._sums.take()
        if not sums["tokens"]:
            return {}
        return {
            "probe/mean_length": sums["tokens"] / sums["answers"],
            "probe/entropy": sums["surprise"] / sums["tokens"],
        }


def token_logps(model: nn.Module, batch: ProbeBatch) -> Tensor:
    """(B, L-1) float32 log-probs of the answers' tokens, 0 elsewhere; by TRL's fused head where it has one."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    mask = batch.target_mask
    if FUSED_LM_HEAD:
        labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)
        return model(**inputs, labels=labels, fused_lm_head=True).log_probs[:, -mask.size(1) :].float()
    logits_NV = model(**inputs).logits[:, -mask.size(1) - 1 : -1][mask].float()
    targets_N = batch.input_ids[:, 1:][mask]
    logps_N = logits_NV.log_softmax(-1).gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    return logps_N.new_zeros(mask.shape).masked_scatter(mask, logps_N)


def distinct_prompts(datasets: Iterable[Any], limit: int) -> list[list[int]]:
    """The first `limit` different prompts (token ids) of TRL's tokenised preference data, in order."""
    found: dict[tuple[int, ...], None] = {}
    for row in itertools.chain(*datasets):
        found.setdefault(tuple(row["prompt_ids"]))
        if len(found) == limit:
            break
    return [list(prompt) for prompt in found]


def _up_to_the_end(answers: Tensor, end_tokens: list[int]) -> list[Tensor]:
    """Cut each row of (B, C) after its first end token, which stays."""
    is_end = torch.isin(answers, torch.tensor(end_tokens, device=answers.device, dtype=answers.dtype))
    lengths = ((is_end.cumsum(-1) - is_end.long()) == 0).sum(-1)
    return [row[:length] for row, length in zip(answers, lengths.tolist(), strict=True)]
