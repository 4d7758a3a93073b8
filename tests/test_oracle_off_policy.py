"""The oracle off-policy: what every accepted configuration's gradient becomes on the answers of another policy.

The credit of a KL in the reward is what the trainers make of it: of the present policy at every update with prefix or
sequence weights, else of the policy that sampled, with the policy gradient's ratio of the token.
"""

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from support.enumeration import World, all_worlds, fixture_world, relative_error, targets
from test_oracle import TOLERANCE, all_terms, exact_values, label
from torch import Tensor

from trl_klx.kl import KLTerm, exact_kl, importance_weights, kl_credit, kl_estimate, leave_one_out_baseline
from trl_klx.kl.gradients import SOUND
from trl_klx.kl.importance import answers_kept, weight_products
from trl_klx.kl.variance import stale

pytestmark = pytest.mark.usefixtures("device")

WORLDS = all_worlds()
AT_UPDATE = ("prefix", "sequence")
BEHIND = (0.01, 0.10, 0.40)  # KL(policy || sampler) in nats per answer, for `bounds_table`


def off_policy_gradient(world: World, term: KLTerm, baseline: Tensor | None = None) -> Tensor:
    """Expected gradient on the sampler's answers; `baseline` is of the credit, (T,) or None for 0."""
    logps, ref_logps, sampler_logps = world.policy_logps(), world.ref_logps(), world.sampler_logps()
    mask, probs_N = world.mask_NT, world.sequence_probs(world.sampler_logps())
    given = {"sampler_logps": sampler_logps, "exact": exact_values(world, term.direction)}
    objective = torch.zeros((), dtype=torch.float64)
    if term.in_loss:
        objective = objective + (probs_N[:, None] * term.loss(logps, ref_logps, mask, **given)).sum()
    if term.reward_at_update:
        charged = term.credit_loss(logps, ref_logps, mask, **given, baseline=baseline)
        objective = objective + (probs_N[:, None] * charged).sum()
    elif term.in_reward:
        rollouts = exact_kl(world.sampler_logits, world.ref_logits, term.direction)[world.states_NT]
        credit = term.credit(sampler_logps, ref_logps, mask, exact=rollouts)
        ratio = importance_weights(logps, sampler_logps, mask)
        objective = objective + (probs_N[:, None] * ratio * credit * logps * mask).sum()
    return world.gradient(objective)


def accepted_terms() -> list[KLTerm]:
    """Every accepted configuration; of weights that do the same, one."""
    terms = []
    for term, level in itertools.product(all_terms(), ("none", "token", *AT_UPDATE)):
        is_own = level == term.weight_level or (term.placement == "reward" and level in AT_UPDATE)
        if term.gradient in SOUND and is_own and not (term.estimator == "exact" and level == "token"):
            terms.append(replace(term, weight_level=level))
    forward = itertools.product(("loss", "both"), ("none", *AT_UPDATE))
    return terms + [KLTerm("exact", p, weight_level=level, direction="forward") for p, level in forward]


def on_policy_name(term: KLTerm) -> str:
    if term.direction == "forward":
        return "F" if term.placement == "loss" else "forward KLseq"
    return term.gradient.name


def target_of(term: KLTerm) -> str | None:
    """Its target among `targets`; None where the expectation is none of a KL."""
    if term.weight_level in AT_UPDATE:
        return on_policy_name(term)
    corrected = term.weighted or term.estimator == "exact"
    # An exact KL does not depend on its own token: as its credit alone it is a baseline.
    in_loss_only = term.placement == "loss" or (term.estimator == "exact" and term.reward_credit == "immediate")
    return f"{on_policy_name(term)}_mu" if in_loss_only and corrected else None


class Row(NamedTuple):
    configuration: str
    target: str
    error: float  # relative, the largest of three policies; NaN for a biased one
    away: float  # from its gradient on-policy, as a part of KLseq, on the table of 31 states


def off_policy_table() -> list[Row]:
    return [_row(term) for term in accepted_terms()]


def _row(term: KLTerm) -> Row:
    name, errors = target_of(term), []
    for world in WORLDS:
        wanted, found = targets(world), off_policy_gradient(world, term)
        errors.append(relative_error(found, wanted[name], wanted["P"]) if name else math.nan)
    wanted, found = targets(WORLDS[0]), off_policy_gradient(WORLDS[0], term)
    away = (found - wanted[on_policy_name(term)]).norm() / wanted["KLseq"].norm()
    return Row(name_of(term), name or "biased", max(errors), float(away))


