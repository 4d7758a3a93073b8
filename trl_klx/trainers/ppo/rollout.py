"""The values of a PPO step, each made from the one before. Shape legend: see trainer.py."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from .loss import Batch


@dataclass
class Answers:
    """Sampled answers as lists: texts for the reward functions, tokens for the models."""

    prompts: list
    completions: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    policy_made: list[list[int]]  # 1 where the policy produced the token, 0 for tool output
    columns: dict[str, list]  # others of the dataset, and those that a rollout function gives

    def finished(self, stop_tokens: Collection[int]) -> list[bool]:
        """Whether the last token that the policy produced is a stop token; all are where there is none."""
        rows = zip(self.completion_ids, self.policy_made, strict=True)
        own = [[token for token, made in zip(ids, flags, strict=True) if made] for ids, flags in rows]
        return [not stop_tokens or (bool(ids) and ids[-1] in stop_tokens) for ids in own]


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """Answers as tensors, with their scores; prompts are padded on the left, answers on the right."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    mask: Tensor  # (B, T) tokens of the answer that the policy produced
    prompts: Tensor  # (B,) numbers, equal for equal prompts
    groups: Tensor | None  # (B,) place of the prompt's group among those of the KL session; None without groups
    scores: Tensor  # (B,) weighted rewards, minus the penalty for answers without an end; NaN where no reward applies

    @property
    def length(self) -> int:
        return self.mask.size(1)

    def rows(self, index: Tensor | slice) -> Self:
        """The same of some answers only."""
        return replace(self, **{name: tensor[index] for name, tensor in _tensors(self).items()})


@dataclass(frozen=True)
class Scores:
    """Of some answers by policy and value model; (B, T) and 0 on masked positions, but for the logits."""

    logps: Tensor  # of the answer's tokens, at the sampling temperature
    logits: Tensor  # (B, T, V)
    values: Tensor
    exact: Tensor | None  # exact KL to the reference, where it was asked for


@dataclass(frozen=True, kw_only=True)
class Rollout(Rewarded):
    """Answers as the policy, the value model and the reference score them before any update."""

    sampler_logps: Tensor  # (B, T) of the policy as it sampled, scored by the trainer
    values: Tensor  # (B, T)
    ref_logps: Tensor | None  # (B, T); None where no KL is measured
    ref_hidden: Tensor | None  # (B, T, H), where the loss has an exact KL
    exact: Tensor | None  # (B, T) exact KL, where it is measured

    @classmethod
    def joined(cls, parts: "Sequence[Rollout]") -> "Rollout":
        """One rollout of the answers of several."""
        names = _tensors(parts[0])
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def without_unscored(self) -> "Rollout":
        """The same, in which nothing of an answer counts to which no reward applies."""
        unscored = self.scores.isnan()
        return replace(self, mask=self.mask & ~unscored.unsqueeze(1), scores=self.scores.masked_fill(unscored, 0.0))


def _tensors(values: Rewarded) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(values).items() if tensor is not None}


@dataclass(frozen=True)
class Experience:
    """A rollout with its advantages and returns, (B, T), and the factor that keeps the KL loss in their scale."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor
    scale: Tensor

    def batch(self, index: Tensor) -> Batch:
        return Batch(
            mask=self.rollout.mask[index],
            sampler_logps=self.rollout.sampler_logps[index],
            advantages=self.advantages[index],
            returns=self.returns[index],
            values=self.rollout.values[index],
        )


@dataclass(frozen=True)
class LossOutputs:
    """The loss of some answers, summed over their tokens, and what its metrics are made of."""

    loss: Tensor
    tokens: Tensor  # how many count
    sums: dict[str, Tensor]  # metrics, summed over these tokens
    weights: Tensor | None = None  # (N,) importance weights of the KL loss on these tokens, where it takes any


def padded(ids: list[list[int]], fill: int, side: str, device: Any) -> tuple[Tensor, Tensor]:
    """(B, longest) tokens padded with `fill` on the "left" or "right", and their mask."""
    longest = max(1, *(len(row) for row in ids))  # 1 where all are empty

    def pad(row: list[int], value: int) -> list[int]:
        gap = [value] * (longest - len(row))
        return gap + row if side == "left" else row + gap

    tokens = torch.tensor([pad(row, fill) for row in ids], device=device)
    return tokens, torch.tensor([pad([1] * len(row), 0) for row in ids], device=device)
