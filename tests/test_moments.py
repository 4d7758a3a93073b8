"""Standard errors that count sequences: against plain formulas, under splitting, and by simulated coverage."""

import math

import pytest
import torch

from trl_klx.monitor.moments import sequence_moments, summarise


def ragged_batch(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KL values whose tokens share a per-sequence level, as real ones do, and lengths that correlate with it."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    values = level + 0.3 * torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    lengths = (1 + 8 * level + 3 * torch.rand(rows, 1, generator=generator)).long()
    return values, torch.arange(12) < lengths


def test_against_plain_formulas() -> None:
    values, mask = ragged_batch(50, seed=0)
    summary = summarise(sequence_moments({"k1": values}, mask), ("k1",))["k1"]
    totals, lengths = (values * mask).sum(-1), mask.sum(-1)
    ratio = totals.sum() / lengths.sum()
    residuals = totals - ratio * lengths
    assert summary.per_token == pytest.approx(float(values[mask].mean()))
    assert summary.per_sequence == pytest.approx(float(totals.mean()))
    assert summary.per_sequence_se == pytest.approx(float(totals.std() / math.sqrt(50)))
    assert summary.per_token_se == pytest.approx(float(residuals.std() * math.sqrt(50) / lengths.sum()))


def test_splitting_a_batch_changes_nothing() -> None:
    values, mask = ragged_batch(40, seed=1)
    whole = summarise(sequence_moments({"a": values, "b": values**2}, mask), ("a", "b"))
    parts = sum(sequence_moments({"a": v, "b": v**2}, m) for v, m in zip(values.split(7), mask.split(7), strict=True))
    for name in ("a", "b"):
        assert vars(summarise(parts, ("a", "b"))[name]) == pytest.approx(vars(whole[name]))


def test_masked_garbage_and_empty_rows_do_not_count() -> None:
    values, mask = ragged_batch(10, seed=2)
    clean = summarise(sequence_moments({"k1": values}, mask), ("k1",))["k1"]
    dirty = torch.cat([values.masked_fill(~mask, torch.nan), torch.full((3, 12), torch.inf)])
    padded = torch.cat([mask, torch.zeros(3, 12, dtype=torch.bool)])
    assert vars(summarise(sequence_moments({"k1": dirty}, padded), ("k1",))["k1"]) == pytest.approx(vars(clean))


def test_too_little_data_is_nan_not_zero() -> None:
    nothing = summarise(sequence_moments({"k1": torch.ones(2, 3)}, torch.zeros(2, 3)), ("k1",))["k1"]
    single = summarise(sequence_moments({"k1": torch.ones(1, 3)}, torch.ones(1, 3)), ("k1",))["k1"]
    assert all(math.isnan(value) for value in vars(nothing).values())
    assert single.per_token == 1.0
    assert math.isnan(single.per_token_se)


def test_coverage_of_95_percent_intervals() -> None:
    """Of 2000 simulated batches, 93 to 97 % hold the truth within 1.96 standard errors; token-wise errors do not."""
    reference_values, reference_mask = ragged_batch(400_000, seed=99)
    truth_token = float(reference_values[reference_mask].mean())
    truth_sequence = float((reference_values * reference_mask).sum(-1).mean())
    hits = {"token": 0, "sequence": 0, "naive": 0}
    for seed in range(2000):
        values, mask = ragged_batch(128, seed=1000 + seed)
        summary = summarise(sequence_moments({"k1": values}, mask), ("k1",))["k1"]
        hits["token"] += abs(summary.per_token - truth_token) < 1.96 * summary.per_token_se
        hits["sequence"] += abs(summary.per_sequence - truth_sequence) < 1.96 * summary.per_sequence_se
        naive = float(values[mask].std() / mask.sum().sqrt())
        hits["naive"] += abs(summary.per_token - truth_token) < 1.96 * naive
    assert 0.93 < hits["token"] / 2000 < 0.97
    assert 0.93 < hits["sequence"] / 2000 < 0.97
    assert hits["naive"] / 2000 < 0.85
