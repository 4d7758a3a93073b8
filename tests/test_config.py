"""Every rule about the KL arguments: what is accepted, what is refused, and the one sentence it says."""

import inspect
import itertools
import re
import warnings
from pathlib import Path

import pytest
from support.tiny import Arguments

from trl_klx import KLXGRPOConfig
from trl_klx.config import KLArguments
from trl_klx.config.choices import CHOICES, ESTIMATORS
from trl_klx.control import KINDS
from trl_klx.kl.gradients import EXPLANATION, SOUND, expected_gradient
from trl_klx.trainers.grpo import config as grpo_config


def test_every_combination_is_accepted_exactly_when_its_gradient_is_a_kls() -> None:
    placements = ("loss", "reward", "both")
    seen = {"accepted": 0, "refused": 0}
    combinations = itertools.product(ESTIMATORS, placements, CHOICES["kl_credit"], CHOICES["kl_importance_sampling"])
    for estimator, placement, credit, weight in combinations:
        if (placement == "loss" and credit != "return_to_go") or (placement == "reward" and weight == "token"):
            continue  # dead options, refused for that: see BAD
        names = ("kl_estimator", "kl_placement", "kl_credit", "kl_importance_sampling")
        options = dict(zip(names, (estimator, placement, credit, weight), strict=True))
        gradient = expected_gradient(estimator, placement, credit, weight != "none")
        if gradient in SOUND:
            Arguments(**options)
            seen["accepted"] += 1
            continue
        seen["refused"] += 1
        with pytest.raises(ValueError, match="allow_biased_kl") as error:
            Arguments(**options)
        assert EXPLANATION[gradient.name] in str(error.value)
        with pytest.warns(UserWarning, match=r"expected gradient: ") as record:
            Arguments(**options, allow_biased_kl=True)
        assert f"(expected gradient: {gradient.name})" in str(record[0].message)
    assert seen == {"accepted": 48, "refused": 52}


