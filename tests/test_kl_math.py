"""The maths file by file: identities, numbers, limits, masks, dtypes and extreme log-probs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device import DEVICE
from torch import Tensor

from trl_klx.kl import (
    KLTerm,
    chunked_exact_kl,
    chunked_exact_kl_from_logits,
    effective_sample_size,
    exact_kl,
    float32_linear,
    importance_weights,
    kl_credit,
    kl_estimate,
    kl_loss,
    last_token_index,
    leave_one_out_baseline,
    masked_mean,
    masked_sum,
)
from trl_klx.kl.chunked import torch_rows
from trl_klx.kl.chunked.checks import default_chunk_size
from trl_klx.kl.chunked.rows import Rows, Statistics, Upstream
from trl_klx.kl.logits import LogitTransform

pytestmark = pytest.mark.usefixtures("device")

ESTIMATORS = ("k1", "k2", "k3")


def random_logps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logps = -torch.rand(*shape, generator=generator, dtype=torch.float64) * 5
    return logps.to(dtype), (logps + torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


# --- estimators ------------------------------------------------------------------------------------------------------

GAUSSIAN = {  # standard deviation over true value, and the relative size of k2, by shift mu
    0.1: {"k1": 20, "k2": 1.417745, "k3": 1.416575},
    0.5: {"k1": 4, "k2": 1.5, "k3": 1.475678},
    1.0: {"k1": 2, "k2": 1.732051, "k3": 1.695030},
    2.0: {"k1": 1, "k2": 2.449490, "k3": 3.521298},
}


@pytest.mark.parametrize("mu", GAUSSIAN)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments_on_a_gaussian(mu: float, estimator: str) -> None:
    """Samples from q = N(0, 1) against p = N(mu, 1), KL(q || p) = mu^2 / 2, integrated on a fine grid."""
    x = torch.linspace(-14, 14, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    values = kl_estimate(-x.square() / 2, -(x - mu).square() / 2, estimator)
    mean = (density * values).sum()
    deviation = (density * (values - mean).square()).sum().sqrt()
    true = mu * mu / 2
    assert float(mean / true) == pytest.approx(1 + mu * mu / 4 if estimator == "k2" else 1, rel=1e-9)
    assert float(deviation / true) == pytest.approx(GAUSSIAN[mu][estimator], rel=1e-6)


def test_k3_is_noisier_than_k1_from_0_628_nats_on() -> None:
    def deviations(kl: float) -> tuple[float, float]:
        mu = math.sqrt(2 * kl)
        return 2 / mu, 2 * math.sqrt(math.exp(mu * mu) - 1 - mu * mu) / mu**2

    below, above = deviations(0.628), deviations(0.6285)
    assert below[1] < below[0]
    assert above[1] > above[0]


@pytest.mark.parametrize("ratio", [1e-4, 1e-6, -1e-5])
def test_small_k3_keeps_its_digits(ratio: float) -> None:
    """exp(-l) - 1 + l is 0 in float32 at l = 1e-4; the true value is l^2 / 2 - l^3 / 6."""
    value = kl_estimate(torch.tensor([ratio], dtype=torch.float32), torch.zeros(1), "k3")
    assert float(value) == pytest.approx(ratio**2 / 2 - ratio**3 / 6, rel=2e-2 if abs(ratio) > 1e-5 else 1.0)
    naive = torch.exp(torch.tensor(-1e-4)) - 1 + torch.tensor(1e-4)
    assert float(naive) != pytest.approx(5e-9, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dtypes(dtype: torch.dtype, estimator: str) -> None:
    logps, ref_logps = random_logps(4, 5, dtype=dtype)
    value = kl_estimate(logps, ref_logps, estimator)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        value.double(), kl_estimate(logps.double(), ref_logps.double(), estimator), rtol=1e-5, atol=1e-6
    )


EXTREMES = [0.0, -1e-8, -0.5, -20.0, -89.0, -200.0, -1e4, -1e30, -math.inf]


@pytest.mark.parametrize("policy", EXTREMES)
@pytest.mark.parametrize("reference", EXTREMES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_log_probs(policy: float, reference: float, estimator: str) -> None:
    """Never NaN, in value or gradient; k2 and k3 never negative; +inf exactly where the reference rules a token out."""
    logps = torch.tensor([policy], requires_grad=True)
    ref_logps = torch.tensor([reference])
    value = kl_estimate(logps, ref_logps, estimator)
    assert not value.isnan().any()
    if estimator != "k1":
        assert float(value.detach()) >= 0
    if reference == -math.inf and policy > -math.inf:
        assert float(value.detach()) == math.inf
    if policy == -math.inf and reference > -math.inf:
        assert float(value.detach()) == (-math.inf if estimator == "k1" else math.inf)
    if policy == reference:
        assert float(value.detach()) == 0
    for weights in (None, torch.tensor([1.0])):
        loss = kl_loss(logps, ref_logps, estimator=estimator, weights=weights)
        (grad,) = torch.autograd.grad(loss.sum(), logps)
        assert not grad.isnan().any()
        if (policy == -math.inf) != (reference == -math.inf):
            assert (grad == 0).all()  # an infinite log-ratio is reported, and moves nothing


@given(st.lists(st.tuples(st.floats(-80, 0), st.floats(-80, 0)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_properties_of_any_log_probs(pairs: list[tuple[float, float]]) -> None:
    logps = torch.tensor([a for a, _ in pairs], dtype=torch.float64)
    ref_logps = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    k1, k2, k3 = (kl_estimate(logps, ref_logps, name) for name in ESTIMATORS)
    assert (k3 >= 0).all()
    assert (k2 >= 0).all()
    torch.testing.assert_close(k1, -kl_estimate(ref_logps, logps, "k1"), rtol=0, atol=0)
    torch.testing.assert_close(k3 + kl_estimate(ref_logps, logps, "k3"), torch.expm1(-k1) + torch.expm1(k1))


def test_unknown_estimator_and_shapes() -> None:
    with pytest.raises(ValueError, match="estimator='k4' is not one of k1, k2, k3"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logps has shape \(2,\) and ref_logps \(3,\)"):
        kl_estimate(torch.zeros(2), torch.zeros(3))


# --- loss ------------------------------------------------------------------------------------------------------------


def gradient(loss: Tensor, logps: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logps, retain_graph=True)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unweighted_loss_is_literal_autograd(estimator: str) -> None:
    logps, ref_logps = random_logps(3, 4)
    logps.requires_grad_()
    literal, ours = kl_estimate(logps, ref_logps, estimator), kl_loss(logps, ref_logps, estimator=estimator)
    torch.testing.assert_close(ours, literal)
    torch.testing.assert_close(gradient(ours, logps), gradient(literal, logps), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weighted_gradient_is_w_l_g(estimator: str) -> None:
    """grad(w k3) = sg(w) grad(k2) = w l g, per sample; the value is w times the chosen estimator."""
    logps, ref_logps = random_logps(3, 4)
    sampler_logps = random_logps(3, 4, seed=1)[1]
    logps.requires_grad_()
    ratio = (logps - sampler_logps).exp()
    loss = kl_loss(logps, ref_logps, estimator=estimator, weights=ratio.detach())
    torch.testing.assert_close(loss, ratio.detach() * kl_estimate(logps, ref_logps, estimator))
    wanted = ratio.detach() * (logps - ref_logps).detach()
    torch.testing.assert_close(gradient(loss, logps), wanted, rtol=1e-12, atol=1e-14)
    in_graph = ratio * kl_estimate(logps, ref_logps, "k3")  # DeepSeek-V3.2, TRL's use_bias_correction_kl
    torch.testing.assert_close(gradient(in_graph, logps), wanted, rtol=1e-12, atol=1e-14)
    detached = ratio.detach() * kl_estimate(logps, ref_logps, "k2")
    torch.testing.assert_close(gradient(detached, logps), wanted, rtol=1e-12, atol=1e-14)


def test_k2_loss_is_k1_reward_immediate_and_squared_sum_is_whole_sequence() -> None:
    logps, ref_logps = random_logps(3, 4)
    logps.requires_grad_()
    mask = torch.ones(3, 4)
    immediate = KLTerm("k1", "reward", "immediate", "none").credit(logps, ref_logps, mask)
    whole = KLTerm("k1", "reward", "sequence", "none").credit(logps, ref_logps, mask)
    torch.testing.assert_close(
        gradient(kl_loss(logps, ref_logps, estimator="k2"), logps), gradient(immediate * logps, logps)
    )
    squared_sum = (logps - ref_logps).sum(-1).square() / 2
    torch.testing.assert_close(gradient(squared_sum, logps), gradient(whole * logps, logps))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_cap_bounds_the_value_and_keeps_the_gradient(estimator: str, weighted: bool) -> None:
    logps, ref_logps = torch.tensor([-1.0, -6.0]), torch.tensor([-5.0, -0.1])
    logps.requires_grad_()
    weights = torch.ones(2) if weighted else None
    free = kl_loss(logps, ref_logps, estimator=estimator, weights=weights)
    capped = kl_loss(logps, ref_logps, estimator=estimator, weights=weights, value_cap=0.5)
    torch.testing.assert_close(capped, free.clamp(max=0.5))
    torch.testing.assert_close(gradient(capped, logps), gradient(free, logps))
    clamped = kl_estimate(logps, ref_logps, "k3").clamp(max=0.5)  # the trap: no pull where it is needed most
    assert gradient(clamped, logps).abs().sum() == 0


def test_reference_gets_no_gradient() -> None:
    logps, ref_logps = random_logps(2, 3)
    logps.requires_grad_()
    ref_logps.requires_grad_()
    kl_loss(logps, ref_logps, estimator="k3").sum().backward()
    assert ref_logps.grad is None


@pytest.mark.parametrize("arguments", [{"value_cap": 0.0}, {"weights": torch.ones(1, 3)}, {"estimator": "exact"}])
def test_loss_refuses(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"value_cap=0\.0|one per token|exact_kl or chunked"):
        kl_loss(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl_against_torch_distributions(direction: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits, ref_logits = torch.randn(2, 4, 7, 11, generator=generator, dtype=torch.float64)
    policy, reference = (torch.distributions.Categorical(logits=x) for x in (logits, ref_logits))
    pair = (policy, reference) if direction == "reverse" else (reference, policy)
    wanted = torch.distributions.kl_divergence(*pair)
    torch.testing.assert_close(exact_kl(logits, ref_logits, direction), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_kl_of_identical_models_is_zero(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 100, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype) * 10
    assert (exact_kl(logits, logits.clone()) == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_chunked_equals_dense(
    direction: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    with_bias: bool,
    chunk_size: int | None,
) -> None:
    """Value, and the gradients of hidden states, weight and bias; the reference may have its own hidden size."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, ref_hidden, ref_weight = normal(7, 4), normal(13, 4), normal(7, 5), normal(13, 5)
    bias, ref_bias = (normal(13), normal(13)) if with_bias else (None, None)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        raw = logit_scale * torch.nn.functional.linear(h, w, b)
        return (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature

    dense = exact_kl(logits(hidden, weight, bias), logits(ref_hidden, ref_weight, ref_bias), direction)
    chunked = chunked_exact_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        bias=bias,
        ref_bias=ref_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        direction=direction,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(chunked, dense, rtol=1e-11, atol=1e-13)
    upstream = normal(7)
    for found, wanted in zip(
        torch.autograd.grad(chunked, leaves, upstream), torch.autograd.grad(dense, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_in_low_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator(DEVICE).manual_seed(1)
    hidden, ref_hidden = torch.randn(2, 64, 16, generator=generator).to(dtype)
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    chunked = chunked_exact_kl(hidden, weight, ref_hidden, weight, chunk_size=8)
    wanted = exact_kl(hidden.float() @ weight.float().T, ref_hidden.float() @ weight.detach().float().T)
    assert chunked.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(chunked, wanted, rtol=tolerance, atol=tolerance)
    (found,) = torch.autograd.grad(chunked.sum(), weight)
    (expected,) = torch.autograd.grad(wanted.sum(), weight)
    assert found.dtype == dtype
    assert (found - expected).norm() < tolerance * 2 * expected.norm()


def test_chunked_under_autocast_differentiates_the_logits_that_forward_used() -> None:
    generator = torch.Generator(DEVICE).manual_seed(2)
    hidden, ref_hidden = 30 * torch.randn(2, 9, 8, generator=generator)  # so large that bfloat16 moves probabilities
    weight = torch.randn(12, 8, generator=generator)
    hidden.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        chunked = chunked_exact_kl(hidden, weight, ref_hidden, weight, chunk_size=4)
        dense = exact_kl(float32_linear(hidden, weight), float32_linear(ref_hidden, weight))
    torch.testing.assert_close(chunked, dense, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(kl.sum(), hidden)[0] for kl in (chunked, dense))
    in_float32 = exact_kl(torch.nn.functional.linear(hidden, weight), torch.nn.functional.linear(ref_hidden, weight))
    elsewhere = torch.autograd.grad(in_float32.sum(), hidden)[0]
    assert (found - wanted).norm() < 0.1 * (elsewhere - wanted).norm()


def test_padded_vocabulary_rows_contribute_nothing() -> None:
    logits, ref_logits = torch.randn(2, 3, 6, generator=torch.Generator(DEVICE).manual_seed(0))
    padding = torch.full((3, 2), -torch.inf)
    padded, ref_padded = torch.cat([logits, padding], -1).requires_grad_(), torch.cat([ref_logits, padding], -1)
    logits.requires_grad_()
    for direction in ("reverse", "forward"):
        found, wanted = exact_kl(padded, ref_padded, direction), exact_kl(logits, ref_logits, direction)
        torch.testing.assert_close(found, wanted)
        grad = torch.autograd.grad(found.sum(), padded)[0]
        torch.testing.assert_close(grad[:, :6], torch.autograd.grad(wanted.sum(), logits)[0])
        assert (grad[:, 6:] == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunked", [False, True])
def test_missing_support_is_infinite_with_finite_gradients(direction: str, chunked: bool) -> None:
    """Reported, not hidden: +inf where the left distribution has mass and the right has none; elsewhere untouched."""
    logits = torch.randn(2, 5, generator=torch.Generator(DEVICE).manual_seed(0), dtype=torch.float64)
    ref_logits = torch.randn(2, 5, generator=torch.Generator(DEVICE).manual_seed(1), dtype=torch.float64)
    (ref_logits if direction == "reverse" else logits)[0, 2] = -torch.inf
    logits.requires_grad_()
    if chunked:  # logits as hidden states of an identity head
        eye = torch.eye(5, dtype=torch.float64)
        bias = torch.zeros(5, dtype=torch.float64)
        ref_bias = bias.clone()
        (ref_bias if direction == "reverse" else bias)[2] = -torch.inf
        finite, ref_finite = logits.detach().nan_to_num(neginf=0.0), ref_logits.nan_to_num(neginf=0.0)
        finite.requires_grad_()
        kl = chunked_exact_kl(finite, eye, ref_finite, eye, bias=bias, ref_bias=ref_bias, direction=direction)
        assert kl.isinf().all()
        grad = torch.autograd.grad(kl.sum(), finite)[0]
    else:
        kl = exact_kl(logits, ref_logits, direction)
        assert kl[0] == torch.inf
        assert kl[1].isfinite()
        grad = torch.autograd.grad(kl.sum(), logits)[0]
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_chunked_and_dense_agree_on_the_gradient_where_support_is_missing() -> None:
    generator = torch.Generator(DEVICE).manual_seed(4)
    hidden = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ref_hidden = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    for direction, name in (("reverse", "ref_bias"), ("forward", "bias")):
        missing = torch.tensor([0, 0, -torch.inf, 0, 0], dtype=torch.float64)
        shifts = {
            "bias": torch.zeros(5, dtype=torch.float64),
            "ref_bias": torch.zeros(5, dtype=torch.float64),
            name: missing,
        }
        chunked = chunked_exact_kl(hidden, eye, ref_hidden, eye, direction=direction, **shifts)
        dense = exact_kl(hidden + shifts["bias"], ref_hidden + shifts["ref_bias"], direction)
        found, wanted = (torch.autograd.grad(kl.sum(), hidden)[0] for kl in (chunked, dense))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_no_tokens_at_all() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(6, 4).requires_grad_()
    kl = chunked_exact_kl(hidden, weight, torch.zeros(0, 4), weight)
    assert kl.shape == (0,)
    kl.sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "backward"}, "neither 'reverse'"),
        ({"ref_hidden": torch.zeros(2, 4)}, "same tokens"),
        ({"ref_weight": torch.zeros(7, 4)}, "vocabulary of 6 and the reference of 7"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_chunked_refuses(change: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "ref_hidden": torch.zeros(3, 4)}
    arguments |= {"ref_weight": torch.zeros(6, 4)} | change
    with pytest.raises(ValueError, match=message):
        chunked_exact_kl(**arguments)


def test_default_chunk_size_follows_a_memory_budget() -> None:
    assert 120 * 2**20 < default_chunk_size(152_000) * 152_000 * 4 * 2 <= 128 * 2**20  # the logits of two models
    assert default_chunk_size(152_000, "cuda") > 2 * default_chunk_size(152_000)
    assert default_chunk_size(10**9) == 1


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_chunked_from_logits_equals_dense(
    direction: str, temperature: float, softcap: float | None, masked: bool, chunk_size: int | None
) -> None:
    """Value and gradient of logits (B, T, V); rows that do not count get no gradient, whatever they hold."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, ref_hidden, ref_weight, ref_bias = 2 * normal(2, 4, 13), normal(2, 4, 5), normal(13, 5), normal(13)
    mask = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        mask[0, 3] = mask[1, 0] = False
        logits[~mask] = torch.nan
    raw = 0.3 * torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    ref_logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    logits.requires_grad_()
    found = chunked_exact_kl_from_logits(
        logits,
        ref_hidden[mask],
        ref_weight,
        mask=mask if masked else None,
        ref_bias=ref_bias,
        temperature=temperature,
        logit_scale=0.3,
        softcap=softcap,
        direction=direction,
        chunk_size=chunk_size,
    )
    wanted = exact_kl(logits[mask] / temperature, ref_logits[mask] / temperature, direction)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    upstream = normal(int(mask.sum()))
    (found_grad,) = torch.autograd.grad(found, logits, upstream)
    (wanted_grad,) = torch.autograd.grad(wanted, logits, upstream)
    torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-9, atol=1e-12)
    assert (found_grad[~mask] == 0).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("missing", ["neither", "both", "policy", "reference"])
def test_routes_agree_on_support(direction: str, missing: str) -> None:
    """Value (+inf included) and gradient, where one model or both rule tokens out in some rows and not in others."""
    logits, ref_logits = torch.randn(2, 6, 9, generator=torch.Generator(DEVICE).manual_seed(7), dtype=torch.float64)
    for name, tensor in (("policy", logits), ("reference", ref_logits)):
        if missing in (name, "both"):
            tensor[2:4, 5] = -torch.inf
    logits.requires_grad_()
    eye = torch.eye(9, dtype=torch.float64)
    dense = exact_kl(logits, ref_logits, direction)
    (wanted,) = torch.autograd.grad(dense.sum(), logits)
    transform, known = LogitTransform(), Statistics.empty(6, logits, torch.float64)
    rows = Rows(logits.detach(), ref_logits, None, transform, transform, direction)
    made, of_two = torch.zeros_like(logits.detach()), torch.zeros_like(logits.detach())
    torch_rows.score(rows, known, with_entropy=False, grad=made)
    torch.testing.assert_close(known.exact, dense.detach())
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
    torch_rows.gradient(rows, known, Upstream(exact=torch.full((6,), 2.0, dtype=torch.float64)), of_two)
    torch.testing.assert_close(of_two, 2 * wanted, rtol=1e-10, atol=1e-12)
    if missing in ("neither", "policy"):  # a reference of hidden states has -inf in a column (its bias), not in a row
        found = chunked_exact_kl_from_logits(logits, ref_logits, eye, direction=direction, chunk_size=4)
        torch.testing.assert_close(found, dense)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], wanted, rtol=1e-10, atol=1e-12)


def test_from_logits_with_a_reference_that_rules_a_token_out() -> None:
    generator = torch.Generator(DEVICE).manual_seed(3)
    logits, ref_hidden = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    ref_bias = torch.zeros(9, dtype=torch.float64)
    ref_bias[4] = -torch.inf
    eye = torch.eye(9, dtype=torch.float64)
    logits.requires_grad_()
    for direction in ("reverse", "forward"):
        found = chunked_exact_kl_from_logits(logits, ref_hidden, eye, ref_bias=ref_bias, direction=direction)
        wanted = exact_kl(logits, ref_hidden + ref_bias, direction)
        assert wanted.isinf().all() == (direction == "reverse")
        torch.testing.assert_close(found, wanted)
        found_grad, wanted_grad = (torch.autograd.grad(kl.sum(), logits)[0] for kl in (found, wanted))
        torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits_in_low_precision(dtype: torch.dtype) -> None:
    """The value is float32; the gradient has the type of the logits, as autograd wants it."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    logits = (3 * torch.randn(16, 50, generator=generator)).to(dtype).requires_grad_()
    ref_hidden, ref_weight = (torch.randn(n, 8, generator=generator).to(dtype) for n in (16, 50))
    found = chunked_exact_kl_from_logits(logits, ref_hidden, ref_weight, chunk_size=5)
    leaf = logits.detach().double().requires_grad_()
    wanted = exact_kl(leaf, ref_hidden.double() @ ref_weight.double().T)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    (grad,), (expected,) = torch.autograd.grad(found.sum(), logits), torch.autograd.grad(wanted.sum(), leaf)
    assert grad.dtype == dtype
    assert (grad - expected).norm() < tolerance * expected.norm()


def test_from_logits_goes_backward_once_and_not_at_all_without_gradient() -> None:
    logits, ref_hidden = torch.randn(2, 3, 5, generator=torch.Generator(DEVICE).manual_seed(0))
    logits.requires_grad_()
    with torch.no_grad():
        value = chunked_exact_kl_from_logits(logits, ref_hidden, torch.eye(5))
    assert not value.requires_grad
    kl = chunked_exact_kl_from_logits(logits, ref_hidden.requires_grad_(), torch.eye(5).requires_grad_())
    torch.testing.assert_close(kl.detach(), value, rtol=0, atol=0)
    kl.sum().backward(retain_graph=True)
    assert ref_hidden.grad is None
    with pytest.raises(RuntimeError, match="backward once"):
        kl.sum().backward()


def test_from_logits_of_no_tokens_stays_in_the_graph() -> None:
    logits = torch.randn(2, 3, 5).requires_grad_()
    kl = chunked_exact_kl_from_logits(logits, torch.zeros(0, 4), torch.zeros(5, 4), mask=torch.zeros(2, 3))
    kl.sum().backward()
    assert kl.shape == (0,)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "backward"}, "neither 'reverse'"),
        ({"ref_hidden": torch.zeros(2, 4)}, "same tokens"),
        ({"mask": torch.tensor([True, False, True])}, "same tokens"),
        ({"mask": torch.ones(4)}, "same tokens"),
        ({"ref_weight": torch.zeros(7, 4)}, "vocabulary of 6 and the reference of 7"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_from_logits_refuses(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 6), "ref_hidden": torch.zeros(3, 4), "ref_weight": torch.zeros(6, 4)}
    with pytest.raises(ValueError, match=message):
        chunked_exact_kl_from_logits(**arguments | change)


# --- importance weights ----------------------------------------------------------------------------------------------


def test_weight_levels_by_hand() -> None:
    logps = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    sampler_logps = torch.tensor([[-math.log(2), -math.log(3), -math.log(5), -math.log(7)]])
    mask = torch.tensor([[1, 0, 1, 0]])
    wanted = {"token": [2, 0, 5, 0], "prefix": [2, 0, 10, 0], "sequence": [10, 0, 10, 0]}
    for level, values in wanted.items():
        weights = importance_weights(logps, sampler_logps, mask, level=level)
        torch.testing.assert_close(weights, torch.tensor([values], dtype=torch.float32))
    truncated = importance_weights(logps, sampler_logps, mask, level="prefix", cap=4.0)
    dropped = importance_weights(logps, sampler_logps, mask, level="prefix", mode="mask", cap=4.0)
    torch.testing.assert_close(truncated, torch.tensor([[2.0, 0, 4, 0]]))
    torch.testing.assert_close(dropped, torch.tensor([[2.0, 0, 0, 0]]))


def test_weights_are_detached_and_one_on_policy() -> None:
    logps, _ = random_logps(3, 4)
    logps.requires_grad_()
    for level in ("token", "prefix", "sequence"):
        weights = importance_weights(logps, logps.detach(), torch.ones(3, 4), level=level)
        assert not weights.requires_grad
        assert (weights == 1).all()


def test_exact_takes_no_token_weight() -> None:
    logps, sampler_logps = random_logps(3, 4)
    mask = torch.ones(3, 4)
    assert KLTerm("exact").weights(logps, sampler_logps, mask) is None
    assert KLTerm("exact", weight_level="prefix").weights(logps, sampler_logps, mask) is not None
    assert KLTerm("k3").weights(logps, sampler_logps, mask) is not None


def test_unscored_tokens_have_weight_one() -> None:
    sampler_logps = torch.tensor([[-1.0, torch.nan, -1.0]])
    weights = importance_weights(torch.zeros(1, 3), sampler_logps, torch.ones(1, 3), level="token")
    torch.testing.assert_close(weights, torch.tensor([[math.e, 1.0, math.e]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "geometric"}, "level='geometric'"),
        ({"mode": "clip", "cap": 1.0}, "mode='clip'"),
        ({"mode": "mask"}, "give cap a number"),
        ({"cap": 0.0}, "cap=0.0"),
    ],
)
def test_weights_refuse(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), **change)


