"""`KLXGRPOConfig`: TRL's `GRPOConfig` with the KL arguments."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from trl import GRPOConfig

from ...config.check import check
from ...config.names import config_with_old_names
from ...config.options import KLArguments
from ...config.rules import kl_rules
from ...config.types import Choices
from ..checks.noise import check_neftune
from ..checks.rewards import check_weights
from ..rewarding.gold import GoldArguments
from ..seams import LIGER_COMPUTES_THE_LOSS
from ..shared.correction import uncorrected_reward
from ..shared.vllm_options import VLLM_CHOICES
from .precision import rounded_target
from .sampling_settings import check_sampling

_CHOICES: dict[str, tuple] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "importance_sampling_level": ("token", "sequence"),
    **VLLM_CHOICES,
}


@config_with_old_names
@dataclass
class KLXGRPOConfig(KLArguments, GoldArguments, GRPOConfig):
    """`GRPOConfig` plus the KL arguments. `beta` keeps TRL's name and is where a controller starts.

    With its defaults (k3, loss, token weight) loss and gradients equal TRL's own where TRL samples by `generate`. With
    vLLM they do not: TRL weights its KL by the ratio to the trainer's own scores of the rollout, and here it is to the
    engine's log-probs, which are what the answers were sampled by. The weight has no bound until kl_is_cap sets one.
    """

    use_bias_correction_kl: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "TRL's name for kl_importance_sampling: true means token, false means none. Set one of the two."
        },
    )

    @property
    def kl_coef_start(self) -> float:
        return self.beta

    @property
    def kl_coef_name(self) -> str:
        return "beta"

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.steps_per_generation or 1

    def choices(self) -> Choices:
        return {**super().choices(), **_CHOICES}

    def resolve(self) -> None:
        if self.kl_importance_sampling is None and self.use_bias_correction_kl is False:
            self.kl_importance_sampling = "none"
        super().resolve()

    def rules(self) -> list[Callable[[], None]]:
        own: list[Callable[[], None]] = [
            self.check_gold,
            partial(check_weights, self.reward_weights),
            self._check_trl_options,
            self._check_reuse,
            partial(check_sampling, self),
            self._check_reward_reaches_every_token,
            self._tell_what_is_not_exact,
        ]
        return [self._check_trl_switch, *kl_rules(self), *own]

    def __post_init__(self) -> None:
        check(self)
        self.use_bias_correction_kl = self.kl_importance_sampling != "none"
        super().__post_init__()
        self._check_reuse()  # of a rollout that generation_batch_size gives, whose micro-batches TRL has counted by now

    def _tell_what_is_not_exact(self) -> None:
        for sentence in (rounded_target(self), uncorrected_reward(self)):
            if sentence is not None:
                warnings.warn(sentence, UserWarning, stacklevel=5)

    def _check_trl_options(self) -> None:
        check_neftune(self.neftune_noise_alpha)
        reads_logps = self.kl_is_measured or self.kl_sampler_target is not None or self.kl_step_limit is not None
        if LIGER_COMPUTES_THE_LOSS and self.use_liger_kernel and reads_logps:
            raise ValueError(
                "use_liger_kernel=true computes TRL's loss in a fused kernel with its own k3 KL, out of which no "
                "log-probs come: set it to false, or install trl>=1.16, where it only swaps layers."
            )

    def _check_reuse(self) -> None:
        """Whether `kl_sampler_target` has updates to leave out, and can leave them out."""
        target, accumulated = self.kl_sampler_target, self.gradient_accumulation_steps
        if target is None:
            return
        if self.fp16:
            raise ValueError(
                f"kl_sampler_target={target} leaves steps without a gradient, on which the gradient scaler of "
                "fp16=true fails: use bf16 or float32, or remove kl_sampler_target."
            )
        if self.steps_per_generation is None and self.generation_batch_size is not None:
            return
        uses = self.num_iterations * (self.steps_per_generation or accumulated)
        size = (
            f"num_iterations={self.num_iterations} and steps_per_generation={self.steps_per_generation or accumulated}"
        )
        if uses <= accumulated:
            raise ValueError(
                f"kl_sampler_target={target} ends the updates of a rollout before its last and a rollout has one "
                f"({size}, gradient_accumulation_steps={accumulated}): remove it, or raise num_iterations."
            )
        if uses % accumulated:
            raise ValueError(
                f"kl_sampler_target={target} leaves out whole optimizer steps and one of them would use two rollouts: "
                f"let gradient_accumulation_steps={accumulated} divide the micro-batches of a rollout ({size})."
            )

    def _check_reward_reaches_every_token(self) -> None:
        """Refuse TRL options that gate or average the advantages, and with them the KL that is subtracted there."""
        term = self.kl_term()
        if not term.in_reward or term.reward_at_update or self.allow_biased_kl:
            return
        epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        gates = {
            "importance_sampling_level": (
                self.importance_sampling_level == "sequence",
                "averages them over the answer",
            ),
            "top_entropy_quantile": (self.top_entropy_quantile < 1.0, "drops them on low-entropy tokens"),
            "off_policy_mask_threshold": (self.off_policy_mask_threshold is not None, "drops them by their sign"),
            "loss_type": (self.loss_type == "cispo" and epsilon_high < 1, "with epsilon_high < 1 scales them down"),
        }
        for name, (active, effect) in gates.items():
            if active:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} acts on the advantages ({effect}) and kl_placement="
                    f"{self.kl_placement!r} puts the KL there, so its gradient would be wrong: use "
                    f"kl_importance_sampling='prefix' (a loss of its own), kl_placement='loss', or {name}'s default."
                )
        if self.kl_placement == "both" and self.kl_aggregation == "token" and self.loss_type != "dapo":
            raise ValueError(
                f"kl_aggregation='token' with kl_placement='both' and loss_type={self.loss_type!r} would give the two "
                "halves of the KL different scales: use loss_type='dapo', or kl_aggregation='loss_type'."
            )

    def _check_trl_switch(self) -> None:
        corrected = self.use_bias_correction_kl
        if corrected is None:
            return
        meaning = "token" if corrected else "none"
        term = self.kl_term()
        if corrected and not (term.in_loss or term.reward_at_update):
            raise ValueError(
                f"use_bias_correction_kl=True weights the KL loss and kl_placement={self.kl_placement!r} has none: "
                "remove it."
            )
        if (self.kl_importance_sampling != "none") != corrected:
            raise ValueError(
                f"use_bias_correction_kl={corrected} means kl_importance_sampling={meaning!r} and "
                f"kl_importance_sampling is {self.kl_importance_sampling!r}: set one of the two."
            )
