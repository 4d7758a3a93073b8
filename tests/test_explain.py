"""`trl-klx explain`: its figures are the enumeration's, its verdicts the table's, and it says what to use instead."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.enumeration import targets
from test_oracle import FIXTURE_VARIANCES, all_terms, exact_values, label, term_gradient

from trl_klx.cli import commands as cli
from trl_klx.kl import KLTerm
from trl_klx.kl.gradients import SOUND
from trl_klx.kl.sampling import ENGINES, engine_error, enumerated_policy
from trl_klx.kl.variance import (
    DISTANCES,
    REUSED,
    expected,
    figures,
    relative_variance,
    sampler_behind,
    sequence_kl,
    stale,
    world,
)
from trl_klx.run.explain import alternatives as table
from trl_klx.run.explain.alternatives import advice, alternatives, best_of, gradient_name

BEHIND = (0.01, 0.10, 0.40)  # KL(policy || sampler) in nats per answer


def test_the_policies_are_as_far_apart_as_stated() -> None:
    for kl, distance in DISTANCES.items():
        assert sequence_kl(distance) == pytest.approx(kl, rel=1e-6)
    here = enumerated_policy()
    for kl in BEHIND:
        to_sampler = (here.logps(here.policy) - here.logps(sampler_behind(here, kl))).sum(-1)
        assert float((here.probs(here.policy) * to_sampler).sum()) == pytest.approx(kl, rel=1e-6)
    assert {*REUSED, *ENGINES} == set(BEHIND)
    assert torch.equal(sampler_behind(here, 0.0), here.policy)


@pytest.mark.parametrize(
    ("term", "mode", "high", "close", "far"),
    [
        (KLTerm("k1", "reward"), "sequence_truncate", None, 0, 0),
        (KLTerm("k1", "both", weight_level="prefix"), "sequence_mask", None, 0, 0),
        (KLTerm("exact", "both", weight_level="prefix"), "off", None, 0, 0),
        (KLTerm("k1", "reward", weight_level="prefix"), "sequence_mask", 3.0, 0, 0),
        (KLTerm("k1", "reward"), "sequence_mask", 3.0, 0, 43),
        (KLTerm("k1", "both", weight_level="prefix"), "sequence_mask", 3.0, 0, 0),
        (KLTerm("k1", "reward"), "sequence_truncate", 3.0, 0, 15),
        (KLTerm("k1", "reward"), "token_truncate", 3.0, 8, 49),
        (KLTerm("k1", "reward"), "off", None, 12, 93),
        (KLTerm("exact", "both"), "sequence_truncate", None, 5, 28),  # the states of its half in the loss
        (KLTerm("exact", "loss"), "sequence_mask", 3.0, 5, 29),
    ],
    ids=str,
)
def test_what_trls_correction_makes_of_a_kl_in_the_reward(
    term: KLTerm, mode: str, high: float | None, close: int, far: int
) -> None:
    """In percent of the gradient on the policy's own answers: docs/vllm.md."""
    found = [100 * engine_error(term, behind, mode, None, high) for behind in ENGINES]
    assert [round(error) for error in found] == [close, far]
    assert (max(found) < 1e-9) == (close == far == 0)


@pytest.mark.parametrize(("term", "variance"), FIXTURE_VARIANCES, ids=[label(t) for t, _ in FIXTURE_VARIANCES])
def test_variance_is_the_fixture_of_the_oracle(term: KLTerm, variance: float) -> None:
    """At the oracle's own distance, 0.5, and without a baseline, the two computations meet."""
    partial = float(targets_at_fixture()["P"].norm()) ** 2
    assert relative_variance(term, 0.5, baseline=False) * partial == pytest.approx(variance, rel=1e-7)


def targets_at_fixture() -> dict:
    from support.enumeration import fixture_world

    return targets(fixture_world())


