"""In bfloat16 the KL is that of the tensors it is given: against float64 on the same bfloat16 tensors.

A logit between 16 and 32 has steps of 0.125 in bfloat16, and near the reference the log-ratios are smaller than that.
Everything here therefore needs float32 results of the heads' products.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.bf16 import STEPS, dpo_probe, error_of_credit, grpo_trainer
from support.loading import load
from torch import Tensor

from trl_klx import KLXGRPOConfig
from trl_klx.kl import chunked_exact_kl, chunked_exact_kl_from_logits, exact_kl
from trl_klx.kl.chunked import float32_linear, token_scores
from trl_klx.trainers.grpo.precision import FLOOR
from trl_klx.trainers.seams import FUSED_LM_HEAD

VALUE, GRADIENT = 0.01, 0.02  # relative errors that are allowed, down to 2e-4 nats per token
TOKENS, HIDDEN, VOCABULARY = 48, 96, 600
CHUNK = 20  # the last one is not full


class Heads(NamedTuple):
    hidden: Tensor  # (N, H) of the policy
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    ref_hidden: Tensor  # (N, H)
    ref_weight: Tensor
    ref_bias: Tensor | None

    def trained(self, dtype: torch.dtype, *, frozen: bool) -> tuple["Heads", list[Tensor]]:
        """The same numbers in `dtype`, and the tensors of the policy that take a gradient."""
        tensors = [None if t is None else t.detach().to(dtype).clone() for t in self]
        leaves = [t.requires_grad_() for t in tensors[: 1 if frozen else 3] if t is not None]
        return Heads(*tensors), leaves  # type: ignore[arg-type]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def final(logits: Tensor, options: dict[str, Any]) -> Tensor:
    scaled = options.get("logit_scale", 1.0) * logits
    return capped(scaled, options.get("softcap")) / options.get("temperature", 1.0)


def dense_logits(heads: Heads, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(N, V) of policy and reference, in the tensors' own precision."""
    logits, ref_logits = heads.hidden @ heads.weight.t(), heads.ref_hidden @ heads.ref_weight.t()
    if heads.bias is not None and heads.ref_bias is not None:
        logits, ref_logits = logits + heads.bias, ref_logits + heads.ref_bias
    return final(logits, options), final(ref_logits, options)


