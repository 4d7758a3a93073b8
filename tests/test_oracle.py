"""Every configuration's expected gradient, enumerated exactly and compared with the target that theory names.

`python tests/test_oracle.py` prints the tables that docs/gradients.md keeps, `test_oracle_off_policy`'s included.
"""

import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
from support.enumeration import (
    World,
    all_worlds,
    exact_token_kl,
    expected_token_kl,
    fixture_world,
    relative_error,
    targets,
)
from torch import Tensor

from trl_klx.kl import KLTerm, exact_kl, importance_weights, kl_credit, kl_estimate, kl_loss
from trl_klx.kl.gradients import SOUND

pytestmark = pytest.mark.usefixtures("device")

TOLERANCE = 1e-9
ESTIMATORS = ("k1", "k2", "k3", "exact")
WORLDS = all_worlds()


def exact_values(world: World, direction: str = "reverse") -> Tensor:
    """(N, T) exact KL of the state before each token, through the package."""
    kl_S = exact_kl(world.policy_logits(world.theta), world.ref_logits, direction)
    return kl_S[world.states_NT]


def term_gradient(world: World, term: KLTerm) -> Tensor:
    """Expected gradient on the policy's own answers: the loss's, and the reward's by the score function."""
    logps, ref_logps = world.policy_logps(), world.ref_logps()
    probs_N = world.sequence_probs(logps.detach())
    exact = exact_values(world, term.direction) if term.estimator == "exact" else None
    objective = torch.zeros((), dtype=torch.float64)
    if term.in_loss:
        loss = term.loss(logps, ref_logps, world.mask_NT, exact=exact)
        objective = objective + (probs_N[:, None] * loss).sum()
    if term.in_reward:
        credit = term.credit(logps, ref_logps, world.mask_NT, exact=exact)
        objective = objective + (probs_N[:, None] * credit * logps * world.mask_NT).sum()
    return world.gradient(objective)


def combination(world_targets: dict[str, Tensor], term: KLTerm) -> Tensor:
    """The target as the package's own table states it: coefficients of P, M and F."""
    found = term.gradient
    return found.partial * world_targets["P"] + found.prefix * world_targets["M"] + found.forward * world_targets["F"]


def all_terms() -> list[KLTerm]:
    """Every estimator x placement x credit x weight."""
    terms = []
    for estimator, placement in itertools.product(ESTIMATORS, ("loss", "reward", "both")):
        credits = ("return_to_go",) if placement == "loss" else ("return_to_go", "immediate", "sequence")
        levels = ("none",) if placement == "reward" else ("none", "token", "prefix", "sequence")
        terms += [KLTerm(estimator, placement, c, w) for c, w in itertools.product(credits, levels)]
    return terms