REWARD = {"kl_estimator": "k1", "kl_placement": "reward"}
GROUPS = {"kl_group_column": "task", "kl_controller": "pid"}
BAD = [  # options, what the sentence must contain
    ({"kl_estimator": "k1"}, None),  # weighted by default: accepted
    ({"kl_estimator": "k1", "kl_importance_sampling": "none"}, "zero expected gradient"),
    ({"kl_estimator": "k1", "kl_importance_sampling": "none"}, "use kl_estimator='k2'"),
    ({"kl_estimator": "k2", "kl_placement": "reward"}, "vanishes near the reference"),
    ({"kl_estimator": "k3", "kl_placement": "reward"}, "vanishes to first order near the reference"),
    ({"kl_estimator": "k3", "kl_placement": "reward"}, "kl_estimator='k1' in the reward"),
    ({"kl_estimator": "exact", "kl_placement": "reward"}, "prefix term alone"),
    ({"kl_estimator": "exact", "kl_placement": "reward", "kl_credit": "immediate"}, "zero expected gradient"),
    ({"kl_estimator": "k2", "kl_placement": "both"}, "kl_estimator='exact' or 'k3'"),
    ({"kl_estimator": "k3", "kl_placement": "both", "kl_credit": "sequence"}, "kl_credit='return_to_go'"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4' does not exist; did you mean"),
    ({"kl_estimator": "low_var"}, "did you mean 'low_var_kl'?"),
    ({"kl_placement": "rewards"}, "did you mean 'reward'?"),
    ({"kl_credit": "return"}, "did you mean 'return_to_go'?"),
    ({"kl_importance_sampling": "tokens"}, "did you mean 'token'?"),
    ({"kl_importance_sampling": "geometric"}, "geometric mean"),
    ({"kl_is_mode": "clip"}, "kl_is_mode='clip' does not exist"),
    ({"kl_aggregation": "mean"}, "choose one of loss_type, token"),
    ({"kl_direction": "backward"}, "choose one of reverse, forward"),
    ({"kl_direction": "forward"}, "set kl_estimator='exact'"),
    ({"kl_controller": "pi"}, "did you mean 'pid'?"),
    ({"kl_target_unit": "batch"}, "kl_target_unit='batch'"),
    ({"kl_signal": "k2"}, "kl_signal='k2' does not exist"),
    ({"kl_signal": "exact"}, "add exact to kl_monitor"),
    ({"kl_budget_action": "halt"}, "choose one of stop, warn"),
    ({"kl_monitor": ["k1", "k5"]}, "kl_monitor='k5' does not exist"),
    ({"kl_monitor": "k1"}, "write [k1]"),
    ({"kl_is_cap": 2.0, "kl_importance_sampling": "none", "kl_estimator": "k2"}, "remove it, or set"),
    ({"kl_is_cap": 2.0, "kl_estimator": "exact"}, "an exact KL takes no token weight"),
    ({"kl_is_cap": -1.0}, "kl_is_cap=-1.0 must be a number, more than 0"),
    ({"kl_is_mode": "mask"}, "set kl_is_cap"),
    ({"kl_value_cap": 0}, "kl_value_cap=0 must be a number, more than 0"),
    ({"kl_value_cap": 1.0, "kl_placement": "reward", "kl_estimator": "k1"}, "bend its gradient"),
    ({"kl_credit": "immediate"}, "set kl_placement='reward'"),
    ({**REWARD, "kl_importance_sampling": "token"}, "the policy gradient's ratio is that weight"),
    ({**REWARD, "kl_importance_sampling": "token"}, "remove it, or set 'prefix'"),
    ({**REWARD, "kl_importance_sampling": "prefix"}, None),
    ({**REWARD, "kl_importance_sampling": "prefix", "kl_is_cap": 2.0, "kl_is_mode": "mask"}, None),
    ({**REWARD, "kl_importance_sampling": "prefix", "kl_aggregation": "token"}, None),
    ({**REWARD, "kl_aggregation": "token"}, "averages the KL loss and kl_placement='reward' has none"),
    ({"kl_is_answer_cap": 2.0, "kl_is_veto": 0.1}, None),
    ({"kl_is_answer_cap": 2.0, "kl_is_veto": 0.1, "kl_estimator": "exact"}, None),
    ({**REWARD, "kl_importance_sampling": "sequence", "kl_is_answer_cap": "1.5", "kl_is_veto": "1e-3"}, None),
    ({"kl_is_answer_cap": 1.0}, "kl_is_answer_cap=1.0 must be a number, more than 1"),
    ({"kl_is_veto": 0.0}, "kl_is_veto=0.0 must be a number, more than 0 and less than 1"),
    ({"kl_is_veto": 1.0}, "kl_is_veto=1.0 must be a number, more than 0 and less than 1"),
    ({**REWARD, "kl_is_answer_cap": 2.0}, "kl_importance_sampling='none' has none: remove it, or set"),
    ({"kl_placement": "none", "kl_is_veto": 0.1}, "kl_is_veto=0.1 leaves out answers by their importance weights"),
    ({"kl_placement": "both", "kl_is_veto": 0.1}, "would leave answers out of the KL loss alone"),
    ({"kl_placement": "both", "kl_is_veto": 0.1, "kl_importance_sampling": "prefix"}, None),
    ({"beta": 0.0, "kl_is_veto": 0.1}, "kl_is_veto=0.1 has no effect at beta=0"),
    ({"kl_target": 0.1}, "kl_target=0.1 has no effect with kl_controller='fixed'"),
    ({"kl_target": 0.1, "kl_controller": "linear", "kl_coef_end": 0.1}, "kl_controller to 'adaptive' or 'pid'"),
    ({"kl_controller": "pid"}, "set kl_target (nats per token)"),
    ({"kl_controller": "adaptive", "kl_target_unit": "sequence"}, "set kl_target (nats per sequence)"),
    ({"kl_controller": "pid", "kl_target": -0.1}, "kl_target=-0.1 must be a number, more than 0"),
    ({"kl_controller": "pid", "kl_target": "high"}, "kl_target='high' must be a finite number"),
    ({"kl_controller": "pid", "kl_target": float("nan")}, "kl_target=nan must be a finite number"),
    ({"kl_controller": "pid", "kl_target": True}, "kl_target=True must be a finite number"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_horizon": 10.0}, "kl_horizon=10.0 has no effect"),
    ({"kl_controller": "adaptive", "kl_target": 0.1, "kl_kp": 1.0}, "kl_kp=1.0 has no effect"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_ki": -1.0}, "kl_ki=-1.0 must be a number, at least 0"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_gain_min": 0.0}, "kl_gain_min=0.0 must be a number, more than 0"),
    (
        {"kl_controller": "pid", "kl_target": 0.1, "kl_gain_min": 1.5},
        "kl_gain_min=1.5 must be a number, more than 0 and at",
    ),
    ({"kl_controller": "adaptive", "kl_target": 0.1, "kl_gain_min": 0.5}, "kl_gain_min=0.5 has no effect"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_coef_min": 0.5}, "must lie between kl_coef_min=0.5"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_coef_max": 0.01}, "kl_coef_max=0.01"),
    ({"kl_controller": "linear"}, "set kl_coef_end"),
    ({"kl_budget": "much"}, "kl_budget='much' must be a number of nats per sequence, or auto"),
    ({"kl_budget": "-1"}, "kl_budget=-1.0 must be a number, more than 0"),
    ({"kl_budget": "2.5"}, None),  # as a command line gives it
    ({"kl_group_column": "task", "beta": 0.0}, "kl_group_column='task' has no KL to group at beta=0"),
    ({"kl_group_targets": {"a": 0.1}, "kl_controller": "pid"}, "set kl_group_column to the dataset's column"),
    ({**GROUPS, "kl_group_targets": {"a": 0.1}, "kl_controller": "fixed"}, "has no effect with kl_controller='fixed'"),
    ({**GROUPS, "kl_group_targets": {"a": -0.1}}, "kl_group_targets['a']=-0.1 must be more than zero"),
    ({**GROUPS, "kl_group_targets": {"a": "high"}}, "kl_group_targets['a']='high' must be a finite number"),
    ({**GROUPS, "kl_group_targets": "a: 0.1"}, "is not JSON"),
    ({**GROUPS, "kl_group_targets": [0.1]}, "must map the groups' names"),
    ({**GROUPS, "kl_group_targets": {}}, "must map the groups' names"),
    (GROUPS, "set kl_target (nats per token)"),
    ({"kl_controller": "cosine", "kl_coef_end": 0.0}, "kl_coef_end=0.0 must be a number, more than 0"),
    ({"kl_controller": "pid", "kl_target": 0.1, "beta": 0.0}, "give beta a positive start"),
    ({"kl_controller": "pid", "kl_target": 0.1, "kl_placement": "none"}, "nothing to steer"),
    ({"beta": -0.1}, "beta=-0.1 must be zero or more"),
    ({"beta": float("inf")}, "beta=inf must be a finite number"),
    ({"beta": None}, "beta=None must be a finite number"),
    ({"beta": [0.1]}, "beta=[0.1] must be a finite number"),
    ({"beta": 0.0, "kl_estimator": "exact"}, "kl_estimator='exact' has no effect at beta=0"),
    ({"beta": 0.0, "kl_placement": "both"}, "kl_placement='both' has no effect at beta=0"),
    ({"kl_estimator": ["k1", "k3"]}, "kl_estimator=['k1', 'k3'] must be text"),
    ({"kl_monitor": 3}, "kl_monitor=3 must be a list"),
    ({"kl_controller": None}, "kl_controller=None does not exist"),
    ({"kl_target_unit": None}, "kl_target_unit=None does not exist"),
    ({"kl_credit": None}, "kl_credit=None does not exist"),
    ({"kl_placement": "none", "kl_importance_sampling": "token"}, "kl_placement='none' has none"),
    ({"kl_placement": "none", "kl_importance_sampling": "prefix"}, "kl_placement='none' has none"),
    ({"kl_placement": "none", "kl_aggregation": "token"}, "averages the KL loss"),
    ({"kl_estimator": "exact", "kl_direction": "forward", "kl_signal": "exact"}, "use kl_signal='k3'"),
    ({"log_completions": "maybe"}, "log_completions='maybe' must be true or false"),
    ({"kl_health": "maybe"}, "kl_health='maybe' must be true or false"),
    ({"kl_budget": 0.0}, "kl_budget=0.0 must be a number, more than 0"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=lambda value: str(value)[:60])
def test_one_sentence_each(options: dict, sentence: str | None) -> None:
    if sentence is None:
        Arguments(**options)
        return
    with pytest.raises(ValueError, match=r"\.$") as error:
        Arguments(**options)
    message = str(error.value)
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message


def test_aliases() -> None:
    for alias, name in {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "full": "exact"}.items():
        assert Arguments(kl_estimator=alias).kl_estimator == name
    assert Arguments(kl_monitor=["full", "kl"]).kl_monitor == ["exact", "k1"]


def test_defaults_are_resolved() -> None:
    assert Arguments().kl_importance_sampling == "token"
    assert Arguments(kl_estimator="k1", kl_placement="reward").kl_importance_sampling == "none"
    assert Arguments().kl_reading == "k3"
    assert Arguments(kl_estimator="exact").kl_reading == "exact"
    assert Arguments(kl_monitor=["exact"]).kl_reading == "exact"
    assert Arguments(kl_estimator="exact", kl_signal="k1").kl_reading == "k1"
    assert Arguments(kl_estimator="exact", kl_direction="forward").kl_reading == "k3"


def test_what_is_measured() -> None:
    assert Arguments().kl_logged_estimators == ("k1", "k3")
    assert Arguments(beta=0.0).kl_logged_estimators == ()
    assert not Arguments(beta=0.0).kl_is_measured
    assert Arguments(beta=0.0, kl_monitor=["k2"]).kl_logged_estimators == ("k2", "k3")
    assert Arguments(beta=0.0, kl_placement="none").kl_is_measured
    assert Arguments(kl_estimator="exact", kl_monitor=[]).kl_logged_estimators == ("exact",)
    assert not Arguments().kl_needs_exact
    assert Arguments(kl_monitor=["exact"]).kl_needs_exact


def test_trl_switch_keeps_its_meaning(tmp_path: Path) -> None:
    def config(**options: object) -> KLXGRPOConfig:
        return KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, report_to=[], **options)

    assert config().kl_importance_sampling == "token"
    assert config().use_bias_correction_kl is True
    assert config(use_bias_correction_kl=False).kl_importance_sampling == "none"
    assert config(kl_importance_sampling="none").use_bias_correction_kl is False
    assert config(use_bias_correction_kl=True, kl_importance_sampling="prefix").kl_importance_sampling == "prefix"
    for corrected, level in ((False, "token"), (True, "none")):
        with pytest.raises(ValueError, match="set one of the two"):
            config(use_bias_correction_kl=corrected, kl_importance_sampling=level)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=true computes TRL's loss"),
        ({"kl_placement": "both", "importance_sampling_level": "sequence"}, "averages them over the answer"),
        ({"kl_placement": "both", "top_entropy_quantile": 0.5}, "drops them on low-entropy tokens"),
        ({"kl_placement": "both", "off_policy_mask_threshold": 0.5}, "drops them by their sign"),
        ({"kl_placement": "both", "loss_type": "cispo"}, "scales them down"),
        ({"kl_placement": "both", "loss_type": "luspo", "kl_aggregation": "token"}, "different scales"),
        ({"kl_estimator": "k1", "kl_placement": "reward", "use_bias_correction_kl": True}, "has none: remove it"),
    ],
)
def test_grpo_refuses(tmp_path: Path, options: dict, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_config, "LIGER_COMPUTES_THE_LOSS", True)  # as up to TRL 1.14
    with pytest.raises(ValueError, match=sentence):
        KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, report_to=[], **options)


