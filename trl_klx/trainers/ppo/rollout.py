"""The values of a PPO step, each made from the one before. Shape legend: see trainer.py."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from ..shared.engine import with_trainers
from .loss import Batch


@dataclass
class Answers:
    """Sampled answers as lists: texts for the reward functions, tokens for the models."""

    prompts: list
    completions: list
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    policy_made: list[list[int]]  # 1 where the policy produced the token, 0 for tool output
    engine_logps: list[list[float]] | None  # of the tokens by the engine that sampled them; None: the policy did
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
    engine_logps: Tensor | None  # (B, T) of the engine that sampled, NaN where it gives none; None: the policy did
    counts: list[int]  # tokens of each answer that count, known on the host

    @property
    def length(self) -> int:
        return self.mask.size(1)

    def rows(self, index: Tensor | slice) -> Self:
        """The same of some answers only; an `index` on the CPU waits for no device."""
        on_device = index.to(self.mask.device, non_blocking=True) if isinstance(index, Tensor) else index
        chosen: dict[str, Any] = {}
        for name, values in vars(self).items():
            if isinstance(values, Tensor):
                chosen[name] = values[on_device]
            elif values is not None:
                chosen[name] = [values[i] for i in index.tolist()] if isinstance(index, Tensor) else values[index]
        return replace(self, **chosen)


@dataclass(frozen=True)
class Scores:
    """Of some answers by policy and value model; (B, T) and 0 on masked positions. None where it was not asked for."""

    logps: Tensor  # of the answer's tokens, at the sampling temperature
    values: Tensor
    entropy: Tensor | None  # of the policy at each token
    exact: Tensor | None  # exact KL to the reference


@dataclass(frozen=True, kw_only=True)
class Rollout(Rewarded):
    """Answers as the policy, the value model and the reference score them before any update."""

    old_logps: Tensor  # (B, T) of the policy before the updates, scored by the trainer
    values: Tensor  # (B, T)
    ref_logps: Tensor | None  # (B, T); None where no KL is measured
    ref_hidden: list[Tensor] | None  # (n, H) of the n tokens of each answer that count, where the loss has an exact KL
    exact: Tensor | None  # (B, T) exact KL, where it is measured
    origin_logps: Tensor | None  # (B, T) of the start of the run, where the KL to it is measured

    @property
    def sampler_logps(self) -> Tensor:
        """(B, T) of whatever sampled the answers: the engine's, where it gives any, or the trainer's."""
        return self.old_logps if self.engine_logps is None else with_trainers(self.engine_logps, self.old_logps)

    @classmethod
    def joined(cls, parts: "Sequence[Rollout]") -> "Rollout":
        """One rollout of the answers of several."""
        joined: dict[str, Any] = {}
        for name, first in vars(parts[0]).items():
            if first is not None:
                values = [getattr(part, name) for part in parts]
                joined[name] = torch.cat(values) if isinstance(first, Tensor) else list(chain(*values))
        return replace(parts[0], **joined)

    def without_unscored(self) -> "Rollout":
        """The same, in which nothing of an answer counts to which no reward applies."""
        unscored = self.scores.isnan()
        mask = self.mask & ~unscored.unsqueeze(1)
        counts = mask.sum(1).tolist()
        hidden = self.ref_hidden and [rows[:count] for rows, count in zip(self.ref_hidden, counts, strict=True)]
        scores = self.scores.masked_fill(unscored, 0.0)
        return replace(self, mask=mask, counts=counts, ref_hidden=hidden, scores=scores)


@dataclass(frozen=True)
class Experience:
    """A rollout with its advantages and returns, (B, T), and the factor that keeps the KL loss in their scale."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor
    scale: Tensor
    engine_ratio: Tensor | None  # (B, T) bounded ratio of policy to engine; None where the policy itself sampled
    kl_baseline: Tensor | None  # (B, T) nats; None where no KL in the reward is charged at the updates

    def batch(self, index: Tensor) -> Batch:
        """Of some answers only; an `index` on the CPU waits for no device."""
        index = index.to(self.advantages.device, non_blocking=True)
        return Batch(
            mask=self.rollout.mask[index],
            old_logps=self.rollout.old_logps[index],
            advantages=self.advantages[index],
            returns=self.returns[index],
            values=self.rollout.values[index],
            engine_ratio=None if self.engine_ratio is None else self.engine_ratio[index],
            kl_baseline=None if self.kl_baseline is None else self.kl_baseline[index],
        )


@dataclass(frozen=True)
class LossOutputs:
    """The loss of some answers, summed over their tokens, and what its metrics are made of."""

    loss: Tensor
    tokens: Tensor  # how many count
    sums: dict[str, Tensor]  # metrics, summed over these tokens
    weights: tuple[Tensor, Tensor] | None = None  # (B, T) of the tokens, where the KL depends on the sampler; mask


def padded(ids: Sequence[Sequence[float]], fill: int, side: str, device: Any) -> tuple[Tensor, Tensor]:
    """(B, longest) tokens padded with `fill` on the "left" or "right", and their mask."""
    longest = max(1, *(len(row) for row in ids))  # 1 where all are empty

    def pad(row: Sequence[float], value: int) -> list[float]:
        gap = [value] * (longest - len(row))
        return [*gap, *row] if side == "left" else [*row, *gap]

    both = torch.tensor([[pad(row, fill) for row in ids], [pad([1] * len(row), 0) for row in ids]])
    tokens, mask = both.to(device, non_blocking=True)
    return tokens, mask