@pytest.mark.parametrize("term", all_terms(), ids=label)
def test_expected_gradient_is_the_oracles(term: KLTerm) -> None:
    """On-policy, through the same 125 answers but other code: per-answer gradients against one autograd pass."""
    from support.enumeration import fixture_world

    wanted = term_gradient(fixture_world(), term)
    found = expected(world(0.5), term).flatten()
    assert float((found - wanted).norm()) < 1e-12
    assert exact_values(fixture_world()).shape == (125, 3)


def test_a_baseline_lowers_the_variance_of_a_kl_in_the_reward_only() -> None:
    reward, loss = KLTerm("k1", "reward", weight_level="none"), KLTerm("k2", "loss")
    assert relative_variance(reward, 1.0) < 0.95 * relative_variance(reward, 1.0, baseline=False)
    assert relative_variance(loss, 1.0) == relative_variance(loss, 1.0, baseline=False)


def test_figures_are_those_measured_before() -> None:
    """The variances of the specification, on the same policies: k1 loss, k2 loss, exact loss, exact both."""
    assert figures(KLTerm("k1", "loss", weight_level="none")).variance[1:] == pytest.approx((126, 1150), rel=0.03)
    assert figures(KLTerm("k2", "loss")).variance == pytest.approx((11, 9.4, 9.1), rel=0.03)
    assert figures(KLTerm("exact", "loss")).variance == pytest.approx((1.8, 1.8, 1.8), rel=0.02)
    assert figures(KLTerm("exact", "loss")).bias == pytest.approx(figures(KLTerm("k3", "loss")).bias)
    assert figures(KLTerm("exact", "both")).bias < 1e-12
    assert figures(KLTerm("k1", "reward", weight_level="none")).bias < 1e-12


def test_off_policy_error_is_nil_only_with_whole_weights() -> None:
    for term in (KLTerm("k3", "loss"), KLTerm("exact", "loss"), KLTerm("k1", "reward"), KLTerm("exact", "both")):
        for level in ("prefix", "sequence"):
            assert max(stale(replace(term, weight_level=level), kl).error for kl in BEHIND) < 1e-12
        errors = [stale(term, kl).error for kl in BEHIND]
        assert 0.04 < errors[0] < errors[1] < errors[2]
    token, none = (figures(KLTerm("k2", "loss", weight_level=level)).stale for level in ("token", "none"))
    assert all(mine.error < other.error for mine, other in zip(token, none, strict=True))
    k1, both = (figures(term).stale for term in (KLTerm("k1", "reward"), KLTerm("exact", "both")))
    assert all(mine.error > 2 * other.error for mine, other in zip(k1, both, strict=True))


def test_what_the_weights_cost() -> None:
    """Off-policy a KL in the reward has not even more variance for being right; in the loss it has."""
    for kl in BEHIND:
        for term in (KLTerm("k1", "reward"), KLTerm("exact", "both"), KLTerm("k3", "both")):
            whole = stale(replace(term, weight_level="prefix"), kl).variance
            assert whole < stale(term, kl).variance * (1.03 if kl < 0.1 else 1.0)
            # About the inverse of the effective share of the answers, exp(-2 KL).
            assert whole < 1.05 * math.exp(2 * kl)
        exact = KLTerm("exact", "loss")
        assert stale(replace(exact, weight_level="prefix"), kl).variance > stale(exact, kl).variance


@pytest.mark.parametrize("own", all_terms(), ids=label)
def test_rows_have_the_own_gradient_or_the_whole_one(own: KLTerm) -> None:
    found = alternatives(own)
    assert found[0].term is own
    assert ("refused" in found[0].verdict) == (own.gradient not in SOUND)
    assert all(row.term.gradient in SOUND for row in found[1:])
    names = [row.name for row in found]
    assert len(set(names)) == len(names)
    assert {"exact in both"} <= {row.name for row in found} or own.placement == "both"
    for row in found[1:]:
        assert row.gradient in (gradient_name(own), "KLseq", "P")
        assert min(row.relative_variance[1:2]) >= 1 - 1e-9


