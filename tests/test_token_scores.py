"""`token_scores` and its relatives against the dense form in float64, and how many products they take."""

import itertools
from typing import Any

import pytest
import torch
from support.device import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_klx.kl import chunked_exact_kl, chunked_exact_kl_from_logits, exact_kl, float32_linear, token_scores

pytestmark = pytest.mark.usefixtures("device")
N, H, V = 7, 5, 13


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), dtype=torch.float64)


def inputs(*, trained: bool, bias: bool) -> dict[str, Any]:
    out = {
        "hidden": normal(N, H, seed=1).requires_grad_(),
        "weight": normal(V, H, seed=2).requires_grad_(trained),
        "targets": torch.arange(N) % V,
        "ref_hidden": normal(N, 3, seed=3),
        "ref_weight": normal(V, 3, seed=4),
    }
    if bias:
        out |= {"bias": normal(V, seed=5).requires_grad_(trained), "ref_bias": normal(V, seed=6)}
    return out


def dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: Any = "reverse",
) -> tuple[Tensor, Tensor, Tensor]:
    def logits(states: Tensor, head: Tensor, shift: Tensor | None) -> Tensor:
        raw = logit_scale * torch.nn.functional.linear(states, head, shift)
        return (raw if softcap is None else softcap * (raw / softcap).tanh()) / temperature

    policy, reference = logits(hidden, weight, bias), logits(ref_hidden, ref_weight, ref_bias)
    logps = policy.log_softmax(-1)
    of_targets = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return of_targets, -(logps.exp() * logps).sum(-1), exact_kl(policy, reference, direction)


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [tensor for tensor in given.values() if tensor.requires_grad]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("wanted", ["logps", "exact", "logps exact", "logps entropy", "logps entropy exact"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_scores_and_gradients_equal_the_dense_form(
    trained: bool, bias: bool, chunk_size: int | None, wanted: str, direction: Any
) -> None:
    given = inputs(trained=trained, bias=bias)
    options = {"temperature": 0.7, "logit_scale": 0.5, "softcap": 4.0, "direction": direction}
    asked = {**given, "with_entropy": "entropy" in wanted, "chunk_size": chunk_size, **options}
    if "logps" not in wanted:
        asked["targets"] = None
    if "exact" not in wanted:
        asked |= {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    expected = dict(zip(("logps", "entropy", "exact"), dense(**given, **options), strict=True))
    found = token_scores(**asked)._asdict()
    assert {name for name, values in found.items() if values is not None} == set(wanted.split())
    upstream = {name: normal(N, seed=9 + place) for place, name in enumerate(wanted.split())}
    loss, expected_loss = (sum((upstream[n] * of[n]).sum() for n in upstream) for of in (found, expected))
    for name in upstream:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves(given)), torch.autograd.grad(expected_loss, leaves(given)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("used", ["logps", "entropy", "exact"])
def test_outputs_that_a_loss_leaves_out_have_no_gradient(trained: bool, used: str) -> None:
    given = inputs(trained=trained, bias=True)
    found = token_scores(**given, with_entropy=True)._asdict()[used]
    expected = dict(zip(("logps", "entropy", "exact"), dense(**given), strict=True))[used]
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), leaves(given)), torch.autograd.grad(expected.sum(), leaves(given)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_token_that_does_not_count_spoils_nothing() -> None:
    """Upstream 0 is no gradient, whatever the token holds."""
    given = inputs(trained=False, bias=False)
    with torch.no_grad():
        given["hidden"][2] = torch.nan
    found = token_scores(**given)
    counts = torch.arange(N) != 2
    loss = torch.where(counts, found.logps + found.exact, 0.0).sum()
    (grad,) = torch.autograd.grad(loss, given["hidden"])
    assert (grad[2] == 0).all()
    assert grad[counts].isfinite().all()
    assert grad[counts].abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [1.0, -3.5])
def test_known_token_weights_give_the_same_gradients(bias: bool, factor: float) -> None:
    given = inputs(trained=True, bias=bias)
    del given["targets"]
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)
    plain, known = chunked_exact_kl(**given), chunked_exact_kl(**given, token_weights=weights, chunk_size=3)
    wanted = torch.autograd.grad((factor * weights * plain).sum(), leaves(given))
    found = torch.autograd.grad((factor * weights * known).sum(), leaves(given))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_other_weights_than_those_promised_are_not_silent() -> None:
    given = inputs(trained=True, bias=False)
    del given["targets"]
    kl = chunked_exact_kl(**given, token_weights=torch.ones(N, dtype=torch.float64))
    _, of_head = torch.autograd.grad((kl * torch.arange(1.0, N + 1)).sum(), leaves(given))
    assert of_head.isnan().all()


