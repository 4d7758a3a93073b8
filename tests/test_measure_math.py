"""The parts of `trl-klx measure` that are functions: divergences, standard errors, spikes, classes of tokens."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trl_klx.kl import exact_kl
from trl_klx.measure.passes.divergence import TokenStatistics, chunked_token_statistics, token_statistics
from trl_klx.measure.passes.errors import MeasureError
from trl_klx.measure.statistics.spikes import FALSE_POSITIVES, SPIKE_FLOOR, spike_threshold
from trl_klx.measure.statistics.token_classes import DEFAULT_CLASSES, classify, load_classes
from trl_klx.monitor.moments import prompt_sums, sequence_rows, summarise
from trl_klx.monitor.uncertainty import Estimate, difference, ratio


def random_logits(rows: int = 7, vocab: int = 11, *, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = (3 * torch.randn(rows, vocab, generator=generator, dtype=dtype) for _ in range(2))
    return logits, ref_logits, torch.randint(vocab, (rows,), generator=generator)


def brute_force(logits: list[float], ref_logits: list[float], token: int) -> dict[str, float | list[int]]:
    """Every statistic from its definition, in plain Python."""
    p, r = ([math.exp(z) / sum(math.exp(y) for y in row) for z in row] for row in (logits, ref_logits))

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def top(a: list[float]) -> list[int]:
        return sorted(range(len(a)), key=lambda v: -a[v])[:5]

    middle = [(x + y) / 2 for x, y in zip(p, r, strict=True)]
    return {
        "kl_policy_ref": kl(p, r),
        "kl_ref_policy": kl(r, p),
        "js": (kl(p, middle) + kl(r, middle)) / 2,
        "tv": sum(abs(x - y) for x, y in zip(p, r, strict=True)) / 2,
        "log_ratio": math.log(p[token] / r[token]),
        "entropy_policy": -sum(x * math.log(x) for x in p),
        "entropy_ref": -sum(x * math.log(x) for x in r),
        "logp_policy": math.log(p[token]),
        "logp_ref": math.log(r[token]),
        "prob_policy": p[token],
        "prob_ref": r[token],
        "rank_policy": 1 + sum(x > p[token] for x in p),
        "rank_ref": 1 + sum(x > r[token] for x in r),
        "top_ids_policy": top(p),
        "top_probs_policy": [p[v] for v in top(p)],
        "top_ids_ref": top(r),
        "top_probs_ref": [r[v] for v in top(r)],
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_statistics_are_their_definitions(dtype: torch.dtype, tolerance: float) -> None:
    logits, ref_logits, tokens = random_logits()
    found = token_statistics(logits.to(dtype), ref_logits.to(dtype), tokens)
    for row in range(len(tokens)):
        expected = brute_force(logits[row].tolist(), ref_logits[row].tolist(), int(tokens[row]))
        assert set(expected) == set(TokenStatistics._fields)
        for name, value in expected.items():
            assert getattr(found, name)[row].tolist() == pytest.approx(value, rel=tolerance, abs=tolerance), name


def test_kls_are_the_training_maths() -> None:
    logits, ref_logits, tokens = random_logits()
    found = token_statistics(logits, ref_logits, tokens)
    torch.testing.assert_close(found.kl_policy_ref, exact_kl(logits, ref_logits), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.kl_ref_policy, exact_kl(logits, ref_logits, "forward"), rtol=1e-12, atol=0)


def test_equal_logits_give_exactly_zero() -> None:
    logits, _, tokens = random_logits(dtype=torch.float32)
    found = token_statistics(logits, logits.clone(), tokens)
    for name in ("kl_policy_ref", "kl_ref_policy", "js", "tv", "log_ratio"):
        assert getattr(found, name).tolist() == [0.0] * len(tokens), name


@pytest.mark.parametrize(("noise", "tolerance"), [(1e-2, 5e-3), (1e-3, 3e-2)])
def test_near_equal_models_keep_their_small_kl_in_float32(noise: float, tolerance: float) -> None:
    """Of a KL of 5e-7 nats, sum p log(p/r) over 50,000 tokens in float32 would leave noise.

    How exp rounds depends on the processor: with AVX2 the smaller one is 1.5 % off, with AVX-512 less than 0.5 %.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    ref_logits = logits + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    tokens = torch.zeros(4, dtype=torch.long)
    exact = token_statistics(logits, ref_logits, tokens)
    found = token_statistics(logits.float(), ref_logits.float(), tokens)
    for name in ("kl_policy_ref", "kl_ref_policy", "js"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=tolerance, atol=0)


