"""GRPO's data and rewards, checked before a model is loaded; and what the reward functions return, at every call."""

from typing import Any

from torch import Tensor, nn
from trl import GRPOTrainer

from ..checks.inputs import check_inputs, check_lengths
from ..checks.rows import PROMPTS, check_prompts
from ..checks.vocabulary import KnownPromptTokens
from ..rewarding.calls import checked
from ..rewarding.functions import distinct_names
from ..rewarding.models import RewardModels
from ..seams import swapped


class CheckedGRPOTrainer(RewardModels, KnownPromptTokens, GRPOTrainer):
    """`GRPOTrainer` that says in one sentence what is wrong with its data and rewards.

    Raises:
        ValueError: a dataset or a reward function cannot be used.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] * (reward_funcs is not None)
        more = any(kwargs.get(name) is not None for name in ("rollout_func", "environment_factory"))
        has_prompts = kwargs.get("environment_factory") is None
        check_inputs(PROMPTS, args, train_dataset, eval_dataset, rewards, more=more, has_prompts=has_prompts)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, *positional, **kwargs)
        self.reward_func_names = distinct_names(self.reward_func_names, self.reward_funcs)
        check_lengths(PROMPTS, args, train_dataset, eval_dataset, self._tokenizer, self.model.config)  # type: ignore[union-attr]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        # Environments may make the prompts.
        check_prompts([row["prompt"] for row in inputs if "prompt" in row or self.environment_factories is None])
        return super()._generate_and_score_completions(inputs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, of functions that return floats or raise a `RewardError`; TRL would take the keys of a dict."""
        rewards = [
            checked(reward, name, can_wait=self._has_async_funcs)
            if callable(reward) and not isinstance(reward, nn.Module)
            else reward
            for reward, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        with swapped(self, reward_funcs=rewards):
            return super()._calculate_rewards(*args, **kwargs)
