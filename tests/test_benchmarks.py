"""The benchmarks run, at sizes that measure nothing: every row is there and every number is finite."""

import importlib.util
import io
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from tiny import save_tiny

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(table) -> str:
    out = io.StringIO()
    Console(width=200, file=out).print(table)
    return out.getvalue()


def test_benchmark_of_the_exact_kl(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("benchmark_exact_kl")
    results = benchmark.main(["--vocabularies", "60", "--tokens", "8", "--hidden", "8", "--repeats", "1"])
    assert [key[2] for key in results] == list(benchmark.ROUTES)
    assert all(math.isfinite(value) and value >= 0 for result in results.values() for value in result.values())
    shown = capsys.readouterr().out
    assert all(name in shown for name in benchmark.ROUTES)
    assert (benchmark.NOT_INSTALLED in shown) == (not results[60, 8, "trl"])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_routes_of_the_benchmark_compute_the_same(direction: str) -> None:
    benchmark = load("benchmark_exact_kl")
    args = benchmark.parse(["--hidden", "8", "--direction", direction])
    inputs = benchmark.make_inputs(60, 8, args)
    routes = [benchmark.route(name, args) for name in benchmark.ROUTES]
    results = [(function(**inputs), *benchmark.run(function, inputs)) for function in routes if function is not None]
    assert len(results) >= 3
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_slopes() -> None:
    benchmark = load("benchmark_exact_kl")
    assert benchmark.slope([10, 100, 1000], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert benchmark.slope([10, 100], [5.0, 5.0]) == pytest.approx(0)
    assert math.isnan(benchmark.slope([10, 10], [1.0, 2.0]))
    results = {
        (vocab, tokens, "dense"): {"bytes": 2.0 * vocab * tokens, "seconds": 3.0 * vocab * tokens**2}
        for vocab in (10, 20)
        for tokens in (4, 8)
    }
    row = next(line for line in printed(benchmark.slope_table(results)).splitlines() if "dense" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["dense", "2.00", "1.00", "1.00", "1.00"]


def test_benchmark_of_the_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("benchmark_overhead")
    arguments = ["--model", save_tiny(tmp_path / "model"), "--prompt", "3+4=", "--batch_size", "4"]
    arguments += ["--completion_length", "4", "--rounds", "2", "--whole_rounds", "1"]
    times, memory = benchmark.main([*arguments, "--no_memory"])
    assert memory == {}
    assert set(times) == {"step", "whole"}
    for seconds in times.values():
        assert list(seconds) == list(benchmark.VARIANTS)
        for name in seconds:
            assert all(math.isfinite(number) and number > 0 for number in benchmark.ratios(seconds, name))
    shown = capsys.readouterr().out
    assert all(name in shown for name in benchmark.VARIANTS)
    assert benchmark.memory_of("k3 loss", benchmark.parse(arguments)) >= 0


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is twice as slow for a round is so for all."""
    benchmark = load("benchmark_overhead")
    seconds = {benchmark.STOCK: [1.0, 2.0, 1.0, 4.0], "k3 loss": [1.5, 3.0, 1.5, 6.0]}
    assert benchmark.ratios(seconds, "k3 loss") == pytest.approx((1.5, 1.5, 1.5))


def test_benchmark_of_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("benchmark_measure")
    models = ["--reference", save_tiny(tmp_path / "reference"), "--policy", save_tiny(tmp_path / "policy", seed=1)]
    times = benchmark.main([*models, "--prompt_tokens", "3", "--tokens", "5", "--rounds", "1"])
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in times.values())
    shown = capsys.readouterr().out
    gaps = [float(line.split("at most ")[1].split()[0]) for line in shown.splitlines() if "at most" in line]
    assert len(gaps) == 13
    assert max(gaps) < 1e-5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_of_measuring_is_bounded() -> None:
    """2048 tokens of a vocabulary of 50,000 are 781 MiB of logits; the chunk holds 128 and what a block needs."""
    benchmark = load("benchmark_measure")
    assert benchmark.main(["--memory", "--vocabulary", "50000", "--tokens", "2048"]) < 300


def test_pairs_of_sums_are_one_right_and_one_wrong_answer() -> None:
    sums = load("make_sums")
    assert sums.is_right("7 plus 8 is 15.", 15)
    assert not sums.is_right("7 plus 8 is 1", 15)
    assert not sums.is_right("I do not know.", 15)
    answers = [
        {"prompt": "p", "text": text, "correct": correct, "ended": ended}
        for text, correct, ended in (
            ("cut 15", True, False),
            ("12", False, True),
            ("15", True, True),
            ("13", False, True),
        )
    ]
    (pair,) = sums.pair(answers)
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["15", "12"]
    assert sums.pair(answers[:2]) == []
