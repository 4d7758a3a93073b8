"""Standard errors that count prompts: against plain formulas, under splitting, and by simulated coverage."""

import math

import pytest
import torch
from torch import Tensor

from trl_klx.monitor.moments import prompt_sums, sequence_count, sequence_rows, summarise


def ragged_batch(prompts: int, answers: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL values with a level per prompt and one per answer, as real ones have, and lengths that correlate with them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    level = 0.6 * uniform(prompts, 1, 1) + 0.4 * uniform(prompts, answers, 1)
    noise = 0.3 * torch.randn(prompts, answers, 12, generator=generator, dtype=torch.float64)
    lengths = (1 + 8 * level + 3 * uniform(prompts, answers, 1)).long()
    mask = torch.arange(12) < lengths
    numbers = torch.arange(prompts).repeat_interleave(answers)
    return (level + noise).flatten(0, 1), mask.flatten(0, 1), numbers


def summary(values: Tensor, mask: Tensor, prompts: Tensor) -> dict[str, float]:
    return vars(summarise(prompt_sums(sequence_rows({"k1": values}, mask, prompts)), ("k1",))["k1"])


def test_against_plain_formulas() -> None:
    values, mask, prompts = ragged_batch(50, 1, seed=0)
    found = summary(values, mask, prompts)
    totals, lengths = (values * mask).sum(-1), mask.sum(-1)
    ratio = totals.sum() / lengths.sum()
    residuals = totals - ratio * lengths
    assert found["per_token"] == pytest.approx(float(values[mask].mean()))
    assert found["per_sequence"] == pytest.approx(float(totals.mean()))
    assert found["per_sequence_se"] == pytest.approx(float(totals.std() / math.sqrt(50)))
    assert found["per_token_se"] == pytest.approx(float(residuals.std() * math.sqrt(50) / lengths.sum()))


def test_answers_to_one_prompt_count_as_one() -> None:
    """Every answer four times over changes no mean and no error; as prompts of their own, they would halve it."""
    values, mask, prompts = ragged_batch(40, 1, seed=1)
    repeated = [tensor.repeat_interleave(4, 0) for tensor in (values, mask, prompts)]
    assert summary(*repeated) == pytest.approx(summary(values, mask, prompts))
    independent = summary(*repeated[:2], torch.arange(160))
    assert independent["per_sequence_se"] == pytest.approx(
        summary(values, mask, prompts)["per_sequence_se"] / 2, rel=0.02
    )


def test_order_of_rows_and_pooling_of_steps() -> None:
    values, mask, prompts = ragged_batch(40, 4, seed=2)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    whole = summary(values, mask, prompts)
    assert summary(values[order], mask[order], prompts[order]) == pytest.approx(whole)
    halves = [slice(0, 80), slice(80, 160)]  # prompts do not straddle steps
    pooled = torch.cat([prompt_sums(sequence_rows({"k1": values[h]}, mask[h], prompts[h])) for h in halves])
    assert vars(summarise(pooled, ("k1",))["k1"]) == pytest.approx(whole)
    assert sequence_count(pooled) == 160


def test_several_estimators() -> None:
    values, mask, prompts = ragged_batch(30, 2, seed=3)
    both = summarise(prompt_sums(sequence_rows({"a": values, "b": values**2}, mask, prompts)), ("a", "b"))
    assert vars(both["a"]) == pytest.approx(summary(values, mask, prompts))
    assert vars(both["b"]) == pytest.approx(summary(values**2, mask, prompts))


def test_masked_garbage_and_empty_rows_do_not_count() -> None:
    values, mask, prompts = ragged_batch(10, 2, seed=4)
    dirty = torch.cat([values.masked_fill(~mask, torch.nan), torch.full((3, 12), torch.inf)])
    padded = torch.cat([mask, torch.zeros(3, 12, dtype=torch.bool)])
    numbers = torch.cat([prompts, torch.tensor([0, 97, 98])])
    assert summary(dirty, padded, numbers) == pytest.approx(summary(values, mask, prompts))


def test_too_little_data_is_nan_not_zero() -> None:
    nothing = summary(torch.ones(2, 3), torch.zeros(2, 3), torch.arange(2))
    single = summary(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert all(math.isnan(value) for value in nothing.values())
    assert single["per_token"] == 1.0
    assert math.isnan(single["per_token_se"])


def test_coverage_of_95_percent_intervals() -> None:
    """Of 2000 simulated batches (64 prompts, 8 answers), 93 to 97 % hold the truth within 1.96 standard errors.

    With answers counted as independent, or tokens, they do not.
    """
    values, mask, prompts = ragged_batch(50_000, 8, seed=99)
    truth = summary(values, mask, prompts)
    hits = {"token": 0, "sequence": 0, "answers": 0, "tokens": 0}
    for seed in range(2000):
        values, mask, prompts = ragged_batch(64, 8, seed=1000 + seed)
        found = summary(values, mask, prompts)
        hits["token"] += abs(found["per_token"] - truth["per_token"]) < 1.96 * found["per_token_se"]
        error = abs(found["per_sequence"] - truth["per_sequence"])
        hits["sequence"] += error < 1.96 * found["per_sequence_se"]
        hits["answers"] += error < 1.96 * summary(values, mask, torch.arange(512))["per_sequence_se"]
        by_token = float(values[mask].std() / mask.sum().sqrt())
        hits["tokens"] += abs(found["per_token"] - truth["per_token"]) < 1.96 * by_token
    assert 0.93 < hits["token"] / 2000 < 0.97
    assert 0.93 < hits["sequence"] / 2000 < 0.97
    assert hits["answers"] / 2000 < 0.85
    assert hits["tokens"] / 2000 < 0.85