def make_heads(kl: float, device: torch.device, *, shared: bool, bias: bool, options: dict[str, Any]) -> Heads:
    """Heads in bfloat16 whose largest raw logits are near 25, `kl` nats per token apart within a fifth."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device)

    hidden, off_hidden = noise(TOKENS, HIDDEN), noise(TOKENS, HIDDEN)
    weight, off_weight = noise(VOCABULARY, HIDDEN), noise(VOCABULARY, HIDDEN)
    scale = 25 / float((hidden @ weight.t()).amax(-1).mean())
    weight, off_weight = scale * weight, scale * off_weight
    biases = noise(VOCABULARY) if bias else None
    step = 0.1
    for _ in range(30):
        ref_weight = weight if shared else weight + step * off_weight
        tensors = hidden, weight, biases, hidden + step * off_hidden, ref_weight, biases
        heads = Heads(*(None if t is None else t.bfloat16() for t in tensors))  # type: ignore[arg-type]
        wide, _ = heads.trained(torch.float64, frozen=True)
        found = float(exact_kl(*dense_logits(wide, options), options.get("direction", "reverse")).detach().mean())
        if abs(found / kl - 1) < 0.2:
            return heads
        step *= (kl / found) ** 0.5
    raise AssertionError(f"no reference at {kl} nats per token")


def by_chunked_exact_kl(heads: Heads, options: dict[str, Any]) -> Tensor:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    return chunked_exact_kl(
        hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, chunk_size=CHUNK, **options
    )


def by_weighted_chunked_exact_kl(heads: Heads, options: dict[str, Any]) -> Tensor:
    weights = torch.full((TOKENS,), 1 / TOKENS, device=heads.hidden.device)
    return by_chunked_exact_kl(heads, {**options, "token_weights": weights})


def from_logits(heads: Heads, options: dict[str, Any]) -> Tensor:
    """Of a model that returns float32 logits, scaled and capped and not divided by the temperature."""
    raw = float32_linear(heads.hidden, heads.weight, heads.bias)
    logits = final(raw, {**options, "temperature": 1.0})
    return chunked_exact_kl_from_logits(
        logits, heads.ref_hidden, heads.ref_weight, ref_bias=heads.ref_bias, chunk_size=CHUNK, **options
    )


def by_token_scores(heads: Heads, options: dict[str, Any]) -> Tensor:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    found = token_scores(
        hidden,
        weight,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        chunk_size=CHUNK,
        **options,
    ).exact
    assert found is not None
    return found


def beside_log_probs(heads: Heads, options: dict[str, Any]) -> Tensor:
    """The exact KL of a call that gives log-probs and entropy too."""
    targets = torch.arange(TOKENS, device=heads.hidden.device)
    return by_token_scores(heads, {**options, "targets": targets, "with_entropy": True})


EXACT: list[Callable[[Heads, dict[str, Any]], Tensor]] = [
    by_chunked_exact_kl,
    by_weighted_chunked_exact_kl,
    from_logits,
    by_token_scores,
    beside_log_probs,
]
# What of the policy's head is trained and shared, and what is done to logits.
KINDS: dict[str, dict[str, Any]] = {
    "frozen head, shared": {"shared": True, "frozen": True},
    "trained head": {},
    "bias": {"bias": True},
    "bias, frozen and shared": {"bias": True, "shared": True, "frozen": True},
    "softcap": {"options": {"softcap": 30.0}},
    "temperature": {"options": {"temperature": 0.7}},
    "logit scale": {"options": {"logit_scale": 0.8}},
    "forward": {"options": {"direction": "forward"}},
    "forward, frozen and shared": {"options": {"direction": "forward"}, "shared": True, "frozen": True},
    "all of it": {"options": {"softcap": 30.0, "temperature": 1.3, "logit_scale": 1.1}, "bias": True},
}


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def assert_true(found: Tensor, leaves: list[Tensor], true: Tensor, true_leaves: list[Tensor]) -> None:
    """Value and gradients of a mean are those of float64."""
    assert found.dtype == torch.float32
    assert relative(found.detach().mean(), true.detach().mean()) < VALUE
    gradients = torch.autograd.grad(found.mean(), leaves)
    true_gradients = torch.autograd.grad(true.mean(), true_leaves)
    errors = [relative(a, b) for a, b in zip(gradients, true_gradients, strict=True)]
    assert max(errors) < GRADIENT, errors
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


@pytest.mark.parametrize("kl", [0.04, 2e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", EXACT, ids=lambda function: function.__name__)
def test_exact_kl_of_bf16_tensors(
    function: Callable[[Heads, dict[str, Any]], Tensor], kind: str, kl: float, device: torch.device
) -> None:
    settings = {"shared": False, "frozen": False, "bias": False, "options": {}, **KINDS[kind]}
    frozen, options = settings.pop("frozen"), settings["options"]
    heads = make_heads(kl, device, **settings)
    given, leaves = heads.trained(torch.bfloat16, frozen=frozen)
    wide, true_leaves = heads.trained(torch.float64, frozen=frozen)
    true = exact_kl(*dense_logits(wide, options), options.get("direction", "reverse"))
    assert_true(function(given, options), leaves, true, true_leaves)


@pytest.mark.parametrize("function", EXACT, ids=lambda function: function.__name__)
def test_autocast_takes_float32_tensors_in_bf16(
    function: Callable[[Heads, dict[str, Any]], Tensor], device: torch.device
) -> None:
    """Float32 weights under autocast: their bfloat16 rounding is what is multiplied, and the result is float32."""
    heads = make_heads(2e-4, device, shared=False, bias=True, options={})
    given, leaves = heads.trained(torch.float32, frozen=False)
    wide, true_leaves = heads.trained(torch.float64, frozen=False)
    true = exact_kl(*dense_logits(wide, {}))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = function(given, {})
    assert relative(found.detach().mean(), true.detach().mean()) < VALUE
    gradients = torch.autograd.grad(found.mean(), leaves)
    true_gradients = torch.autograd.grad(true.mean(), true_leaves)
    assert max(relative(a, b) for a, b in zip(gradients, true_gradients, strict=True)) < GRADIENT


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_entropy_of_bf16_tensors(kind: str, device: torch.device) -> None:
    """Log-ratios near the reference are differences of log-probs: 1 % of them, and not of the log-probs."""
    settings = {"shared": False, "frozen": False, "bias": False, "options": {}, **KINDS[kind]}
    frozen = settings.pop("frozen")
    options = {name: value for name, value in settings["options"].items() if name != "direction"}
    heads = make_heads(2e-4, device, **settings)
    targets = torch.arange(TOKENS, device=device) * 7 % VOCABULARY
    given, leaves = heads.trained(torch.bfloat16, frozen=frozen)
    wide, true_leaves = heads.trained(torch.float64, frozen=frozen)
    logps, ref_logps = (logits.log_softmax(-1) for logits in dense_logits(wide, options))
    true = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    true_gap = true - ref_logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = given
    scores = token_scores(hidden, weight, targets, bias=bias, with_entropy=True, chunk_size=CHUNK, **options)
    ref = token_scores(ref_hidden, ref_weight, targets, bias=ref_bias, chunk_size=CHUNK, **options)
    assert scores.logps is not None and scores.entropy is not None and ref.logps is not None
    assert relative((scores.logps - ref.logps).detach(), true_gap.detach()) < VALUE
    true_entropy = -(logps.exp() * logps).sum(-1)
    assert relative(scores.entropy.detach(), true_entropy.detach()) < VALUE
    # One scalar of both, whose gradients differ in size.
    gradients = torch.autograd.grad((scores.logps + 3 * scores.entropy).mean(), leaves)
    true_gradients = torch.autograd.grad((true + 3 * true_entropy).mean(), true_leaves)
    assert max(relative(a, b) for a, b in zip(gradients, true_gradients, strict=True)) < GRADIENT


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["trained head", "LoRA"])
@pytest.mark.parametrize("name", STEPS)
def test_what_a_trainer_reports_and_trains_by(name: str, lora: bool, half: bool, tmp_path: Path) -> None:
    """Of the hidden states that its heads are given, whatever route TRL takes: every estimate, and the gradients."""
    step = STEPS[name](tmp_path, 2e-4, lora=lora, half=half)
    true = step.truth()[0]["exact"]
    assert 3e-5 < true < 1e-3
    values, gradients = step.errors_of_values(), step.errors_of_gradients()
    assert set(values) == ({"exact"} if name == "DPO" else {"k1", "k2", "k3", "exact"})
    assert max(values.values()) < VALUE, values
    assert set(gradients) == ({"hidden"} if lora else {"hidden", "head"})
    assert max(gradients.values()) < GRADIENT, gradients


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
def test_what_a_probe_of_dpo_reports(half: bool, tmp_path: Path) -> None:
    values = dpo_probe(tmp_path, 2e-4, half=half).errors_of_values()
    assert set(values) == {"k1", "k2", "k3", "exact"}
    assert max(values.values()) < VALUE, values


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
@pytest.mark.parametrize("iterations", [1, 2], ids=["scored for the credit", "scored by TRL for its loss"])
def test_what_grpo_charges_in_the_reward(iterations: int, half: bool, tmp_path: Path) -> None:
    """The exact KL in the reward, of a scoring of its own or of hidden states that TRL's scoring leaves."""
    assert error_of_credit(tmp_path, 2e-4, half=half, num_iterations=iterations) < VALUE


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
def test_a_policy_that_has_not_moved_has_importance_ratios_of_one(half: bool, tmp_path: Path) -> None:
    """Rollout and loss score alike: one of them in bfloat16 would put a noise of 0.05 on TRL's log-ratios."""
    trainer = grpo_trainer(tmp_path, 2e-4, lora=False, half=half, num_iterations=2)
    measure, log_ratios = trainer._measure, []

    def kept(policy: Any, inputs: dict, mask: Tensor, *args: Any) -> None:
        log_ratios.append((policy.logps.detach() - inputs["old_per_token_logps"])[mask])
        measure(policy, inputs, mask, *args)

    trainer._measure = kept  # type: ignore[method-assign]
    trainer.train()
    assert len(log_ratios) == 1
    assert float(log_ratios[0].abs().max()) < 1e-4