def test_the_best_of_each_gradient() -> None:
    assert best_of("KLseq") == KLTerm("exact", "both", weight_level="none")
    assert best_of("P") == KLTerm("exact", "loss", weight_level="none")
    assert best_of("F") == KLTerm("exact", "loss", weight_level="none", direction="forward")


RECIPES = {
    "grpo_k3_loss": {"beta": 0.04, "kl_estimator": "k3", "kl_placement": "loss"},
    "grpo_k1_reward": {"beta": 0.04, "kl_estimator": "k1", "kl_placement": "reward", "num_iterations": 4},
    "grpo_k3_reward": {"beta": 0.04, "kl_estimator": "k3", "kl_placement": "reward"},
    "grpo_k1_loss": {"beta": 0.04, "kl_estimator": "k1", "kl_placement": "loss", "kl_importance_sampling": "none"},
    "grpo_exact_both_pid": {
        **{"beta": 0.04, "kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.02},
        **{"num_iterations": 2, "loss_type": "grpo", "top_p": 0.9, "max_completion_length": 100},
    },
    "grpo_vllm": {
        "beta": 0.1,
        "kl_estimator": "k1",
        "kl_placement": "reward",
        "use_vllm": True,
        "vllm_mode": "server",
    },
    "grpo_k3_none": {"kl_placement": "none"},
    "grpo_exact_loss": {"beta": 0.1, "kl_estimator": "exact", "kl_direction": "forward"},
    "dpo_exact_loss": {"kl_coef": 0.1},
    "ppo_k1_reward": {"gamma": 0.99},
    "grpo_target_alone": {"beta": 0.1, "kl_target": 0.1},
}


def explain(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **RECIPES[name]}))
    status = cli.main(["explain", "--config", str(path), *more])
    assert not (tmp_path / "run").exists()
    captured = capsys.readouterr()
    return status, " ".join(captured.out.split()), captured.err


