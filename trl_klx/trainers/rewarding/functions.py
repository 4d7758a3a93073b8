"""Rewards as GRPO's users give them: Python functions, sync or async, and reward models, several and weighted."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name, get_config_model_id

from .calls import checked, run_together
from .models import model_rewards, with_padding_of_its_own

RewardFunction = Callable[..., Any]
logger = get_logger(__name__)


class RewardFunctions:
    """Scores answers with every reward, and sums them up by weight.

    Args:
        rewards: functions `(prompts, completions, completion_ids, **columns) -> list of float or None`, coroutine
            functions of the same form, or sequence classifiers with one output.
        weights: one per reward; None: 1 each.
        tokenizers: one per reward, read for models only; None: the model's own, or `policy_tokenizer` where it has
            none.
        policy_tokenizer: tokenizer of the policy.
        chat_template_kwargs: for the chat template of the reward model.

    Raises:
        ValueError: no reward, or lists of different length.
    """

    def __init__(
        self,
        rewards: Sequence[RewardFunction | PreTrainedModel],
        weights: Sequence[float] | None,
        tokenizers: Sequence[PreTrainedTokenizerBase | None] | None,
        policy_tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("there is no reward: pass reward_funcs, or reward_model.")
        self.rewards = list(rewards)
        self.names = distinct_names([_name(reward) for reward in self.rewards], self.rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(weight) for weight in weights]
        tokenizers = [None] * len(self.rewards) if tokenizers is None else tokenizers
        for what, given in (("reward_weights", self.weights), ("reward_processing_classes", tokenizers)):
            if len(given) != len(self.rewards):
                raise ValueError(f"{what} has {len(given)} entries and there are {len(self.rewards)} rewards.")
        self._tokenizers: list[Any] = [
            _tokenizer(reward, own, policy_tokenizer) if isinstance(reward, nn.Module) else None
            for reward, own in zip(self.rewards, tokenizers, strict=True)
        ]
        self._chat_template_kwargs = chat_template_kwargs or {}

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, Any], device: Any
    ) -> Tensor:
        """(B, F) rewards, on the CPU; NaN where a function returned None: it does not apply to that answer. Reward
        models run on `device`.
        """
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        found: list[Any] = []
        for name, reward, tokenizer in zip(self.names, self.rewards, self._tokenizers, strict=True):
            if isinstance(reward, nn.Module):
                kwargs = self._chat_template_kwargs
                found.append(model_rewards(reward, tokenizer, prompts, completions, kwargs, device))
            else:
                found.append(checked(name, reward)(**given))
        pending = [index for index, values in enumerate(found) if inspect.isawaitable(values)]
        for index, values in zip(pending, run_together([found[index] for index in pending]), strict=True):
            found[index] = values
        columns_of = [torch.as_tensor(values, dtype=torch.float32).cpu() for values in found]
        out = torch.stack(columns_of, dim=1)
        unscored = out.isnan().all(1)
        if unscored.any():
            row = int(unscored.nonzero()[0])
            logger.warning(
                f"No reward applies to {int(unscored.sum())} of {len(prompts)} answers; the first is "
                f"{completions[row]!r}, to the prompt {prompts[row]!r}."
            )
        return out

    def total(self, rewards: Tensor) -> Tensor:
        """(B, F) -> (B,) weighted sum of those that apply; 0 where none does."""
        weighted = [weight * column for weight, column in zip(self.weights, rewards.unbind(1), strict=True)]
        return torch.stack(weighted, dim=1).nansum(1)


def finite_rewards(rewards: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, int]]:
    """(B, F) with NaN, "does not apply", for infinite rewards; and how many each function gave, where any."""
    infinite = rewards.isinf()
    counts = {name: count for name, count in zip(names, infinite.sum(0).tolist(), strict=True) if count}
    for name, count in counts.items():
        logger.warning(
            f"The reward function {name!r} gave {count} of {len(rewards)} answers an infinite reward, which does not "
            "count: let it return a finite number, or None where it does not apply."
        )
    return rewards.masked_fill(infinite, torch.nan), counts


def distinct_names(names: Sequence[str], rewards: Sequence[Any]) -> list[str]:
    """A name for each reward that no other has, for the log: of several with one name (as lambdas have), the second is
    `<name>_2`; a model in memory without a name is called by its class."""
    found: list[str] = []
    for name, reward in zip(names, rewards, strict=True):
        name = name or type(reward).__name__
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        found.append(name if name not in found else next(other for other in numbered if other not in (*found, *names)))
    return found


def _name(reward: Any) -> str:
    is_model = isinstance(reward, nn.Module)
    return get_config_model_id(reward.config).split("/")[-1] if is_model else get_callable_name(reward)


def _tokenizer(model: Any, own: Any, policy_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    path = get_config_model_id(model.config)
    tokenizer = own or (AutoTokenizer.from_pretrained(path) if path else policy_tokenizer)
    return with_padding_of_its_own(model, tokenizer)