SAMPLED = ["k1", "k2", "k3"]


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
def test_a_head_cast_to_float32_scores_sampled_estimators_truly(half: bool, tmp_path: Path) -> None:
    """Of sampled estimators alone TRL scores; below 1.16 autocast takes the head's float32 tensors in bfloat16."""
    options = {"kl_estimator": "k3", "kl_monitor": SAMPLED, "cast_lm_head_to_fp32": True}
    step = STEPS["GRPO"](tmp_path, 2e-4, lora=False, half=half, **options)
    errors = step.errors_of_values(torch.float32 if FUSED_LM_HEAD else torch.bfloat16)
    assert set(errors) == set(SAMPLED)
    assert (max(errors.values()) < VALUE) == FUSED_LM_HEAD, errors


@pytest.mark.trl
@pytest.mark.parametrize("half", [False, True], ids=["autocast", "weights in bf16"])
def test_ppo_scores_sampled_estimators_truly(half: bool, tmp_path: Path) -> None:
    options = {"kl_estimator": "k3", "kl_monitor": SAMPLED}
    errors = STEPS["PPO"](tmp_path, 2e-4, lora=False, half=half, **options).errors_of_values()
    assert set(errors) == set(SAMPLED)
    assert max(errors.values()) < VALUE, errors


def test_a_scoring_by_bf16_logits_has_a_floor_and_one_by_float32_results_has_none() -> None:
    """The figures of docs/performance.md and of the warning, by TRL's own code."""
    benchmark = load("scripts/measure_bf16.py")
    rows = benchmark.main(["--kls", "0.0002", "--tokens", "512", "--hidden", "128", "--vocabulary", "500"])
    of_scoring = {(row.scoring, row.estimator): row for row in rows}
    assert {name for name, _ in of_scoring} == set(benchmark.SCORINGS)
    for scoring in set(benchmark.SCORINGS) - {"fp32 head", "trl_klx"}:
        assert all(0.3 * FLOOR < of_scoring[scoring, name].floor < 2 * FLOOR for name in ("k2", "k3"))
        assert 0.02 < of_scoring[scoring, "k1"].noise < 0.06
    for scoring in ("fp32 head", "trl_klx"):
        assert all(abs(of_scoring[scoring, name].floor) < 0.01 * 2e-4 for name in ("k1", "k2", "k3"))