@pytest.mark.parametrize(
    ("name", "more", "status", "said"),
    [
        (
            "grpo_k3_loss",
            [],
            0,
            ["partial gradient of the reverse KL", "exact in loss has the same gradient at 5.3 times"],
        ),
        (
            "grpo_k3_loss",
            [],
            0,
            ["k3 in loss, weight token P 11 % 5 % 1.0 15 % 1.0 6.2 5.3 5.1 log-probs this recipe", "is fixed"],
        ),
        (
            "grpo_k3_loss",
            [],
            0,
            ["exact in both KLseq 0 % 8 % 1.0 29 % 1.3 1.0 1.0 1.0 vocabulary + scoring best of KLseq"],
        ),
        ("grpo_k3_loss", ["--kl_estimator", "k2"], 0, ["k2 in loss, weight token"]),
        (
            "grpo_k3_loss",
            ["--kl_is_cap", "1.2"],
            0,
            [
                "k3 in loss, weight token to 1.2 P 11 % 5 % 1.0 19 % 0.9",
                "kl_is_cap=1.2 truncates tokens' weights above it: less variance for a bias",
                "36 % off at 0.7 times the variance of the policy's own answers, without a bound 28 % off at 1.3 times",
            ],
        ),
        (
            "grpo_k1_reward",
            [],
            0,
            [
                "k1 in reward KLseq 0 % 26 % 1.2 79 % 2.7",
                "k1 in reward, weight prefix KLseq 0 % 0 % 1.0 0 % 1.2 8.4 9.9 10.0 log-probs + scoring right",
                "the gradient is 26 % and 79 % off, at 1.2 and 2.7 times its variance on the policy's own answers.",
                "kl_importance_sampling='prefix' charges it at every update instead: 0 % and 0 % off, at 1.0 and 1.2",
            ],
        ),
        (
            "grpo_k1_reward",
            ["--kl_importance_sampling", "prefix", "--kl_is_cap", "1.5", "--kl_is_veto", "0.5"],
            0,
            [
                "k1 in reward, weight prefix to 1.5, veto 0.5, fixed beta",
                "charged at every update, at the present policy's values",
                "kl_is_veto=0.5 leaves out answers with a token of a smaller weight",
            ],
        ),
        (
            "grpo_exact_both_pid",
            ["--kl_importance_sampling", "prefix", "--kl_is_answer_cap", "1.2"],
            0,
            ["exact in both, weight prefix, answers to 1.2", "leaves out answers by the mean of their log-weights"],
        ),
        ("grpo_k3_loss", ["--kl_importance_sampling", "none"], 0, ["forward KL(reference || policy)", "4.7x less"]),
        ("grpo_k3_reward", [], 1, ["Refused: kl_estimator='k3'", "this one: refused", "Instead: exact in both"]),
        ("grpo_k1_loss", [], 1, ["zero expected gradient", "use kl_estimator='k2'", "Instead: exact in both"]),
        ("grpo_exact_both_pid", [], 0, ["No choice has less variance", "num_iterations=2", "divides by each answer's"]),
        ("grpo_exact_both_pid", [], 0, ["k1 reads 0.049 and k3 0.085 on enumerated policies where 0.100 is right"]),
        (
            "grpo_k3_loss",
            ["--generation_kwargs", '{"temperature": 1.5, "top_k": 5}'],
            0,
            ["generation_kwargs={'top_k': 5, 'temperature': 1.5}", "k1 reads 0.097 and k3 0.097"],
        ),
        ("grpo_k3_loss", ["--repetition_penalty", "1.2"], 0, ["repetition_penalty=1.2:", "a KL in the reward is not"]),
        (
            "grpo_k3_loss",
            ["--kl_controller", "pid", "--kl_target", "0.002"],
            0,
            ["rounded to bfloat16, which adds about 0.001 nats per token", "add exact to kl_monitor"],
        ),
        ("grpo_exact_both_pid", [], 0, ["top_p=0.9", "hold 0.02 nats per token", "up to 2 nats in an answer of 100"]),
        (
            "grpo_vllm",
            [],
            0,
            [
                "weighs whole answers: a KL in the reward is exact as far as no answer is beyond its bound "
                "(vllm_importance_sampling_clip_max=3)",
                "43 % off at 0.4 nats per answer",
                "kl/ratio_cut",
                "kl_importance_sampling='prefix' has weights of its own and is exact in any mode",
                "k1 in reward, weight prefix KLseq 0 % 0 % 1.0 0 % 1.2",
                "--logprobs-mode processed_logprobs",
            ],
        ),
        (
            "grpo_vllm",
            ["--vllm_importance_sampling_correction", "false"],
            0,
            ["12 % off at 0.01 and 93 % off at 0.4", "vllm_importance_sampling_clip_max=null is exact"],
        ),
        (
            "grpo_vllm",
            ["--vllm_importance_sampling_mode", "token_mask", "--kl_placement", "both", "--kl_estimator", "exact"],
            0,
            ["weighs tokens", "The exact KL in the loss needs no weight", "kl_importance_sampling='prefix'"],
        ),
        (
            "grpo_vllm",
            ["--kl_importance_sampling", "prefix"],
            0,
            ["weights of policy to engine of its own (prefix); TRL's vllm_importance_sampling_mode acts"],
        ),
        (
            "grpo_k1_reward",
            ["--kl_sampler_target", "0.01"],
            0,
            ["at a KL(policy || sampler) above 0.01 nats per token (kl_sampler_target): at least one, at most 4."],
        ),
        (
            "grpo_k1_reward",
            ["--kl_step_limit", "0.01", "--kl_controller", "pid", "--kl_target", "0.5", "--kl_target_unit", "sequence"],
            0,
            ["farther than 0.01 nats per sequence (2.0% of kl_target) from where it was, the learning rate is lowered"],
        ),
        ("ppo_k1_reward", ["--kl_step_limit", "0.001"], 0, ["farther than 0.001 nats per token from where it was"]),
        ("grpo_k3_none", [], 0, ["no penalty acts on the policy", "No penalty acts (beta=0.0"]),
        ("grpo_k3_none", ["--kl_placement", "loss"], 0, ["There is no KL to the reference"]),
        ("grpo_exact_loss", [], 0, ["exact forward in loss F", "for the reverse KL use exact in both"]),
        ("dpo_exact_loss", [], 0, ["at the data's own prefixes", "No probe", "exact in loss P on the data"]),
    ],
)
def test_what_it_says(
    name: str, more: list[str], status: int, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = explain(name, tmp_path, capsys, *more)
    assert (found, err) == (status, "")
    for text in said:
        assert text in out, text


def test_ppo_is_explained_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = explain("ppo_k1_reward", tmp_path, capsys)
    assert status == 0
    for text in ("whole gradient", "a rollout serves 4 optimizer steps", "gamma=0.99", "log-probs this recipe"):
        assert text in out, text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing"),
        (["--config", "nowhere/grpo_x.yaml"], "does not exist"),
        (["--config", "recipe.yaml"], "give --algorithm"),
        (["--config", "grpo_x.yaml", "--algorithm", "rloo"], "algorithm='rloo' does not exist: use grpo, ppo or dpo"),
    ],
)
def test_bad_command_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err


