"""The Triton kernels against their twin in float64: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).

tests/test_triton.py runs this file in the interpreter. On a GPU: pytest --noconftest tests/kernels
"""

import itertools

import pytest
import torch

from trl_klx.kl.chunked import torch_rows, triton_rows
from trl_klx.kl.chunked.rows import Rows, Statistics, Upstream
from trl_klx.kl.logits import LogitTransform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V = 3, 100
COMBINATIONS = list(itertools.product(("reverse", "forward"), (None, 4.0), ("none", "both", "policy", "reference")))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_rows(direction: str, softcap: float | None, missing: str, *, with_places: bool, distance: float) -> Rows:
    """Logits with a standard deviation of 3; `missing`: whose logits rule a token out in one row."""
    policy, reference = 3 * normal(N + 2, V, seed=0), distance * normal(N, V, seed=1)
    places = torch.tensor([4, 1, 0], device=DEVICE) if with_places else None
    reference += policy[:N] if places is None else policy[places]
    ruled_out = 1 if places is None else int(places[1])
    if missing in ("both", "policy"):
        policy[ruled_out, 70] = -torch.inf
    if missing in ("both", "reference"):
        reference[1, 70] = -torch.inf
    plain = LogitTransform(temperature=0.7)
    transform = plain if with_places else LogitTransform(0.5, softcap, 0.7)
    logits = policy if with_places else policy[:N]
    targets = torch.arange(N, device=DEVICE) * 40
    return Rows(logits, reference, targets, transform, plain._replace(softcap=softcap), direction, places)  # type: ignore[arg-type]


def in_float64(rows: Rows) -> Rows:
    assert rows.ref_logits is not None
    return rows._replace(logits=rows.logits.double(), ref_logits=rows.ref_logits.double())


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize(("direction", "softcap", "missing"), COMBINATIONS)
@pytest.mark.parametrize("with_places", [False, True])
def test_kernels_equal_their_twin(direction: str, softcap: float | None, missing: str, with_places: bool) -> None:
    rows = make_rows(direction, softcap, missing, with_places=with_places, distance=0.3)
    twin = in_float64(rows)
    found, wanted = (Statistics.empty(N, r.logits, r.logits.dtype) for r in (rows, twin))
    grad, twin_grad = torch.zeros_like(rows.logits), torch.zeros_like(twin.logits)
    triton_rows.score(rows, found, with_entropy=True, grad=grad)
    torch_rows.score(twin, wanted, with_entropy=True, grad=twin_grad)
    for name in ("logps", "entropy", "mass"):
        assert_near(getattr(found, name), getattr(wanted, name))
    is_infinite = wanted.exact.isinf()
    assert torch.equal(found.exact.isinf(), is_infinite)
    assert_near(found.exact[~is_infinite], wanted.exact[~is_infinite], 1e-4)
    assert_near(grad, twin_grad)
    upstream = Upstream(*(normal(N, seed=seed) for seed in (3, 4, 5)))
    triton_rows.gradient(rows, found, upstream, grad)
    torch_rows.gradient(twin, wanted, Upstream(*(values.double() for values in upstream)), twin_grad)
    assert_near(grad, twin_grad)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_small_kl_keeps_its_digits(direction: str, distance: float) -> None:
    """Down to 5e-7 nats, though logits of 10 have digits of 1e-6."""
    rows = make_rows(direction, None, "none", with_places=False, distance=distance)
    twin = in_float64(rows)
    found, wanted = (Statistics.empty(N, r.logits, r.logits.dtype) for r in (rows, twin))
    grad, twin_grad = torch.zeros_like(rows.logits), torch.zeros_like(twin.logits)
    triton_rows.score(rows, found, with_entropy=False, grad=grad)
    torch_rows.score(twin, wanted, with_entropy=False, grad=twin_grad)
    assert ((found.exact.double() - wanted.exact).abs() / wanted.exact).max() < 1e-3
    assert (grad.double() - twin_grad).norm() < 3e-3 * twin_grad.norm()


def test_gradient_takes_the_place_of_the_logits() -> None:
    rows = make_rows("reverse", None, "none", with_places=False, distance=0.3)
    known, apart = Statistics.empty(N, rows.logits, torch.float32), torch.empty_like(rows.logits)
    triton_rows.score(rows, known, with_entropy=False, grad=apart)
    triton_rows.score(rows, known, with_entropy=False, grad=rows.logits)
    assert torch.equal(rows.logits, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_beside_float32_logits(dtype: torch.dtype) -> None:
    rows = make_rows("reverse", 4.0, "none", with_places=False, distance=0.3)
    known = Statistics.empty(N, rows.logits, torch.float32)
    exact, rounded = torch.empty_like(rows.logits), torch.empty_like(rows.logits, dtype=dtype)
    for grad in (exact, rounded):
        triton_rows.score(rows, known, with_entropy=False, grad=grad)
    torch.testing.assert_close(rounded, exact.to(dtype))


def test_without_a_reference() -> None:
    rows = make_rows("reverse", None, "none", with_places=False, distance=0.3)._replace(ref_logits=None)
    twin = rows._replace(logits=rows.logits.double())
    found, wanted = (Statistics.empty(N, r.logits, r.logits.dtype) for r in (rows, twin))
    grad, twin_grad, upstream = torch.empty_like(rows.logits), torch.empty_like(twin.logits), normal(N, seed=3)
    triton_rows.score(rows, found, with_entropy=False, grad=None)
    torch_rows.score(twin, wanted, with_entropy=False, grad=None)
    assert_near(found.logps, wanted.logps)
    triton_rows.gradient(rows, found, Upstream(logps=upstream), grad)
    torch_rows.gradient(twin, wanted, Upstream(logps=upstream.double()), twin_grad)
    assert_near(grad, twin_grad)


def test_nan_is_seen() -> None:
    rows = make_rows("reverse", None, "none", with_places=False, distance=0.3)
    rows.logits[2, 90] = torch.nan
    known = Statistics.empty(N, rows.logits, torch.float32)
    triton_rows.score(rows, known, with_entropy=True, grad=None)
    for values in (known.logps, known.entropy, known.exact):
        assert values.isnan().tolist() == [False, False, True]