def label(term: KLTerm) -> str:
    return f"{term.estimator}-{term.placement}-{term.reward_credit}-{term.weight_level}"


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("term", all_terms(), ids=label)
def test_on_policy_gradient_is_what_the_table_says(world: World, term: KLTerm) -> None:
    wanted = targets(world)
    found = term_gradient(world, term)
    if term.gradient.known:
        assert relative_error(found, combination(wanted, term), wanted["P"]) < TOLERANCE
    else:  # shown to be what the refusal says: none of the gradients a KL can have
        for name in ("KLseq", "P", "F", "M"):
            assert relative_error(found, wanted[name], wanted["P"]) > 1e-3, name


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_unweighted_k1_loss_off_policy_never_sees_the_reference(world: World) -> None:
    logps = world.policy_logps()
    probs_N = world.sequence_probs(world.sampler_logps())

    def gradient(ref_logps: Tensor) -> Tensor:
        return world.gradient((probs_N[:, None] * kl_loss(logps, ref_logps, estimator="k1") * world.mask_NT).sum())

    here, elsewhere = gradient(world.ref_logps()), gradient(world.sampler_logps())
    torch.testing.assert_close(here, elsewhere, rtol=0, atol=1e-12)
    assert here.norm() > 1e-3
    # It is minus the gradient of KL(mu || pi), states of mu: training pushes the policy away from the sampler.
    sampler_to_policy_S = exact_token_kl(world.sampler_logits, world.policy_logits(world.theta))
    pull = world.gradient(expected_token_kl(world, probs_N.detach(), sampler_to_policy_S))
    torch.testing.assert_close(here, -pull, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_off_policy_a_credit_without_weights_needs_the_whole_answers(world: World) -> None:
    """As TRL's sequence ratio is, with an engine. `test_oracle_off_policy` has the credits with weights."""
    wanted = targets(world)
    logps, mask = world.policy_logps(), world.mask_NT
    probs_N = world.sequence_probs(world.sampler_logps())
    values = kl_estimate(logps.detach(), world.ref_logps(), "k1")
    credit = kl_credit(values, mask, credit="return_to_go")

    def gradient(level: str) -> Tensor:
        weights = importance_weights(logps, world.sampler_logps(), mask, level=level)
        return world.gradient((probs_N[:, None] * weights * credit * logps * mask).sum())

    assert relative_error(gradient("sequence"), wanted["KLseq"], wanted["P"]) < TOLERANCE
    assert relative_error(gradient("token"), wanted["KLseq"], wanted["P"]) > 2e-2


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_stale_reward_is_klseq_minus_the_pull_away_from_the_sampler(world: World) -> None:
    """log mu - log ref as the penalty, policy gradient exact: KLseq(pi || ref) - grad KL(pi || mu)."""
    wanted = targets(world)
    logps, mask = world.policy_logps(), world.mask_NT
    stale = kl_credit(world.sampler_logps() - world.ref_logps(), mask, credit="return_to_go")
    probs_N = world.sequence_probs(logps.detach())
    found = world.gradient((probs_N[:, None] * stale * logps * mask).sum())
    policy = world.policy_logits(world.theta)
    to_sampler = exact_token_kl(policy, world.sampler_logits)[world.states_NT]
    kl_to_sampler = world.gradient((world.sequence_probs(logps)[:, None] * to_sampler * mask).sum())
    assert relative_error(found, wanted["KLseq"] - kl_to_sampler, wanted["P"]) < TOLERANCE


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_forward_direction(world: World) -> None:
    """exact, forward: F in the loss; in both, the gradient of the forward KL along the policy's own states."""
    wanted = targets(world)
    loss = term_gradient(world, KLTerm("exact", "loss", direction="forward"))
    both = term_gradient(world, KLTerm("exact", "both", direction="forward"))
    assert relative_error(loss, wanted["F"], wanted["P"]) < TOLERANCE
    assert relative_error(both, wanted["forward KLseq"], wanted["P"]) < TOLERANCE


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_geometric_weight_is_no_kl_gradient(world: World) -> None:
    """Why GSPO's weight is refused: on-policy, the geometric-mean ratio in the graph gives (1 - 1/T) F + KLseq / T."""
    if not bool(world.mask_NT.all()):
        world = fixture_world()  # the closed form needs one length for all sequences
    wanted = targets(world)
    logps = world.policy_logps()
    length = world.mask_NT.size(1)
    geometric = (logps - logps.detach()).mean(-1, keepdim=True).exp()
    values = geometric * kl_estimate(logps, world.ref_logps(), "k3")
    probs_N = world.sequence_probs(logps.detach())
    found = world.gradient((probs_N[:, None] * values).sum())
    mixture = (1 - 1 / length) * wanted["F"] + wanted["KLseq"] / length
    assert relative_error(found, mixture, wanted["P"]) < TOLERANCE


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("term", [KLTerm("k1", "reward", weight_level="none"), KLTerm("exact", "both")], ids=label)
def test_sequence_level_ratio_bends_a_kl_in_the_reward(world: World, term: KLTerm) -> None:
    """Why importance_sampling_level "sequence" is refused there: it hands each token its answer's mean credit."""
    wanted = targets(world)["KLseq"] if term.placement == "reward" else targets(world)["M"]
    logps, mask = world.policy_logps(), world.mask_NT
    probs_N = world.sequence_probs(logps.detach())
    exact = exact_values(world) if term.estimator == "exact" else None
    credit = term.credit(logps, world.ref_logps(), mask, exact=exact)

    def residual(score: Tensor) -> float:
        found = world.gradient((probs_N[:, None] * credit * score * mask).sum())
        return float((found - wanted * (found @ wanted) / (wanted @ wanted)).norm() / found.norm())

    geometric = ((logps * mask).sum(-1) / mask.sum(-1))[:, None].expand_as(logps)  # gradient of the ratio at 1
    assert residual(logps) < TOLERANCE
    assert residual(geometric) > 0.03


def test_per_sequence_mean_changes_the_direction() -> None:
    """Dividing each response's KL by its length (loss_type "grpo") leaves no multiple of P; a common divisor does."""
    world = all_worlds()[1]
    logps = world.policy_logps()
    probs_N = world.sequence_probs(logps.detach())
    loss = KLTerm("k2", "loss").loss(logps, world.ref_logps(), world.mask_NT)
    per_sequence = world.gradient((probs_N * loss.sum(-1) / world.mask_NT.sum(-1)).sum())
    partial = targets(world)["P"]
    residual = per_sequence - partial * (per_sequence @ partial) / (partial @ partial)
    assert residual.norm() / per_sequence.norm() > 0.05


FIXTURE_NORMS = {
    "KLseq": 0.13714390777,
    "P": 0.131985838573,
    "P_mu": 0.128433354459,
    "F": 0.124792982888,
    "F_mu": 0.120930899573,
    "M": 0.0157109767046,
}


def test_fixture_numbers() -> None:
    world = fixture_world()
    found = targets(world)
    for name, norm in FIXTURE_NORMS.items():
        assert float(found[name].norm()) == pytest.approx(norm, rel=1e-9)
    assert float((found["P"] - found["F"]).norm()) == pytest.approx(0.0179158300154, rel=1e-9)
    assert float((found["KLseq"] - found["F"]).norm()) == pytest.approx(0.0210373338282, rel=1e-9)


@pytest.mark.parametrize(
    ("left", "right", "value"),
    [
        ("policy", "ref", 0.102248067745946),
        ("ref", "policy", 0.097522649146339),
        ("sampler", "ref", 0.16945720594589),
        ("policy", "sampler", 0.050723410786603),
    ],
)
def test_fixture_sequence_kl(left: str, right: str, value: float) -> None:
    """Sequence KL by k1 over all sequences and by exact token KL along the sampler's states agree with the number."""
    world = fixture_world()
    tables = {"policy": world.theta.detach(), "ref": world.ref_logits, "sampler": world.sampler_logits}
    left_logps, right_logps = world.token_logps(tables[left]), world.token_logps(tables[right])
    probs_N = world.sequence_probs(left_logps)
    by_k1 = (probs_N[:, None] * kl_estimate(left_logps, right_logps, "k1")).sum()
    by_exact = (probs_N[:, None] * exact_kl(tables[left], tables[right])[world.states_NT]).sum()
    assert float(by_k1) == pytest.approx(value, rel=1e-12)
    assert float(by_exact) == pytest.approx(value, rel=1e-12)


FIXTURE_VARIANCES = [
    (KLTerm("k2", "loss", weight_level="none"), 0.16369915),
    (KLTerm("exact", "loss"), 0.030974659),
    (KLTerm("k1", "reward", weight_level="none"), 0.32278771),
    (KLTerm("k1", "reward", "sequence", weight_level="none"), 0.48856273),
    (KLTerm("exact", "both"), 0.035038787),
]


@pytest.mark.parametrize(("term", "variance"), FIXTURE_VARIANCES, ids=[label(t) for t, _ in FIXTURE_VARIANCES])
def test_fixture_variance_of_one_sample(term: KLTerm, variance: float) -> None:
    """Trace of the covariance of one sequence's gradient, enumerated."""
    world = fixture_world()
    probs_N = world.sequence_probs(world.policy_logps()).detach()
    samples = torch.stack([one_sample_gradient(world, term, n) for n in range(len(probs_N))])
    mean = (probs_N[:, None] * samples).sum(0)
    found = (probs_N * (samples - mean).square().sum(-1)).sum()
    assert float(found.detach()) == pytest.approx(variance, rel=1e-7)


def test_fixture_variance_of_the_ratio_in_the_graph() -> None:
    """Why the weighted loss is no autograd through ratio * k1: the same expectation, P, at 15 times the variance."""
    world = fixture_world()
    probs_N = world.sequence_probs(world.policy_logps()).detach()

    def one_sample(n: int) -> Tensor:
        logps = world.policy_logps()[n]
        return world.gradient(((logps - logps.detach()).exp() * (logps - world.ref_logps()[n])).sum())

    samples = torch.stack([one_sample(n) for n in range(len(probs_N))])
    mean = (probs_N[:, None] * samples).sum(0)
    assert relative_error(mean, targets(world)["P"], mean) < TOLERANCE
    assert float((probs_N * (samples - mean).square().sum(-1)).sum()) == pytest.approx(2.5435282, rel=1e-7)


BANDIT_REF = torch.tensor([0.35, 0.25, 0.20, 0.15, 0.05], dtype=torch.float64)
BANDIT_REWARD = torch.tensor([0.0, 1.0, 0.5, -1.0, 2.0], dtype=torch.float64)
BANDIT_FIXED_POINTS = [  # configuration, where exact ascent on E[r] - penalty (beta 1) ends, E[r] - KL there
    (KLTerm("k2", "loss", weight_level="none"), (0.196194, 0.380936, 0.184839, 0.030932, 0.207098), 0.578830),
    (KLTerm("k3", "loss"), (0.196194, 0.380936, 0.184839, 0.030932, 0.207098), 0.578830),
    (KLTerm("exact", "both"), (0.196194, 0.380936, 0.184839, 0.030932, 0.207098), 0.578830),
    (KLTerm("k1", "reward", weight_level="none"), (0.196194, 0.380936, 0.184839, 0.030932, 0.207098), 0.578830),
    (KLTerm("k3", "loss", weight_level="none"), (0.165551, 0.224385, 0.123904, 0.048167, 0.437994), 0.425870),
]


@pytest.mark.parametrize(
    ("term", "policy", "objective"), BANDIT_FIXED_POINTS, ids=[label(t[0]) for t in BANDIT_FIXED_POINTS]
)
def test_bandit_fixed_points(term: KLTerm, policy: tuple[float, ...], objective: float) -> None:
    """One token, five actions: exact ascent ends at ref * exp(r) / Z, and with the literal k3 at a point of its own."""
    theta = BANDIT_REF.log().clone().requires_grad_()
    mask = torch.ones(5, 1)
    for _ in range(4000):
        logps = theta.log_softmax(-1)
        exact = exact_kl(theta, BANDIT_REF.log()).expand(5, 1)
        columns = (logps[:, None], BANDIT_REF.log()[:, None], mask)
        score = BANDIT_REWARD - (term.credit(*columns, exact=exact)[:, 0] if term.in_reward else 0.0)
        penalty = term.loss(*columns, exact=exact)[:, 0] if term.in_loss else torch.zeros(5)
        ascent = (logps.detach().exp() * (score.detach() * logps - penalty)).sum()
        (grad,) = torch.autograd.grad(ascent, theta)
        theta = (theta + 0.5 * grad).detach().requires_grad_()
    probs = theta.softmax(-1)
    torch.testing.assert_close(probs, torch.tensor(policy, dtype=torch.float64), rtol=0, atol=2e-6)
    found = (probs * BANDIT_REWARD).sum() - exact_kl(theta, BANDIT_REF.log())
    assert float(found.detach()) == pytest.approx(objective, abs=2e-6)


def one_sample_gradient(world: World, term: KLTerm, n: int) -> Tensor:
    logps, ref_logps = world.policy_logps()[n : n + 1], world.ref_logps()[n : n + 1]
    mask = world.mask_NT[n : n + 1]
    exact = exact_values(world)[n : n + 1] if term.estimator == "exact" else None
    objective = torch.zeros((), dtype=torch.float64)
    if term.in_loss:
        objective = objective + term.loss(logps, ref_logps, mask, exact=exact).sum()
    if term.in_reward:
        objective = objective + (term.credit(logps, ref_logps, mask, exact=exact) * logps).sum()
    return world.gradient(objective)


def test_table_accepts_only_gradients_of_a_kl() -> None:
    """What is sound by the table is exactly P, KLseq or F; the flagship and its sampled twin have the whole KLseq."""
    for term in all_terms():
        if term.gradient in SOUND:
            assert term.gradient.name in ("P", "KLseq", "F"), label(term)
    assert KLTerm("exact", "both").gradient.name == "KLseq"
    assert KLTerm("k3", "both").gradient.name == KLTerm("k3", "both", weight_level="none").gradient.name == "KLseq"
    assert KLTerm("k1", "loss", weight_level="none").gradient.name == "0"


@dataclass
class Row:
    configuration: str
    target: str
    error: float
    accepted: bool


def oracle_table() -> list[Row]:
    rows = []
    for term in all_terms():
        errors = []
        for world in WORLDS:
            wanted = targets(world)
            found = term_gradient(world, term)
            if term.gradient.known:
                errors.append(relative_error(found, combination(wanted, term), wanted["P"]))
            else:
                errors.append(relative_error(found, wanted["KLseq"], wanted["P"]))
        credit = "" if term.placement == "loss" else f", credit {term.reward_credit}"
        weight = "" if term.placement == "reward" else f", weight {term.weight_level}"
        name = f"{term.estimator} in {term.placement}{credit}{weight}"
        rows.append(Row(name, term.gradient.name, max(errors), term.gradient in SOUND))
    return rows


if __name__ == "__main__":
    from test_oracle_off_policy import bounds_table, off_policy_table

    print("| configuration | expected gradient (on-policy) | largest relative error, three worlds | accepted |")
    print("|---|---|---|---|")
    for row in oracle_table():
        error = f"{row.error:.1e}" if row.target != "biased" else f"{row.error:.2f} away from KLseq"
        print(f"| {row.configuration} | {row.target} | {error} | {'yes' if row.accepted else 'refused'} |")
    print("\n| configuration | expected gradient (off-policy) | largest relative error | away from on-policy |")
    print("|---|---|---|---|")
    for one in off_policy_table():
        error = "" if one.target == "biased" else f"{one.error:.1e}"
        print(f"| {one.configuration} | {one.target} | {error} | {100 * one.away:.0f} % |")
    print("\n| configuration | bound | 0.01 | 0.10 | 0.40 |")
    print("|---|---|---|---|---|")
    print("\n".join(bounds_table()))
    sys.exit(0)