def test_tokens_that_a_model_rules_out() -> None:
    """-inf in both counts for nothing; mass where the other has none makes that KL infinite and leaves the rest."""
    inf = math.inf
    logits = torch.tensor([[0.0, 1.0, -inf, -inf], [0.0, 1.0, 2.0, -inf], [0.0, 1.0, -inf, -inf]])
    ref_logits = torch.tensor([[1.0, 0.5, -inf, -inf], [1.0, 0.5, -inf, -inf], [1.0, 0.5, 0.3, -inf]])
    found = token_statistics(logits, ref_logits, torch.tensor([0, 2, 2]))
    plain = token_statistics(logits[:1, :2], ref_logits[:1, :2], torch.tensor([0]))
    assert found.kl_policy_ref[0].item() == pytest.approx(plain.kl_policy_ref.item(), rel=1e-6)
    assert found.js[0].item() == pytest.approx(plain.js.item(), rel=1e-6)
    assert found.kl_policy_ref[1:].tolist() == [inf, found.kl_policy_ref[2].item()]
    assert found.kl_ref_policy[1].isfinite()
    assert found.kl_ref_policy[2] == inf
    assert found.log_ratio[1:].tolist() == [inf, -inf]
    assert found.prob_ref[1] == 0
    for name in ("js", "tv", "entropy_policy", "entropy_ref"):
        assert getattr(found, name).isfinite().all(), name
    assert (found.js <= math.log(2)).all()


def test_opposite_certainties_reach_the_bounds() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    found = token_statistics(logits, logits.flip(-1), torch.tensor([0]))
    assert found.js.item() == pytest.approx(math.log(2), rel=1e-6)
    assert found.tv.item() == pytest.approx(1)
    assert found.kl_policy_ref.item() == pytest.approx(200)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, None])
