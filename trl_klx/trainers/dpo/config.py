"""`KLXDPOConfig`: TRL's `DPOConfig` with the KL arguments that mean something where the data is given."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trl import DPOConfig

from ...config.check import check
from ...config.names import config_with_old_names
from ...config.options import KLArguments
from ...config.rules import kl_rules
from ...config.types import Choices
from ..checks.noise import check_neftune
from ..seams import LIGER_COMPUTES_THE_LOSS

CONTROLS = ("kl_coef", "beta")
# KL arguments that DPO has no use for, and why.
_NO_MEANING = {
    "kl_credit": "it has no reward step",
    "kl_importance_sampling": "its data comes from no policy whose log-probs are known",
    "kl_is_mode": "its KL takes no importance weight",
    "kl_is_cap": "its KL takes no importance weight",
    "kl_is_answer_cap": "its KL takes no importance weight",
    "kl_is_veto": "its KL takes no importance weight",
    "kl_aggregation": "its KL is the mean over the completion tokens of a batch",
    "kl_group_column": "its KL is measured on the probe's prompts, which have no groups",
    "kl_group_targets": "its KL is measured on the probe's prompts, which have no groups",
    "kl_sampler_target": "its answers come from a dataset and not from a sampler",
    "kl_step_limit": "its answers are not the policy's, whose KL cannot be read from them",
    "allow_biased_kl": "it takes one estimator, whose gradient is right",
}
# What only the probe gives a meaning to.
_NEED_PROBE = {
    "kl_budget": "bounds the KL per sequence",
    "kl_monitor": "names the estimators that the probe measures",
    "kl_signal": "chooses among the estimators that the probe measures",
}
_LOSSES: tuple[str, ...] = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
)
_LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@config_with_old_names
@dataclass
class KLXDPOConfig(KLArguments, DPOConfig):
    """`DPOConfig` plus the KL arguments. With its defaults loss and gradients equal TRL's own.

    Two numbers are called KL here, and they differ. `kl/data_exact` is the exact KL at the data's prefixes,
    teacher-forced, in nats per token: what `kl_coef` multiplies. `kl/exact`, `kl/k1`, `kl/sequence` and so on are the
    true KL(policy || reference), on answers that the policy itself samples: the probe (`kl_probe_steps`) measures it,
    and controllers, target and budget read it. `kl_monitor` names the probe's estimators (default k1, k3, exact).

    `beta` keeps TRL's name and meaning: the strength of the KL constraint inside DPO's loss, which also scales its
    gradient. It must be positive: several losses divide by it, and at 0 the others train nothing.
    """

    kl_estimator: str = _option("exact", "KL estimator: exact; DPO's data is not sampled from the policy.")
    kl_placement: str = _option(
        "loss", "Where the KL at the data's prefixes enters: loss, or none (measured and logged, no penalty)."
    )
    kl_coef: float = _option(0.0, "Weight of the exact KL at the data's prefixes in the loss.")
    kl_controls: str = _option("kl_coef", "What kl_controller sets: kl_coef, or beta (a learning-rate schedule too).")
    kl_probe_steps: int | None = _option(
        None, "Optimizer steps between two probes of the true KL on answers that the policy samples. Default: none."
    )
    kl_probe_prompts: int = _option(
        64, "Largest number of distinct prompts of eval_dataset that a probe samples answers to."
    )
    kl_probe_max_new_tokens: int = _option(128, "Largest number of tokens of a probe's answer.")

    @property
    def kl_coef_start(self) -> float:
        return self.beta if self.kl_controls == "beta" else self.kl_coef

    @property
    def kl_coef_name(self) -> str:
        return self.kl_controls

    @property
    def kl_in_loss(self) -> bool:
        """Whether the exact KL at the data's prefixes is part of the loss."""
        return self.kl_placement == "loss" and self.kl_coef != 0

    @property
    def kl_on_data(self) -> bool:
        """Whether the exact KL at the data's prefixes is computed at all."""
        return self.kl_in_loss or self.kl_placement == "none"

    @property
    def kl_is_penalised(self) -> bool:
        """Whether what the controller drives reaches the policy; beta always does."""
        return self.kl_controls == "beta" or self.kl_in_loss

    @property
    def kl_gradient(self) -> str:
        """The gradient of the KL that is added, as one sentence."""
        return self._gradient(acts=self.kl_in_loss, on_data=True)

    @property
    def kl_is_measured(self) -> bool:
        """Whether any KL is computed; the reference itself is always there."""
        return self.kl_on_data or self.kl_probe_steps is not None

    @property
    def has_reference(self) -> bool:
        """Whether a reference is in memory during training: DPO's own loss needs one."""
        return not self.precompute_ref_log_probs

    @property
    def kl_has_origin(self) -> bool:
        """Whether the probe measures the KL to the start, beside that to a reference that moves."""
        return super().kl_has_origin and self.kl_probe_steps is not None

    @property
    def kl_logged_estimators(self) -> tuple[str, ...]:
        """Estimators that the probe measures."""
        if self.kl_probe_steps is None:
            return ()
        wanted = {self.kl_reading, *self._probe_estimators}
        return tuple(name for name in ("k1", "k2", "k3", "exact") if name in wanted)

    @property
    def _probe_estimators(self) -> list[str]:
        return ["k1", "k3", "exact"] if self.kl_monitor is None else self.kl_monitor

    @property
    def kl_needs_exact(self) -> bool:
        return self.kl_on_data or "exact" in self.kl_logged_estimators

    @property
    def kl_reading(self) -> str:
        """The estimator of the probe that the controller, the budget and `kl/sequence` read."""
        if self.kl_signal is not None:
            return self.kl_signal
        reverse = self.kl_direction == "reverse"  # target, budget and kl/sequence are of the reverse KL
        return "exact" if reverse and "exact" in self._probe_estimators else "k3"

    def choices(self) -> Choices:
        return {**super().choices(), "loss_type": _LOSSES, "kl_controls": CONTROLS, "f_divergence_type": _DIVERGENCES}

    def resolve(self) -> None:
        if self.kl_importance_sampling is None:
            self.kl_importance_sampling = "none"
        super().resolve()

    def rules(self) -> list[Callable[[], None]]:
        return [
            self._check_budget,
            self._check_what_dpo_has,
            self._check_coefficients,
            self._check_probe,
            *kl_rules(self),
            self._check_forward,
            self._check_trl_options,
        ]

    def _check_budget(self) -> None:
        if self.kl_budget == "auto":
            raise ValueError(
                "kl_budget='auto' needs a gold reward, which GRPO and PPO can follow and DPO cannot: give kl_budget in "
                "nats per sequence."
            )

    def _check_forward(self) -> None:
        if self.kl_direction == "forward" and not self.kl_needs_exact:
            raise ValueError(
                "kl_direction='forward' needs an exact KL and none is computed: set kl_coef, or add exact to "
                "kl_monitor."
            )

    def _check_what_dpo_has(self) -> None:
        if self.kl_estimator != "exact":
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r} is refused for DPO: its data is not sampled from the policy, so "
                "there k1 is a likelihood difference and k2 and k3 do not estimate a KL; use kl_estimator='exact' "
                "(k1 and k3 "
                "are measured on the policy's own samples by kl_probe_steps)."
            )
        if self.kl_placement in ("reward", "both"):
            raise ValueError(
                f"kl_placement={self.kl_placement!r} is refused for DPO, which has no reward step: use 'loss', or "
                "'none' to measure without a penalty."
            )
        defaults = type(self).__dataclass_fields__
        for name, reason in _NO_MEANING.items():
            value = getattr(self, name)
            resolved = name == "kl_importance_sampling" and value == "none"
            if value != defaults[name].default and not resolved:
                raise ValueError(f"{name}={value!r} has no meaning for DPO ({reason}): remove it.")

    def _check_coefficients(self) -> None:
        if self.kl_controls == "beta" and self.kl_controller == "fixed":
            raise ValueError(
                "kl_controls='beta' names what the controller sets and kl_controller='fixed' sets nothing: remove it, "
                "or choose a kl_controller."
            )
        if self.beta <= 0:
            raise ValueError(
                f"beta={self.beta} must be more than zero: at 0 DPO's losses divide by zero or train nothing."
            )
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef={self.kl_coef} must be zero or more: a negative weight rewards divergence.")
        if self.kl_coef != 0 and self.kl_placement == "none":
            raise ValueError(
                f"kl_coef={self.kl_coef} has no effect with kl_placement='none': remove it, or set kl_placement='loss'."
            )
        if self.kl_value_cap is not None and not self.kl_in_loss:
            raise ValueError(
                f"kl_value_cap={self.kl_value_cap} bounds the value of the KL loss and there is none: remove it, or "
                "set kl_coef."
            )

    def _check_probe(self) -> None:
        defaults = type(self).__dataclass_fields__
        for name in ("kl_probe_steps", "kl_probe_prompts", "kl_probe_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")
            if self.kl_probe_steps is None and value != defaults[name].default:
                raise ValueError(f"{name}={value} has no effect without a probe: set kl_probe_steps, or remove it.")
        if self.kl_probe_steps is not None:
            return
        if self.log_completions:
            raise ValueError(
                "log_completions=true shows sampled answers and DPO samples only in a probe: set kl_probe_steps, or "
                "remove it."
            )
        for name, purpose in _NEED_PROBE.items():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} {purpose} and DPO measures the policy's KL only by a probe: set "
                    "kl_probe_steps, or remove it."
                )
        if self.kl_controller in ("adaptive", "pid"):
            raise ValueError(
                f"kl_controller={self.kl_controller!r} needs the policy's own KL, which DPO measures only by a probe: "
                "set kl_probe_steps, or use 'linear' or 'cosine'."
            )

    def _check_trl_options(self) -> None:
        if self.kl_on_data:
            check_neftune(self.neftune_noise_alpha)
        if self.precompute_ref_log_probs and self.kl_is_measured:
            raise ValueError(
                "precompute_ref_log_probs=true keeps no reference during training, and kl_coef, kl_placement='none' "
                "and kl_probe_steps need it there: set it to false."
            )
        if LIGER_COMPUTES_THE_LOSS and self.use_liger_kernel and (self.kl_is_measured or self.kl_controls == "beta"):
            raise ValueError(
                "use_liger_kernel=true computes DPO's loss in a fused kernel that takes neither a KL nor a changing "
                "beta: "
                "set it to false, or install trl>=1.16, where it only swaps layers."
            )

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()