def name_of(term: KLTerm) -> str:
    credit = "" if term.placement == "loss" else f", credit {term.reward_credit}"
    either = term.weight_level == "none" and (term.placement == "reward" or term.estimator == "exact")
    weight = "none or token" if either else term.weight_level
    estimator = "exact forward" if term.direction == "forward" else term.estimator
    return f"{estimator} in {term.placement}{credit}, weight {weight}"


BOUNDED = {
    "exact in both, prefix": KLTerm("exact", "both", weight_level="prefix"),
    "k1 in reward, prefix": KLTerm("k1", "reward", weight_level="prefix"),
    "k3 in loss, token": KLTerm("k3", "loss"),
}
BOUNDS: dict[str, dict[str, Any]] = {
    "none": {},
    "`kl_is_cap: 2`": {"weight_cap": 2.0},
    "`kl_is_cap: 1.5`": {"weight_cap": 1.5},
    "`kl_is_cap: 1.2`": {"weight_cap": 1.2},
    "`kl_is_cap: 1`": {"weight_cap": 1.0},
    "`kl_is_cap: 2`, `kl_is_mode: mask`": {"weight_cap": 2.0, "weight_mode": "mask"},
    "`kl_is_cap: 1.5`, `kl_is_mode: mask`": {"weight_cap": 1.5, "weight_mode": "mask"},
    "`kl_is_answer_cap: 1.5`": {"answer_cap": 1.5},
    "`kl_is_answer_cap: 1.2`": {"answer_cap": 1.2},
    "`kl_is_veto: 0.5`": {"veto": 0.5},
}


