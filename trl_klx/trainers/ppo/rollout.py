"""One PPO rollout: prompts read as GRPO reads them, answers sampled or given, and the tensors that come of them.

Shape legend: B answers, P prompt tokens, T answer tokens, L = P + T, H hidden size, F reward functions.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..checks.rows import check_prompts
from ..checks.vocabulary import TokenError, check_tokens
from ..shared.generation import generating_with
from .loss import Batch
from .model import PolicyAndValue

Rows = Sequence[dict[str, Any]]
# As TRL's GRPO: (prompts, trainer) -> {"prompt_ids", "completion_ids", optional "env_mask", columns for the rewards}.
RolloutFunction = Callable[[list, Any], dict[str, list]]
_LOOKED_AT = 100  # prompts that are checked before the run; the others are when their turn comes


@dataclass
class Answers:
    """Sampled answers as lists: texts for the reward functions, tokens for the models."""

    prompts: list
    completions: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    policy_made: list[list[int]]  # 1 where the policy produced the token, 0 for tool output
    columns: dict[str, list] = field(default_factory=dict)

    def finished(self, stop_tokens: Collection[int]) -> list[bool]:
        """Whether the last token that the policy produced is a stop token; all are where there is none."""
        rows = zip(self.completion_ids, self.policy_made, strict=True)
        own = [[token for token, made in zip(ids, flags, strict=True) if made] for ids, flags in rows]
        return [not stop_tokens or (bool(ids) and ids[-1] in stop_tokens) for ids in own]


@dataclass
class Rollout:
    """The tensors of some answers; prompts are padded on the left, answers on the right."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    mask: Tensor  # (B, T) tokens of the answer that the policy produced
    prompts: Tensor  # (B,) numbers, equal for equal prompts
    scores: Tensor  # (B,) weighted rewards, less the penalty for answers without an end; NaN where no reward applies
    sampler_logps: Tensor | None = None  # (B, T) of the policy as it sampled, scored by the trainer
    values: Tensor | None = None  # (B, T)
    ref_logps: Tensor | None = None  # (B, T)
    ref_hidden: Tensor | None = None  # (B, T, H), for an exact KL in the loss
    exact: Tensor | None = None  # (B, T) exact KL at the rollout
    groups: Tensor | None = None  # (B,) place of the prompt's group in `KLControl.groups`

    @property
    def length(self) -> int:
        return self.mask.size(1)

    def without_unscored(self) -> "Rollout":
        """The same, in which nothing of an answer counts to which no reward applies."""
        unscored = self.scores.isnan()
        return replace(self, mask=self.mask & ~unscored.unsqueeze(1), scores=self.scores.masked_fill(unscored, 0.0))

    def rows(self, index: Tensor | slice) -> "Rollout":
        """The same of some answers only."""
        return Rollout(**{name: tensor[index] for name, tensor in self._tensors().items()})

    @staticmethod
    def joined(parts: "list[Rollout]") -> "Rollout":
        """One rollout of the answers of several."""
        names = parts[0]._tensors()
        return Rollout(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass
class Experience:
    """A rollout with its advantages and returns, (B, T), and the factor that keeps the KL loss in their scale."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor
    scale: Tensor

    def batch(self, index: Tensor) -> Batch:
        rollout = self.rollout
        return Batch(
            mask=rollout.mask[index],
            sampler_logps=rollout.sampler_logps[index],  # type: ignore[index]
            advantages=self.advantages[index],
            returns=self.returns[index],
            values=rollout.values[index],  # type: ignore[index]
        )


def read_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None,
    padding: int | None = None,
) -> tuple[list, list[list[int]]]:
    """Prompts as reward functions get them, and their tokens.

    A column `prompt` holds strings or messages; without it, `input_ids` holds tokens, as TRL's PPO has it, of which
    those count that `attention_mask` marks. Without that column, tokens `padding` at either end of a row do not count.
    """
    if "prompt" not in rows[0]:
        ids = [_without_padding(row, padding) for row in rows]
        return tokenizer.batch_decode(ids, skip_special_tokens=True), ids
    prompts = [row["prompt"] for row in rows]
    check_prompts(prompts)
    if not is_conversational({"prompt": prompts[0]}):
        return prompts, tokenizer(text=prompts)["input_ids"]
    tokens = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return prompts, tokens["input_ids"]  # type: ignore[call-overload, index, return-value]


def _without_padding(row: dict[str, Any], padding: int | None) -> list[int]:
    ids = [int(token) for token in row["input_ids"]]
    mask = row.get("attention_mask")
    if mask is None:
        kept = [place for place, token in enumerate(ids) if token != padding]
        ids = ids[kept[0] : kept[-1] + 1] if kept else []
    elif len(mask) == len(ids):
        ids = [token for token, counts in zip(ids, mask, strict=True) if counts]
    else:
        raise TokenError(
            f"a row has {len(ids)} input_ids and {len(mask)} entries of attention_mask: give one for each token, or "
            "remove the column."
        )
    if not ids:
        raise TokenError("the input_ids of a row are padding alone, so that there is nothing to answer: leave it out.")
    return ids


def check_first_prompts(
    datasets: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None,
    padding: int | None,
    vocabulary: int,
) -> None:
    """Refuse datasets whose first prompts hold tokens that the policy does not know. (Streams are read in the run.)"""
    for dataset in datasets:
        if isinstance(dataset, Dataset) and len(dataset):
            rows = [dataset[place] for place in range(min(len(dataset), _LOOKED_AT))]
            check_tokens(read_prompts(rows, tokenizer, chat_template_kwargs, padding)[1], vocabulary, "a prompt")


def completions_like(prompts: list, texts: list[str]) -> list:
    """Texts, or messages of the assistant where the prompts are messages."""
    if not is_conversational({"prompt": prompts[0]}):
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]


def padded(ids: list[list[int]], fill: int, side: str, device: Any) -> tuple[Tensor, Tensor]:
    """(B, longest) tokens padded with `fill` on the "left" or "right", and their mask."""
    longest = max(1, *(len(row) for row in ids))  # 1 where all are empty

    def pad(row: list[int], value: int) -> list[int]:
        gap = [value] * (longest - len(row))
        return gap + row if side == "left" else row + gap

    tokens = torch.tensor([pad(row, fill) for row in ids], dtype=torch.long, device=device)
    mask = torch.tensor([pad([1] * len(row), 0) for row in ids], dtype=torch.long, device=device)
    return tokens.view(len(ids), longest), mask.view(len(ids), longest)


def take_answers(given: dict[str, list]) -> tuple[list, list, list | None]:
    """Take prompt_ids, completion_ids and env_mask out of a rollout function's answer, as lists of numbers."""
    for name in ("prompt_ids", "completion_ids"):
        if name not in given:
            raise ValueError(f"rollout_func returned no {name}: return prompt_ids and completion_ids.")
    policy_made = given.pop("env_mask", None)
    return (
        _numbers(given.pop("prompt_ids")),
        _numbers(given.pop("completion_ids")),
        None if policy_made is None else _numbers(policy_made),
    )


def _numbers(rows: Any) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]


def check_answers(rows: int, prompt_ids: list, completion_ids: list, policy_made: list) -> None:
    """Refuse a rollout function's answers whose lists do not fit together."""
    for name, given in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids), ("env_mask", policy_made)):
        if len(given) != rows:
            raise ValueError(f"rollout_func returned {len(given)} {name} for {rows} prompts: return one per prompt.")
    for row, (ids, made) in enumerate(zip(completion_ids, policy_made, strict=True)):
        if len(ids) != len(made):
            raise ValueError(
                f"rollout_func returned {len(made)} entries of env_mask for the {len(ids)} tokens of answer {row}: "
                "return one per token."
            )


@torch.no_grad()
def sample(
    model: PolicyAndValue, prompt_ids: list[list[int]], config: GenerationConfig, batch_size: int, device: Any
) -> list[list[int]]:
    """Sample one answer to each prompt from the model's policy; lists still hold what follows the stop token."""
    completions: list[list[int]] = []
    with generating_with(model.policy, config):
        for start in range(0, len(prompt_ids), batch_size):
            tokens, mask = padded(prompt_ids[start : start + batch_size], config.pad_token_id or 0, "left", device)
            output = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
            completions += output[:, tokens.size(1) :].tolist()
    return completions
