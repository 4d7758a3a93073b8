"""The KL arguments that every trainer config shares: flat fields, so that a YAML recipe reads alike for all trainers.

What may be combined with what is in `rules.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..kl.gradients import gradient_sentence
from ..kl.term import KLTerm
from .choices import CHOICES, CONTROLLER_SETTINGS, ESTIMATORS, with_aliases
from .types import Choices


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class KLArguments:
    """How the KL to the reference is estimated, where it enters, how it is corrected and what holds it at its target.

    All KL values are in nats. Mixed into each trainer's config; see the README's table for the gradient that each
    combination has. A `ValueError` names the field, its value and the remedy.
    """

    kl_estimator: str = _option(
        "k3", "KL estimator: k1, k2, k3 or exact (full vocabulary). Aliases: kl, mse, low_var_kl, full."
    )
    kl_placement: str = _option(
        "loss", "Where the KL enters: loss, reward, both, or none (measured and logged, no penalty)."
    )
    kl_credit: str = _option(
        "return_to_go",
        "Which KL a token is charged for in the reward: return_to_go, immediate or sequence. With kl_placement='both', "
        "return_to_go leaves out the token's own KL where the loss already charges it.",
    )
    kl_importance_sampling: str | None = _option(
        None,
        "Weight pi/mu on the KL, mu being the policy that really sampled: none, token, prefix or sequence. token "
        "weighs the KL loss alone; with prefix or sequence a KL in the reward is made of the present policy at every "
        "update, as a loss of its own. Default: token, as TRL's use_bias_correction_kl, and none with the KL in the "
        "reward.",
    )
    kl_is_mode: str = _option("truncate", "What happens to a token's weight above kl_is_cap: truncate or mask.")
    kl_is_cap: float | None = _option(
        None,
        "Largest importance weight of a token, of which prefix and sequence weights are products. None: no bound, as "
        "TRL.",
    )
    kl_is_answer_cap: float | None = _option(
        None,
        "Answers whose geometric mean of pi/mu is above this, or below its inverse, are left out of the KL (not of the "
        "reward), which biases it. kl/answers_left_out is their share. None: none is.",
    )
    kl_is_veto: float | None = _option(
        None,
        "Answers with a token whose pi/mu is below this are left out of the KL (not of the reward), which biases it. "
        "kl/answers_left_out is their share. None: none is.",
    )
    kl_aggregation: str = _option(
        "loss_type",
        "How the KL loss is averaged: loss_type follows TRL's loss; token takes the mean over all tokens of the batch, "
        "which keeps the gradient's direction exact.",
    )
    kl_direction: str = _option("reverse", "Direction of the exact KL: reverse, KL(policy || reference), or forward.")
    kl_value_cap: float | None = _option(
        None, "Bound on the KL loss of a token, in nats; bounds the value, keeps the gradient."
    )
    kl_controller: str = _option("fixed", "What sets beta: fixed, adaptive, pid, linear or cosine.")
    kl_target: float | None = _option(None, "KL that the adaptive and pid controllers hold, in kl_target_unit.")
    kl_target_unit: str = _option(
        "token", "Unit of kl_target: token (mean nats per token) or sequence (nats per sequence)."
    )
    kl_signal: str | None = _option(
        None, "What the controller reads: k1, k3 or exact. Default: exact where it is computed anyway, else k3."
    )
    kl_sampler_target: float | None = _option(
        None,
        "KL(policy || sampler), nats per token, up to which the updates of a rollout go on: after the first that is "
        "computed beyond it, the others are left out. Default: none is. GRPO and PPO.",
    )
    kl_step_limit: float | None = _option(
        None,
        "KL(policy after a step || policy before it), in kl_target_unit, below which the learning rate is held: it is "
        "lowered while steps go farther. 0.015 times kl_target is a good start. Default: none. GRPO and PPO, where a "
        "step is a rollout.",
    )
    kl_horizon: float | None = _option(None, "Horizon of the adaptive controller, in episodes. Default 10000.")
    kl_kp: float | None = _option(
        None, "Proportional gain of the pid controller; kl_kp / kl_ki is how many updates it looks ahead. Default 1.75."
    )
    kl_ki: float | None = _option(None, "Integral gain of the pid controller. Default 0.1.")
    kl_gain_min: float | None = _option(
        None, "Factor, at most 1, down to which the pid controller lowers its gains while the KL swings. Default 0.2."
    )
    kl_coef_min: float | None = _option(None, "Smallest beta of the adaptive and pid controllers. Default beta/100.")
    kl_coef_max: float | None = _option(None, "Largest beta of the adaptive and pid controllers. Default 100*beta.")
    kl_coef_end: float | None = _option(None, "Beta at the end of training, for the linear and cosine controllers.")
    kl_group_column: str | None = _option(
        None,
        "Column of the dataset that names a prompt's group (task, domain): the KL is logged by group, and an adaptive "
        "or pid controller holds each group at its own target by its own beta. GRPO and PPO.",
    )
    kl_group_targets: dict | str | None = _option(
        None, "KL target by group, in kl_target_unit; groups without one take kl_target. A mapping, or JSON."
    )
    kl_budget: float | str | None = _option(
        None,
        "Largest KL in nats per sequence; beyond it kl_budget_action decides. auto: half the KL at which "
        "the gold reward is estimated to peak, as soon as that is known well enough (needs a gold reward).",
    )
    kl_budget_action: str = _option("stop", "Beyond kl_budget: stop (checkpoint saved) or warn.")
    kl_monitor: list[str] | None = _option(
        None,
        "Estimators to log with standard errors, also at beta 0: k1, k2, k3, exact. Default: kl_estimator and k1, k3 "
        "where the reference is there anyway. In bf16 exact makes the others true too.",
    )
    sync_ref_model: bool = _option(
        False, "Move the reference towards the policy every ref_model_sync_steps steps, an adapter's too."
    )
    ref_model_mixup_alpha: float = _option(
        0.6, "Share of the policy in the moved reference, weight by weight: alpha * policy + (1 - alpha) * reference."
    )
    ref_model_sync_steps: int = _option(
        512, "Steps between two moves of the reference; 1 makes it an exponential moving average. PPO: rollouts."
    )
    kl_origin: bool | None = _option(
        None,
        "Measure the KL to the start too where the reference moves (kl/origin, k3): a forward pass per rollout and, "
        "without an adapter, one more copy of the weights. Default: true with sync_ref_model.",
    )
    max_skipped_steps: int = _option(
        10, "Steps in a row that may be skipped because they are not finite (loss, KL, gradient); one more is an error."
    )
    kl_health: bool = _option(True, "Health alarms: warnings about what goes wrong in the run, with cause and remedy.")
    kl_report: bool = _option(
        True,
        "What a run prints at its start and end, and leaves in output_dir: settings, metrics.jsonl, answers, pictures.",
    )
    log_completions: bool = _option(
        False,
        "Sampled answers in the trackers too, about a hundred times: tables in wandb and trackio, text in TensorBoard. "
        "GRPO's are TRL's, which also prints them.",
    )
    allow_biased_kl: bool = _option(
        False, "Run a combination that is refused for its gradient, with a warning that names it."
    )

    @property
    def kl_coef_start(self) -> float:
        """Beta at the start of training, under the name that the algorithm gives it."""
        raise TypeError(f"{type(self).__name__} must name the field that is beta.")

    @property
    def kl_coef_name(self) -> str:
        """TRL's name of that field, beta (GRPO, DPO) or kl_coef (PPO)."""
        raise TypeError(f"{type(self).__name__} must name the field that is beta.")

    @property
    def kl_gradient(self) -> str:
        """The gradient of the KL, as one sentence."""
        return self._gradient(acts=self.kl_is_penalised)

    def _gradient(self, *, acts: bool, on_data: bool = False) -> str:
        if not acts and not self.kl_is_measured:
            return "There is no KL to the reference, neither penalised nor measured."
        return gradient_sentence(
            self.kl_estimator,
            self.kl_placement if acts else "none",
            self.kl_credit,
            self.kl_importance_sampling or "none",
            direction=self.kl_direction,
            on_data=on_data,
        )

    @property
    def kl_control(self) -> str:
        """What sets beta, as a clause."""
        name, start, kind = self.kl_coef_name, self.kl_coef_start, self.kl_controller
        if kind == "fixed":
            return f"{name}={start} is fixed"
        if self.kl_coef_end is not None:
            return f"{kind} moves {name} from {start} to {self.kl_coef_end}"
        held = "each group at its own target" if self.kl_target is None else f"{self.kl_target:g} nats"
        return f"{kind} moves {name} from {start} to hold {held} per {self.kl_target_unit}, read from {self.kl_reading}"

    @property
    def kl_sampler_limit(self) -> str:
        """What `kl_sampler_target` does, as a sentence; empty without one."""
        if self.kl_sampler_target is None:
            return ""
        return (
            f"The updates of a rollout end with the first that is computed at a KL(policy || sampler) above "
            f"{self.kl_sampler_target:g} nats per token"
        )

    @property
    def kl_is_penalised(self) -> bool:
        """Whether a KL penalty reaches the policy."""
        return self.kl_placement != "none" and self.kl_coef_start != 0

    @property
    def kl_is_measured(self) -> bool:
        """Whether the reference is needed at all."""
        return self.kl_is_penalised or self.kl_placement == "none" or bool(self.kl_monitor) or bool(self.kl_budget)

    @property
    def has_reference(self) -> bool:
        """Whether a reference is in memory during training."""
        return self.kl_is_measured

    @property
    def kl_has_origin(self) -> bool:
        """Whether the KL to the start is measured beside that to a reference that moves."""
        return self.sync_ref_model and self.kl_is_measured and self.kl_origin is not False

    @property
    def kl_logged_estimators(self) -> tuple[str, ...]:
        """Estimators whose mean and standard error are logged."""
        if not self.kl_is_measured:
            return ()
        wanted = {self.kl_estimator, self.kl_reading, *(("k1", "k3") if self.kl_monitor is None else self.kl_monitor)}
        return tuple(name for name in ESTIMATORS if name in wanted)

    @property
    def kl_needs_exact(self) -> bool:
        """Whether the full-vocabulary KL has to be computed."""
        return "exact" in self.kl_logged_estimators

    @property
    def kl_reading(self) -> str:
        """The estimator that the controller, the budget and `kl/sequence` read."""
        if self.kl_signal is not None:
            return self.kl_signal
        if self.kl_direction == "forward":
            return "k3"  # target, budget and kl/sequence are of the reverse KL, whatever the loss is
        return "exact" if self.kl_estimator == "exact" or "exact" in (self.kl_monitor or ()) else "k3"

    @property
    def kl_controller_settings(self) -> dict[str, float]:
        """The settings given for the controller, under the names that `make_controller` takes."""
        names = [name for name in CONTROLLER_SETTINGS if getattr(self, name) is not None]
        return {name.removeprefix("kl_"): getattr(self, name) for name in names}

    def kl_target_of(self, group: str) -> float | None:
        """The KL target of a group of `kl_group_column`."""
        targets = self.kl_group_targets
        return targets.get(group, self.kl_target) if isinstance(targets, dict) else self.kl_target

    def kl_term(self) -> KLTerm:
        """The estimator, placement, credit and weight as the pure function that trainers use."""
        given: Any = self  # whose names the rules have checked
        return KLTerm(
            estimator=given.kl_estimator,
            placement=given.kl_placement,
            reward_credit=given.kl_credit,
            weight_level=given.kl_importance_sampling or "none",
            weight_mode=given.kl_is_mode,
            weight_cap=given.kl_is_cap,
            answer_cap=given.kl_is_answer_cap,
            veto=given.kl_is_veto,
            value_cap=given.kl_value_cap,
            direction=given.kl_direction,
        )

    def choices(self) -> Choices:
        """The values that fields may have whose annotation does not name them; a mapping resolves other spellings."""
        return {
            **CHOICES,
            "kl_importance_sampling": (),  # a rule has a fuller message about it
            "kl_estimator": with_aliases(CHOICES["kl_estimator"]),
            "kl_monitor": with_aliases(ESTIMATORS),
            "kl_signal": with_aliases(CHOICES["kl_signal"]),
            "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
        }

    def resolve(self) -> None:
        """Put aliases and defaults in the place of what was given, whose types are right by then."""
        if self.kl_importance_sampling is None:
            self.kl_importance_sampling = "none" if self.kl_placement in ("none", "reward") else "token"
        if isinstance(self.kl_group_targets, dict):
            self.kl_group_targets = {str(group): target for group, target in self.kl_group_targets.items()}

    def rules(self) -> list[Callable[[], None]]:
        """Every rule about fields together, the first to be reported first: `kl_rules`, and those of one trainer."""
        raise TypeError(f"{type(self).__name__} must name its rules.")