@pytest.mark.parametrize("weight", [{}, {"kl_importance_sampling": "prefix"}], ids=["advantages", "loss"])
def test_config_survives_a_round_trip(tmp_path: Path, weight: dict) -> None:
    """What resolved once resolves to the same again: a checkpoint's arguments can be read back."""
    settings = {**REWARD, **weight, "use_cpu": True, "bf16": False, "report_to": []}
    first = KLXGRPOConfig(str(tmp_path), beta=0.1, **settings)
    names = [name for name in KLArguments.__dataclass_fields__] + ["use_bias_correction_kl"]
    again = KLXGRPOConfig(str(tmp_path), **{**settings, "beta": 0.1, **{name: getattr(first, name) for name in names}})
    assert all(getattr(first, name) == getattr(again, name) for name in names)


def test_a_reward_that_is_charged_at_the_update_passes_every_gate(tmp_path: Path) -> None:
    gates = {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.5}
    gates |= {"loss_type": "luspo", "kl_aggregation": "token", "kl_placement": "both"}
    vllm = {"use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}
    options = {**gates, **vllm, "kl_importance_sampling": "prefix", "use_cpu": True, "bf16": False, "report_to": []}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        KLXGRPOConfig(str(tmp_path), beta=0.1, **options)


def test_group_targets_may_be_json_as_on_a_command_line() -> None:
    arguments = Arguments(**GROUPS, kl_group_targets='{"a": 1, "2": 0.5}', kl_target=0.1)
    assert arguments.kl_group_targets == {"a": 1.0, "2": 0.5}
    assert [arguments.kl_target_of(name) for name in ("a", "2", "b")] == [1.0, 0.5, 0.1]


@pytest.mark.parametrize("kind", ["adaptive", "pid"])
def test_help_states_the_controllers_defaults(kind: str) -> None:
    """`--help` and the API page say `Default 2.` where the controller's own signature has 2.0."""
    for name, parameter in inspect.signature(KINDS[kind].__init__).parameters.items():
        if isinstance(parameter.default, float):
            stated = re.search(r"Default ([\d.]+)\.$", KLArguments.__dataclass_fields__[f"kl_{name}"].metadata["help"])
            assert stated, name
            assert float(stated[1]) == parameter.default, name