def test_effective_sample_size() -> None:
    mask = torch.ones(4)
    assert float(effective_sample_size(torch.full((4,), 3.0), mask)) == pytest.approx(1.0)
    assert float(effective_sample_size(torch.tensor([1.0, 0, 0, 0]), mask)) == pytest.approx(0.25)
    assert float(effective_sample_size(torch.tensor([1e30, 1e30, 0, 0]), mask)) == pytest.approx(0.5)
    assert float(effective_sample_size(torch.tensor([torch.inf, 1, 1, 1]), mask)) == pytest.approx(0.25)
    assert float(effective_sample_size(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))) == pytest.approx(16 / 20)
    assert float(effective_sample_size(torch.ones(4), torch.zeros(4))) == 1.0


# --- reward ----------------------------------------------------------------------------------------------------------


def test_credits_by_hand() -> None:
    values = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    mask = torch.tensor([[1, 0, 1, 1]])
    wanted = {
        "return_to_go": [1101, 0, 1100, 1000],
        "future": [1100, 0, 1000, 0],
        "immediate": [1, 0, 100, 1000],
        "sequence": [1101, 0, 1101, 1101],
    }
    for credit, numbers in wanted.items():
        torch.testing.assert_close(kl_credit(values, mask, credit=credit), torch.tensor([numbers], dtype=torch.float32))
    with pytest.raises(ValueError, match="credit='past'"):
        kl_credit(values, mask, credit="past")  # type: ignore[arg-type]


