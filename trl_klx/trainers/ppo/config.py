"""`KLXPPOConfig`: PPO's options with the KL arguments, and what a user of TRL's GRPO expects to find."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...config.check import check
from ...config.names import config_with_old_names
from ...config.options import KLArguments
from ...config.rules import kl_rules
from ...config.types import Choices
from ..checks.noise import check_neftune
from ..checks.rewards import check_weights
from ..rewarding.gold import GoldArguments
from ..shared.correction import uncorrected_reward
from ..shared.vllm_options import VLLM_CHOICES
from .fields import PPOArguments


@config_with_old_names
@dataclass
class KLXPPOConfig(KLArguments, GoldArguments, PPOArguments):
    """PPO's options plus the KL arguments. `kl_coef` keeps TRL's name and is where a controller starts.

    With its defaults (k1 in the reward, return-to-go through GAE) the KL is TRL's. `kl_coef` means the same in every
    placement: the objective is E[reward] - kl_coef * KL, in the reward's units per nat.

    As in TRL, a step is a rollout of `per_device_train_batch_size * gradient_accumulation_steps` prompts per process,
    followed by `num_ppo_epochs * num_mini_batches` optimizer steps; `logging_steps`, `save_steps`, `eval_steps`,
    `max_steps` and the learning rate's schedule count rollouts. `total_episodes` and `max_steps` both give the length
    of the run.

    Names and defaults are those of TRL 1.12's `PPOConfig`, with these exceptions: `stop_token` is "eos" (TRL's None
    runs past the end of the answer), `bf16` and `gradient_checkpointing` are honoured, `num_sample_generations` is 0,
    no model has a default path. Those of vLLM are GRPO's.
    """

    kl_estimator: str = field(
        default="k1", metadata={"help": "KL estimator: k1, k2, k3 or exact. Aliases: kl, mse, low_var_kl, full."}
    )
    kl_placement: str = field(
        default="reward", metadata={"help": "Where the KL enters: reward, loss, both, or none (measured only)."}
    )

    @property
    def kl_coef_start(self) -> float:
        return self.kl_coef

    @property
    def kl_coef_name(self) -> str:
        return "kl_coef"

    @property
    def rollout_size(self) -> int:
        """Prompts that one process answers per rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def choices(self) -> Choices:
        return {**super().choices(), **VLLM_CHOICES}

    def resolve(self) -> None:
        if self.stop_token_id is not None:
            self.stop_token = None  # the more specific of the two; "eos" is only the default
        super().resolve()

    def rules(self) -> list[Callable[[], None]]:
        own: list[Callable[[], None]] = [
            self.check_gold,
            self.check_vllm,
            partial(check_weights, self.reward_weights),
            self._check_minibatches,
            self._check_ppo_choices,
            self._check_length,
            self._tell_what_vllm_leaves_wrong,
        ]
        return [*kl_rules(self), *own]

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()

    def _check_minibatches(self) -> None:
        if self.rollout_size % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches={self.num_mini_batches} must divide the rollout of {self.rollout_size} answers per "
                "process (per_device_train_batch_size * gradient_accumulation_steps)."
            )
        if self.kl_sampler_target is not None and self.num_ppo_epochs * self.num_mini_batches == 1:
            raise ValueError(
                f"kl_sampler_target={self.kl_sampler_target} ends the updates of a rollout before its last and "
                "num_ppo_epochs=1 with num_mini_batches=1 has one: remove it, or raise num_ppo_epochs."
            )

    def _check_ppo_choices(self) -> None:
        check_neftune(self.neftune_noise_alpha)
        if self.stop_token not in (None, "eos"):
            raise ValueError(f"stop_token={self.stop_token!r} does not exist: use 'eos', or stop_token_id.")
        if self.missing_eos_penalty is not None and self.stop_token is None and self.stop_token_id is None:
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} needs an answer's end: set stop_token='eos'."
            )
        if self.kl_aggregation != "loss_type":
            raise ValueError(
                f"kl_aggregation={self.kl_aggregation!r} has no effect: PPO's losses are means over the tokens of a "
                "minibatch already; remove it."
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size=true would cut rollouts to pieces: set it to false.")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=true is not supported by PPO: set it to false.")

    def _tell_what_vllm_leaves_wrong(self) -> None:
        sentence = uncorrected_reward(self)
        if sentence is not None:
            warnings.warn(sentence, UserWarning, stacklevel=5)

    def _check_length(self) -> None:
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(
                f"total_episodes={self.total_episodes} and max_steps={self.max_steps} both give the length of the run: "
                "set one of them (a step is a rollout)."
            )


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Of a field that may be written as JSON on a command line; the config has parsed it."""
    return value if isinstance(value, dict) else None