def test_a_recipe_that_no_gradient_explains_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = explain("grpo_target_alone", tmp_path, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("error: kl_target=0.1 has no effect with kl_controller='fixed'")


def test_the_algorithm_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"output_dir": "run", "beta": 0.1}))
    assert cli.main(["explain", "--config", str(path), "--algorithm", "grpo"]) == 0
    assert "GRPO, k3 in loss" in capsys.readouterr().out


def test_figures_are_computed_and_not_typed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half the variance enumerated for the exact loss, the advice doubles."""
    real = table.figures

    def halved(term: KLTerm):
        found = real(term)
        exact = term.estimator == "exact" and term.placement == "loss"
        return found._replace(variance=tuple(v / 2 for v in found.variance)) if exact else found

    monkeypatch.setattr(table, "figures", halved)
    assert "at 10.6 times less variance" in advice(KLTerm("k3", "loss"))


def test_the_pages_table_is_what_the_enumeration_gives() -> None:
    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text()
    reused = [row for row in alternatives(KLTerm(), off_policy=True) if row.term.reward_at_update]
    assert len(reused) == 4
    unweighted = alternatives(KLTerm("k3", "loss", weight_level="none"))[:2]
    for row in [*alternatives(KLTerm()), *reused, *unweighted]:
        variance = " ".join(f"{value:.1f}" for value in row.relative_variance)
        stale_cells = " | ".join(f"{100 * one.error:.0f} % {one.variance:.1f}" for one in row.figures.stale)
        bias = f"{100 * row.figures.bias:.0f} %"
        assert f"| {row.name} | {row.gradient} | {bias} | {stale_cells} | {variance} |" in page


STALE_ROWS = {
    "k1 in reward, default": KLTerm("k1", "reward"),
    "k1 in reward, prefix": KLTerm("k1", "reward", weight_level="prefix"),
    "k3 in both, token, default": KLTerm("k3", "both"),
    "k3 in both, prefix": KLTerm("k3", "both", weight_level="prefix"),
    "exact in both, default": KLTerm("exact", "both"),
    "exact in both, prefix": KLTerm("exact", "both", weight_level="prefix"),
    "k3 in loss, token, default": KLTerm("k3", "loss"),
    "exact in loss, default": KLTerm("exact", "loss"),
    "exact in loss, prefix": KLTerm("exact", "loss", weight_level="prefix"),
}


@pytest.mark.parametrize("name", STALE_ROWS)
def test_the_page_on_choosing_has_what_stale_answers_cost(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    cells = [f"{100 * one.error:.0f} %, {one.variance:.2f}" for one in (stale(STALE_ROWS[name], kl) for kl in BEHIND)]
    assert f"| {name} | {' | '.join(cells)} |" in page