@pytest.mark.situation("hold a KL in bf16 that is smaller than the rounding of TRL's log-probs", "warned")
def test_a_target_below_the_rounding_of_trls_scores_is_told_of(tmp_path: Path) -> None:
    """Of sampled estimators alone TRL scores: a target near its floor is told of, with what to set."""
    given = {"use_cpu": True, "bf16": True, "beta": 0.1, "kl_controller": "pid", "kl_target": 0.002, "report_to": []}
    with pytest.warns(UserWarning, match="adds about 0.001 nats per token to k2 and k3, and kl_target is 0.002"):
        KLXGRPOConfig(str(tmp_path), **given)
    unit = {"kl_target": 0.2, "kl_target_unit": "sequence", "max_completion_length": 100}
    with pytest.warns(UserWarning, match="is 0.002 per token: add exact to kl_monitor"):
        KLXGRPOConfig(str(tmp_path), **given | unit)
    quiet: list[dict[str, Any]] = [
        {"bf16": False},
        *([{"cast_lm_head_to_fp32": True}] if FUSED_LM_HEAD else []),
        {"kl_monitor": ["k3", "exact"]},
        {"kl_estimator": "exact"},
        {"kl_target": 0.02},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for change in quiet:
            KLXGRPOConfig(str(tmp_path), **given | change)