def test_chunks_do_not_change_a_number(chunk_size: int | None) -> None:
    logits, ref_logits, tokens = random_logits()
    found = chunked_token_statistics(
        lambda rows: rows * 2,
        logits / 2,
        lambda rows: rows * 2,
        ref_logits / 2,
        tokens,
        vocab_size=11,
        chunk_size=chunk_size,
    )
    for mine, theirs in zip(found, token_statistics(logits, ref_logits, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_no_more_than_a_chunk_is_projected() -> None:
    """Memory: neither head is asked for more rows than the chunk."""
    seen = []

    def project(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows

    logits, ref_logits, tokens = random_logits()
    chunked_token_statistics(project, logits, project, ref_logits, tokens, vocab_size=11, chunk_size=3)
    assert seen == [3, 3, 3, 3, 1, 1]


def test_wrong_shapes_are_refused() -> None:
    logits, ref_logits, tokens = random_logits()
    with pytest.raises(ValueError, match=r"give \(N, V\) twice"):
        token_statistics(logits, ref_logits[:, :-1], tokens)


# --- standard errors --------------------------------------------------------------------------------------------------


def grouped_ratio(totals: np.ndarray, sizes: np.ndarray, groups: np.ndarray) -> Estimate:
    return ratio(*(np.bincount(groups, weights=column) for column in (totals, sizes)))


def test_errors_are_those_of_training() -> None:
    """The same definition as `monitor.moments`, which training uses."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(12, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    prompts = torch.arange(12) // 3
    expected = summarise(prompt_sums(sequence_rows({"exact": values}, mask, prompts)), ("exact",))["exact"]
    totals, tokens = (values * mask).sum(-1).numpy(), mask.sum(-1).numpy()
    per_token = grouped_ratio(totals, tokens, prompts.numpy())
    per_sequence = grouped_ratio(totals, np.ones(12), prompts.numpy())
    assert per_token[:2] == pytest.approx((expected.per_token, expected.per_token_se))
    assert per_sequence[:2] == pytest.approx((expected.per_sequence, expected.per_sequence_se))


@pytest.mark.parametrize("shared", [True, False])
def test_intervals_of_a_difference_hold_the_truth(shared: bool) -> None:
    """Right and wrong answers to the same prompts, or to different ones: 95 % intervals hold the difference in about
    95 % of worlds. Taken as independent, answers to shared prompts would give intervals twice too wide."""
    generator = np.random.default_rng(0)
    held, widths = [], []
    for _ in range(1000):
        prompts = np.arange(60) % 30 if shared else np.arange(60)
        level = generator.normal(0, 1, 60)[prompts]
        totals = level + generator.normal(0, 0.3, 60) + np.where(np.arange(60) < 30, 0.5, 0.0)
        wrong = np.arange(60) < 30
        estimates = [grouped_ratio(np.where(rows, totals, 0), rows.astype(float), prompts) for rows in (wrong, ~wrong)]
        gap, se = difference(*estimates)
        held.append(abs(gap - 0.5) < 1.96 * se)
        widths.append(se)
    assert 0.92 < np.mean(held) < 0.975
    assert (np.mean(widths) < 0.15) == shared


def test_nothing_has_no_error() -> None:
    nothing = ratio(np.zeros(2), np.zeros(2))
    assert math.isnan(nothing.mean) and math.isnan(nothing.se)
    alone = ratio(np.array([4.0]), np.array([2.0]))
    assert alone.mean == 2 and math.isnan(alone.se)


# --- spikes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("location", "expected"), [(10.0, FALSE_POSITIVES[0]), (0.0, FALSE_POSITIVES[1])])
def test_spikes_on_noise_are_as_rare_as_stated(location: float, expected: float) -> None:
    kl = (0.1 * np.abs(np.random.default_rng(0).normal(location, 1, 2_000_000))) ** 2
    assert (kl > spike_threshold(kl)).mean() == pytest.approx(expected, rel=0.1)


def test_noise_in_logits_gives_no_more_spikes_than_stated() -> None:
    """Softmaxes of every certainty, with a little noise in every logit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 50, generator=generator, dtype=torch.float64)
    noisy = logits + 0.3 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    kl = token_statistics(logits, noisy, torch.zeros(len(logits), dtype=torch.long)).kl_policy_ref.numpy()
    assert 0 < (kl > spike_threshold(kl)).mean() < FALSE_POSITIVES[2]


def test_spikes_are_found_and_do_not_hide_each_other() -> None:
    generator = np.random.default_rng(0)
    kl = generator.normal(0, 0.1, 1000) ** 2
    kl[:50] = 5.0  # one in twenty: a mean and standard deviation would be moved by them
    assert set((kl > spike_threshold(kl)).nonzero()[0]) >= set(range(50))
    assert (kl > spike_threshold(kl)).sum() < 60


def test_spikes_need_some_size() -> None:
    quiet = np.full(1000, 1e-9)
    quiet[0] = 0.9 * SPIKE_FLOOR
    assert spike_threshold(quiet) == SPIKE_FLOOR
    assert spike_threshold(np.zeros(3)) == math.inf
    assert (np.array([math.inf]) > spike_threshold(np.array([1.0, math.inf]))).all()


# --- classes of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "whitespace") for text in (" ", "\n\n", "\t")),
        *((text, "number") for text in ("7", " 42", "3.14", "-1", "1,000")),
        *((text, "math") for text in ("+", " =", "≤", "\\frac", "$", "∑")),
        *((text, "logic") for text in (" therefore", "Because", " not", "if", "Wait")),
        *((text, "code") for text in ("{", "();", " def", " return", "_", "#")),
        *((text, "punctuation") for text in (".", ",", "!", ' "')),
        *((text, "word") for text in (" house", "Haus", "don't", "été")),
        *((text, "other") for text in ("", "7b", "�a")),
    ],
)
def test_default_classes(text: str, expected: str) -> None:
    assert classify([text], [5], {0}, DEFAULT_CLASSES) == [expected]


def test_special_tokens_are_known_by_their_ids() -> None:
    assert classify(["+", "+"], [0, 5], {0}, DEFAULT_CLASSES) == ["special", "math"]


def test_own_classes_come_first(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("units: ' ?(?:kg|cm)'\nnumber: '[0-9]'\n")
    classes = load_classes(path)
    assert list(classes)[:2] == ["units", "number"]
    assert classify([" kg", "7", "42", "if"], [5] * 4, set(), classes) == ["units", "number", "other", "logic"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist: give a YAML file"),
        ("- a\n- b\n", "is not a mapping of name: regular expression"),
        ("a: [", "is not YAML"),
        ("a: '('\n", "the token class 'a' is not a regular expression"),
    ],
)
def test_wrong_classes_are_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "classes.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MeasureError, match=sentence):
        load_classes(path)