def test_leave_one_out_baseline_by_hand() -> None:
    credit = torch.tensor([[2.0, 1.0], [4.0, 9.0], [6.0, 5.0], [1.0, 1.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    wanted = torch.tensor([[4.0, 0.0], [2.0, 0.0], [1.0, 1.0], [6.0, 5.0]])
    torch.testing.assert_close(leave_one_out_baseline(credit, mask, 2), wanted)
    with pytest.raises(ValueError, match="group_size=3 must divide"):
        leave_one_out_baseline(credit, mask, 3)


def test_leave_one_out_baseline_does_not_depend_on_its_own_answer() -> None:
    credit, _ = random_logps(6, 4)
    mask = torch.rand(6, 4, generator=torch.Generator(DEVICE).manual_seed(0)) > 0.3
    base = leave_one_out_baseline(credit, mask, 3)
    changed = credit.clone()
    changed[1] += 100
    moved = leave_one_out_baseline(changed, mask, 3)
    torch.testing.assert_close(moved[1], base[1], rtol=1e-10, atol=1e-10)
    assert (moved[0] != base[0]).any()


# --- masking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [1e30, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "term", [KLTerm("k3"), KLTerm("k1", "reward", weight_level="none"), KLTerm("k3", weight_level="prefix")]
)
def test_masked_equals_subset(term: KLTerm, garbage: float) -> None:
    """Garbage on masked positions changes nothing; unmasked tokens get what they get alone."""
    logps, ref_logps = random_logps(2, 6)
    sampler_logps = random_logps(2, 6, seed=3)[1]
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    dirty = [torch.where(mask, x, garbage).requires_grad_() for x in (logps, ref_logps, sampler_logps)]

    def compute(policy: Tensor, reference: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
        if term.in_reward:
            return term.credit(policy, reference, mask)
        return term.loss(policy, reference, mask, sampler_logps=sampler)

    found = compute(*dirty, mask)
    assert (found[~mask] == 0).all()
    for row in range(2):
        subset = [x[row : row + 1, mask[row]] for x in (logps, ref_logps, sampler_logps)]
        wanted = compute(*subset, torch.ones_like(subset[0]))
        torch.testing.assert_close(found[row : row + 1, mask[row]], wanted, rtol=1e-12, atol=1e-12)
    if term.in_loss:
        (grad,) = torch.autograd.grad(found.sum(), dirty[0])
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()


def test_masked_sums_and_means() -> None:
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0], [torch.inf, torch.inf]])
    mask = torch.tensor([[1, 0], [1, 1], [0, 0]])
    assert float(masked_sum(values, mask)) == 9
    assert float(masked_mean(values, mask)) == 3
    torch.testing.assert_close(masked_mean(values, mask, -1), torch.tensor([1.0, 4.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float16])
def test_last_token_index_in_every_dtype(dtype: torch.dtype) -> None:
    mask = torch.zeros(3, 5000)
    mask[0, :4321] = 1
    mask[1, 7] = 1
    found = last_token_index(mask.to(dtype))
    assert found.tolist() == [4320, 7, -1]