def bounds_table() -> list[str]:
    """Rows of Markdown: error and variance of every bound at every staleness."""
    lines = []
    for (name, term), (bound, settings) in itertools.product(BOUNDED.items(), BOUNDS.items()):
        found = [stale(replace(term, **settings), behind) for behind in BEHIND]
        cells = [f"{100 * one.error:.0f} %, {one.variance:.2f}" for one in found]
        lines.append(f"| {name} | {bound} | {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("term", accepted_terms(), ids=lambda t: f"{label(t)}-{t.direction}")
def test_off_policy_gradient_is_what_the_table_says(world: World, term: KLTerm) -> None:
    wanted, found = targets(world), off_policy_gradient(world, term)
    name = target_of(term)
    if name is not None:
        assert relative_error(found, wanted[name], wanted["P"]) < TOLERANCE
    else:
        for other in ("KLseq", "P", "P_mu", "F", "F_mu"):
            assert relative_error(found, wanted[other], wanted["P"]) > 1e-2, other


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("term", [t for t in accepted_terms() if t.reward_at_update], ids=label)
def test_a_baseline_of_the_position_biases_nothing(world: World, term: KLTerm) -> None:
    without = off_policy_gradient(world, term)
    baseline = torch.tensor([0.7, -0.3, 1.9], dtype=torch.float64).expand_as(world.mask_NT)
    torch.testing.assert_close(off_policy_gradient(world, term, baseline), without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("term", [KLTerm("k1", "reward"), KLTerm("exact", "both"), KLTerm("k3", "both")], ids=label)
def test_the_other_answers_mean_biases_nothing(term: KLTerm) -> None:
    """All pairs of two answers of the sampler, of one to three tokens, each with the other's credit as its baseline."""
    world, term = WORLDS[1], replace(term, weight_level="prefix")
    probs_N, mask = world.sequence_probs(world.sampler_logps()), world.mask_NT
    credit = term.credit(world.policy_logps(), world.ref_logps(), mask, exact=exact_values(world))
    first, second = torch.cartesian_prod(torch.arange(len(mask)), torch.arange(len(mask))).T
    pairs = torch.stack([first, second], dim=1).flatten()
    baseline = leave_one_out_baseline(credit[pairs], mask[pairs], 2)
    columns = (world.policy_logps(), world.ref_logps(), mask, world.sampler_logps(), exact_values(world))

    def charged(rows: Tensor, baseline: Tensor | None) -> Tensor:
        logps, ref_logps, counted, sampler_logps, exact = (column[rows] for column in columns)
        given = {"sampler_logps": sampler_logps, "exact": exact, "baseline": baseline}
        return term.credit_loss(logps, ref_logps, counted, **given).sum(-1)

    with_others = charged(pairs, baseline).view(-1, 2).mean(-1)
    found = world.gradient((probs_N[first] * probs_N[second] * with_others).sum())
    wanted = world.gradient((probs_N * charged(torch.arange(len(mask)), None)).sum())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert baseline.abs().max() > 1e-3


@pytest.mark.parametrize("term", [t for t in accepted_terms() if t.reward_at_update], ids=label)
def test_on_policy_the_credit_made_at_the_update_is_the_rollouts(term: KLTerm) -> None:
    """All weights are 1."""
    for world in WORLDS:
        logps, ref_logps, mask = world.policy_logps(), world.ref_logps(), world.mask_NT
        exact = exact_values(world)
        slope = torch.autograd.grad(term.credit_loss(logps, ref_logps, mask, exact=exact).sum(), logps)[0]
        torch.testing.assert_close(slope, term.credit(logps, ref_logps, mask, exact=exact), rtol=1e-12, atol=1e-14)


def brute_force(values: Tensor, weights: Tensor, credit: str) -> Tensor:
    """(T,) w_t c_t of one answer as the docstring of `kl_credit` writes c_t, in Python's own loops."""
    k, w, length = values.tolist(), weights.tolist(), len(values)

    def product(start: int, end: int) -> float:
        """Of the tokens start to end, without end."""
        return math.prod(w[start:end])

    def entry(t: int) -> float:
        return {
            "return_to_go": lambda: sum(product(t + 1, s + 1) * k[s] for s in range(t, length)),
            "future": lambda: sum(product(t + 1, s) * k[s] for s in range(t + 1, length)),
            "immediate": lambda: k[t],
            "sequence": lambda: product(t + 1, length) * sum(k),
        }[credit]()

    return torch.tensor([w[t] * product(0, t) * entry(t) for t in range(length)], dtype=torch.float64)


CREDITS = ("return_to_go", "future", "immediate", "sequence")


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("zero", [None, 2], ids=["", "one weight is 0"])
def test_credit_with_weights_is_the_double_sum(credit: Any, zero: int | None) -> None:
    """Also with masked tokens in between, whose values and weights are anything."""
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(6, generator=generator).double(), torch.rand(6, generator=generator).double() * 2
    if zero is not None:
        weights[zero] = 0.0
    mask = torch.tensor([True, True, False, True, True, False, True, True])
    spread = [torch.full((8,), torch.nan, dtype=torch.float64) for _ in range(2)]
    for column, given in zip(spread, (values, weights), strict=True):
        column[mask] = given
    found = kl_credit(spread[0][None], mask[None], credit=credit, weights=spread[1][None])[0]
    assert not found[~mask].any()
    torch.testing.assert_close(weights * found[mask], brute_force(values, weights, credit), rtol=1e-12, atol=1e-14)
    # Weights of 1 are none.
    ones = torch.ones_like(values)[None]
    plain = kl_credit(values[None], ones, credit=credit)
    torch.testing.assert_close(kl_credit(values[None], ones, credit=credit, weights=ones), plain)


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_the_credit_in_a_surrogate_of_ones_own(world: World) -> None:
    """`kl_credit` without `KLTerm`: w_t c_t g_t with k1, and with an exact KL whose own token is W_{<t} grad D_t."""
    logps, sampler_logps, mask = world.policy_logps(), world.sampler_logps(), world.mask_NT
    probs_N, ratio = world.sequence_probs(sampler_logps), importance_weights(logps, sampler_logps, mask)
    k1 = kl_estimate(logps.detach(), world.ref_logps(), "k1")
    surrogate = ratio * kl_credit(k1, mask, weights=ratio) * logps * mask
    found = world.gradient((probs_N[:, None] * surrogate).sum())
    assert relative_error(found, targets(world)["KLseq"], found) < TOLERANCE
    exact = exact_values(world)
    before = weight_products(ratio, mask, level="prefix", before=True)
    surrogate = before * exact + ratio * kl_credit(exact, mask, credit="future", weights=ratio) * logps
    found = world.gradient((probs_N[:, None] * surrogate * mask).sum())
    assert relative_error(found, targets(world)["KLseq"], found) < TOLERANCE


CAPPED = [(1.5, 0.0), (1.2, 2.2), (1.0, 9.0)]  # bias in percent of KLseq, exact in both, of the fixture


@pytest.mark.parametrize(("cap", "percent"), CAPPED)
def test_what_a_cap_costs_on_the_fixture(cap: float, percent: float) -> None:
    world, term = fixture_world(), KLTerm("exact", "both", weight_level="prefix", weight_cap=cap)
    wanted = targets(world)["KLseq"]
    assert 100 * relative_error(off_policy_gradient(world, term), wanted, wanted) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("term", BOUNDED.values(), ids=label)
def test_bounds_that_nothing_reaches_change_nothing(term: KLTerm) -> None:
    for world in WORLDS:
        without = off_policy_gradient(world, term)
        for bound in (
            {"weight_cap": 1e6},
            {"weight_cap": 1e6, "weight_mode": "mask"},
            {"answer_cap": 1e6, "veto": 1e-9},
        ):
            torch.testing.assert_close(off_policy_gradient(world, replace(term, **bound)), without, rtol=0, atol=0)


@pytest.mark.parametrize("term", [t for t in BOUNDED.values() if t.reward_at_update], ids=label)
def test_truncation_trades_variance_for_bias(term: KLTerm) -> None:
    """On both sides, step by step, at every staleness."""
    for behind in BEHIND:
        found = [stale(replace(term, weight_cap=cap), behind) for cap in (None, 2.0, 1.5, 1.2, 1.0)]
        for tighter, wider in itertools.pairwise(reversed(found)):
            assert tighter.error >= wider.error - 1e-12
            assert tighter.variance <= wider.variance + 1e-12
        assert found[-1].error > found[0].error + 0.02
        assert found[-1].variance < 0.95 * found[0].variance


@pytest.mark.parametrize("bound", [{"answer_cap": 1.1}, {"veto": 0.7}], ids=str)
@pytest.mark.parametrize("term", BOUNDED.values(), ids=label)
def test_what_is_left_out_is_whole_answers(term: KLTerm, bound: dict[str, float]) -> None:
    """The rest counts as if the others had not been sampled."""
    world, term = WORLDS[1], replace(term, **bound)
    logps, sampler_logps, mask = world.policy_logps().detach(), world.sampler_logps(), world.mask_NT
    log_ratios = ((logps - sampler_logps) * mask).double()
    mean = log_ratios.sum(-1) / mask.sum(-1)
    kept = mean.abs() <= math.log(1.1) if "answer_cap" in bound else (log_ratios >= math.log(0.7)).all(-1)
    assert 0 < int(kept.sum()) < len(kept)
    ratios = importance_weights(logps, sampler_logps, mask)
    settings = {"geometric_cap": bound.get("answer_cap"), "veto": bound.get("veto")}
    assert torch.equal(answers_kept(ratios, mask, **settings)[:, 0], kept)
    given = {"sampler_logps": sampler_logps, "exact": exact_values(world).detach()}
    without = replace(term, answer_cap=None, veto=None)
    for loss in ("loss", "credit_loss"):
        if loss == "loss" or term.reward_at_update:
            found, whole = (getattr(one, loss)(logps, world.ref_logps(), mask, **given) for one in (term, without))
            assert not found[~kept].any()
            torch.testing.assert_close(found[kept], whole[kept], rtol=0, atol=0)


@pytest.mark.parametrize("level", AT_UPDATE)
@pytest.mark.parametrize("ratio", [1.3, 0.7, 1.0001])
def test_long_answers_stay_finite_in_float32(level: Any, ratio: float) -> None:
    """4000 tokens: products of up to 1e455 and down to 1e-619."""
    length = 4000
    logps = torch.full((1, length), math.log(ratio) - 3.0, requires_grad=True)
    sampler_logps, ref_logps = torch.full((1, length), -3.0), torch.full((1, length), -3.1)
    mask = torch.ones(1, length)
    for term in (KLTerm("k1", "reward", weight_level=level), KLTerm("k3", "both", weight_level=level)):
        charged = term.credit_loss(logps, ref_logps, mask, sampler_logps=sampler_logps)
        charged = charged + term.loss(logps, ref_logps, mask, sampler_logps=sampler_logps)
        (slope,) = torch.autograd.grad(charged.sum(), logps)
        assert charged.isfinite().all() and slope.isfinite().all()
    if ratio < 1.01:  # nothing is near a bound: float64 agrees
        weights, values = torch.full((1, length), ratio), torch.full((1, length), 0.1)
        found = kl_credit(values, mask, weights=weights)
        wanted = kl_credit(values.double(), mask, weights=weights.double())
        torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=1e-30)


def test_what_the_policy_never_does_is_not_charged() -> None:
    """A token of weight 0 under a reference that never gives it: its KL is infinite, and counts nothing."""
    logps = torch.tensor([[-1.0, -torch.inf, -1.0]], requires_grad=True)
    ref_logps, sampler_logps = torch.tensor([[-1.5, -torch.inf, -1.0]]), torch.full((1, 3), -1.0)
    for term in (KLTerm("k1", "reward", weight_level="prefix"), KLTerm("k3", "both", weight_level="prefix")):
        charged = term.credit_loss(logps, ref_logps, torch.ones(1, 3), sampler_logps=sampler_logps)
        assert charged.isfinite().all()