class Products(TorchDispatchMode):
    """Counts matrix products of which one side is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            shapes = [tensor.shape for tensor in args if isinstance(tensor, Tensor)]
            self.count += any(V in shape for shape in shapes)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "wanted", "forward", "backward"),
    [
        (False, "exact", 3, 0),
        (False, "logps", 2, 0),
        (False, "logps exact", 4, 0),  # log-probs alone take 2, and 3 where they are projected again in backward
        (True, "exact", 2, 4),
        (True, "exact, weights known", 4, 0),
        (True, "logps", 1, 3),
        (True, "logps exact", 2, 4),
    ],
)
def test_number_of_products(trained: bool, wanted: str, forward: int, backward: int) -> None:
    given = inputs(trained=trained, bias=False)
    weights = torch.ones(N, dtype=torch.float64)
    with Products() as products:
        if "known" in wanted:
            del given["targets"]
            total = chunked_exact_kl(**given, token_weights=weights)
        else:
            if "logps" not in wanted:
                given["targets"] = None
            if "exact" not in wanted:
                given |= {"ref_hidden": None, "ref_weight": None}
            found = token_scores(**given, with_entropy=True)  # which is free, where it is only logged
            total = sum(values for values in (found.logps, found.exact) if values is not None)
    assert products.count == forward
    with Products() as products:
        total.sum().backward()
    assert products.count == backward


def test_without_gradient_each_model_is_projected_once() -> None:
    given = inputs(trained=True, bias=False)
    with Products() as products, torch.no_grad():
        token_scores(**given, with_entropy=True)
    assert products.count == 2
    logits = normal(N, V).requires_grad_()
    with Products() as products:
        chunked_exact_kl_from_logits(logits, given["ref_hidden"], given["ref_weight"]).sum().backward()
    assert products.count == 1


class Largest(TorchDispatchMode):
    """Remembers how many tokens' logits the largest tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.size(1) == V:
            self.rows = max(self.rows, out.size(0))
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_logits_than_those_of_a_chunk_are_held(trained: bool) -> None:
    given = inputs(trained=trained, bias=False)
    with Largest() as largest:
        found = token_scores(**given, with_entropy=True, chunk_size=6)  # of N = 7; a head has 5
        (found.logps + found.entropy + found.exact).sum().backward()
    assert largest.rows == 6


def test_float32_linear_is_linear() -> None:
    hidden, weight, bias = normal(2, 3, H).requires_grad_(), normal(V, H).requires_grad_(), normal(V).requires_grad_()
    found, wanted = float32_linear(hidden, weight, bias), torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(found, wanted)
    upstream = normal(2, 3, V)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (hidden, weight, bias), upstream) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("by_autocast", [False, True])
def test_float32_linear_keeps_what_half_precision_would_round(by_autocast: bool) -> None:
    hidden, weight = normal(4, 64).bfloat16(), (4 * normal(50, 64)).bfloat16()
    exact = hidden.double() @ weight.double().t()
    if by_autocast:
        with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
            found = float32_linear(hidden.float(), weight.float())
    else:
        found = float32_linear(hidden, weight)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4
    assert (torch.nn.functional.linear(hidden, weight) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("wider", ["policy", "reference", "head"])
def test_each_model_is_projected_in_its_own_precision(wider: str) -> None:
    """A float32 model beside a bfloat16 one, or a float32 head over bfloat16 states, keeps its digits."""
    given = inputs(trained=True, bias=False)
    names = {"policy": ("hidden", "weight"), "reference": ("ref_hidden", "ref_weight"), "head": ("weight",)}[wider]
    half = {
        name: value.detach().to(torch.float32 if name in names else torch.bfloat16)
        for name, value in given.items()
        if name != "targets"
    }
    exact = {name: value.double() for name, value in half.items()}
    for tensors in (half, exact):
        tensors["hidden"].requires_grad_()
        tensors["weight"].requires_grad_()
    found, wanted = token_scores(**half, targets=given["targets"]), dense(**exact, targets=given["targets"])
    torch.testing.assert_close(found.logps.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exact.double(), wanted[2], rtol=1e-5, atol=1e-5)
    found.exact.sum().backward()
    wanted[2].sum().backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(half[name].grad.double(), exact[name].grad, rtol=0.02, atol=0.02)


def test_models_of_two_widths_are_compared_in_the_wider() -> None:
    given = inputs(trained=False, bias=False)
    mixed = {**given, "ref_hidden": given["ref_hidden"].float(), "ref_weight": given["ref_weight"].float()}
    torch.testing.assert_close(token_scores(**mixed).exact, dense(**given)[2], rtol=1e-5, atol=1e-5)


def test_token_scores_refuses() -> None:
    given = inputs(trained=False, bias=False)
    for change, message in (
        ({"targets": torch.zeros(3, dtype=torch.long)}, "one token per row"),
        ({"ref_weight": None}, "belong together"),
        ({"ref_hidden": normal(3, 3)}, "same tokens"),
        ({"ref_weight": normal(4, 3)}, "vocabulary of 13 and the reference of 4"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"direction": "both"}, "neither 'reverse'"),
    ):
        with pytest.raises(ValueError, match=message):
            token_scores(**{**given, **change})


def test_no_tokens_give_no_scores_and_zero_gradients() -> None:
    for trained, with_entropy in itertools.product((False, True), repeat=2):
        weight = normal(V, H).requires_grad_(trained)
        hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
        none = torch.zeros(0, dtype=torch.long)
        found = token_scores(hidden, weight, none, ref_hidden=hidden, ref_weight=weight, with_entropy=with_entropy)
        assert found.logps is not None
        assert found.exact is not None
        (found.logps.sum() + found.exact.sum()).backward()
        assert weight.grad is None or (weight.grad == 0).all()
