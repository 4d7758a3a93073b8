"""The benchmarks run, at sizes that measure nothing: every row is there and every number is finite."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.loading import load, load_part
from support.tiny import save_tiny
from torch.utils.flop_counter import FlopCounterMode

from trl_klx import rewards
from trl_klx.control import make_controller
from trl_klx.control.learners import fitted
from trl_klx.control.plants import PHASES
from trl_klx.tasks.starter import make_problems


def printed(table) -> str:
    out = io.StringIO()
    Console(width=200, file=out).print(table)
    return out.getvalue()


def test_benchmark_of_the_exact_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("scripts/benchmark_exact_kl.py")
    arguments = ["--vocabularies", "60", "--tokens", "8", "--hidden", "8", "--repeats", "1", "--no_accuracy"]
    figures = benchmark.main([*arguments, "--output", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    (case,) = figures["cases"]
    assert (case["vocabulary"], case["hidden"], case["tokens"], case["head"]) == (60, 8, 8, "trained")
    results = case["routes"]
    assert list(results) == [*benchmark.FLOORS, *benchmark.ROUTES]
    assert all(math.isfinite(value) and value >= 0 for result in results.values() for value in result.values())
    shown = capsys.readouterr().out
    assert all(name in shown for name in results)
    assert (benchmark.NOT_INSTALLED in shown) == (not results["trl"])


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_routes_of_the_benchmark_compute_the_same(direction: str, head: str) -> None:
    benchmark = load("scripts/benchmark_exact_kl.py")
    args = benchmark.parse(["--direction", direction])
    inputs = benchmark.make_inputs(benchmark.Case(60, 8, 8, head), args)
    results = {}
    for name in benchmark.ROUTES:
        function = benchmark.route(name, args)
        if function is not None:
            value = benchmark.kl_of(function(**inputs))
            results[name] = (value, *benchmark.gradients(value, inputs))
    assert len(results) >= 4
    assert len(results["dense"]) == (3 if head == "trained" else 2)
    for other in results.values():
        for found, wanted in zip(other, results["dense"], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "products", "stock"), [("trained", 4, 3), ("frozen", 3, 2)])
def test_the_floor_is_the_products_that_no_route_avoids(head: str, products: int, stock: int) -> None:
    """Counted in operations: one product of all tokens takes 2 N V H."""
    benchmark = load("scripts/benchmark_exact_kl.py")
    args = benchmark.parse(["--chunk_size", "3"])
    inputs = benchmark.make_inputs(benchmark.Case(60, 16, 8, head), args)
    for name, count in {"products": products, "stock": stock}.items():
        call = benchmark.floor(name, inputs, args)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == count * 2 * 8 * 60 * 16


def test_accuracy_of_the_benchmark() -> None:
    benchmark = load("scripts/benchmark_exact_kl.py")
    rows = benchmark.measure_accuracy(benchmark.parse(["--routes", "dense", "chunked"]))
    assert [row["route"] for row in rows] == ["dense", "chunked"] * len(benchmark.GAPS)
    assert rows[0]["nats"] == pytest.approx(0.04, rel=0.2)
    assert all(1e-9 < row["gradient of hidden"] < 1e-3 and 1e-9 < row["gradient of head"] < 1e-3 for row in rows)


def test_slopes() -> None:
    benchmark = load("scripts/benchmark_exact_kl.py")
    assert benchmark.slope([10, 100, 1000], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert benchmark.slope([10, 100], [5.0, 5.0]) == pytest.approx(0)
    assert math.isnan(benchmark.slope([10, 10], [1.0, 2.0]))
    results = {
        benchmark.Case(vocab, 8, tokens, "frozen"): {
            "dense": {"bytes": 2.0 * vocab * tokens, "seconds": 3.0 * vocab * tokens**2}
        }
        for vocab in (10, 20)
        for tokens in (4, 8)
    }
    row = next(line for line in printed(benchmark.slope_table(results)).splitlines() if "dense" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["dense", "2.00", "1.00", "1.00", "1.00"]


def test_benchmark_of_the_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("scripts/benchmark_overhead.py")
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


@pytest.mark.parametrize("frozen", [False, True])
def test_overhead_of_a_shape_in_bf16(frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights, and the policy's forward in autocast, as a training run has it."""
    benchmark = load("scripts/benchmark_overhead.py")
    used, project = set(), torch.nn.functional.linear

    def linear(hidden: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        out = project(hidden, *args)
        used.add(out.dtype if torch.is_grad_enabled() else None)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    arguments = [
        "--shape",
        "tiny",
        "--bf16",
        "--batch_size",
        "4",
        "--completion_length",
        "4",
        "--variants",
        "exact both",
    ]
    arguments += ["--rounds", "1", "--whole_rounds", "0", "--no_memory", "--output", str(tmp_path / "figures.json")]
    benchmark.main(arguments + ["--frozen"] * frozen)
    assert torch.bfloat16 in used
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["variants"]) == [benchmark.STOCK, "exact both"]
    assert figures["variants"]["exact both"]["step"]["over stock"][0] > 0


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is twice as slow for a round is so for all."""
    benchmark = load("scripts/benchmark_overhead.py")
    seconds = {benchmark.STOCK: [1.0, 2.0, 1.0, 4.0], "k3 loss": [1.5, 3.0, 1.5, 6.0]}
    assert benchmark.ratios(seconds, "k3 loss") == pytest.approx((1.5, 1.5, 1.5))


def test_benchmark_of_the_controllers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("scripts/benchmark_controllers.py")
    results = benchmark.main(["--plants", "5", "--output", str(tmp_path / "figures.json")])
    assert list(results) == list(benchmark.CONTROLLERS)
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == results
    shown = capsys.readouterr().out
    for name, phases in results.items():
        assert list(phases) == PHASES
        for phase, found in phases.items():
            assert f"{name}, {phase}" in shown
            assert all(value is None or math.isfinite(value) for value in found.values())
            assert 0 <= found["never settled"] <= 1 and 0 <= found["settling, median"] <= 600
    # What the table is for, already on five plants: a fixed beta misses a target that a PID finds.
    assert results["pid"]["start"]["within"] > results["fixed"]["start"]["within"] + 0.2


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `runs` with a starter whose model is tiny and untrained, and a few problems."""
    runs = tmp_path_factory.mktemp("runs")
    save_tiny(runs / "starter" / "model")
    (runs / "starter" / "data").mkdir()
    for split, problems, rows in zip(("train", "test"), make_problems(), (160, 16), strict=True):
        lines = [json.dumps(problem) for problem in problems[:rows]]
        (runs / "starter" / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return runs


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_benchmark_of_control_in_training(
    task: str, tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every controller trains; a finished run is not repeated, one that an interruption cut short is."""
    benchmark = load("scripts/benchmark_control_training.py")
    arguments = ["--tasks", task, "--runs", str(tiny_runs), "--traces", str(tmp_path / "traces"), "--steps", "6"]
    arguments += ["--seeds", "3", "--controllers", *benchmark.CONTROLLERS, "--levels", "0.4"]
    traces = benchmark.main([*arguments, "--picture", str(tmp_path / "p.png")])
    shown = capsys.readouterr().out
    assert [key.controller for key in traces] == list(benchmark.CONTROLLERS)
    for key, trace in traces.items():
        assert f"{task}, {key.controller}" in shown
        assert len(trace["kl"]) == len(trace["kl_se"]) == len(trace["coef"]) == len(trace["reward"]) == 6
        assert trace["every"] == 1 and trace["kl"][0] == 0  # untrained, it may earn nothing and stay where it is
    fixed, adaptive, *_ = traces.values()
    assert set(fixed["coef"]) == {0.4} and fixed["start"] == 0.4  # the level
    assert adaptive["coef"][-1] < adaptive["start"] != 0.4
    assert (tmp_path / "p.png").stat().st_size > 0
    lines = tmp_path / "traces" / f"{task}.jsonl"
    lines.write_text(lines.read_text()[:-100])  # in the middle of the last run's line
    made = []
    monkeypatch.setattr(benchmark, "run", lambda key, *rest: made.append(key) or traces[key])
    assert benchmark.main(arguments) == traces
    assert [key.controller for key in made] == [benchmark.LIMITED]
    assert benchmark.main(arguments) == benchmark.main([*arguments, "--show"]) == traces and len(made) == 1


def test_the_benchmark_shows_the_recorded_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("scripts/benchmark_control_training.py")
    pictures = ["--picture", str(tmp_path / "steps.png"), "--frontier", str(tmp_path / "frontier.png")]
    shown = benchmark.main(["--show", "--tasks", "grpo", "--controllers", "fixed", "pid", *pictures])
    assert {(key.task, key.controller) for key in shown} == {("grpo", "fixed"), ("grpo", "pid")}
    assert len(benchmark.main(["--show"])) > len(shown)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("steps.png", "frontier.png"))
    for wrong in (["--tasks", "dpo"], ["--controllers", "pid of 0.1"]):
        with pytest.raises(SystemExit):
            benchmark.main(wrong)
        assert f"{wrong[0]} {wrong[1]}: give some of" in capsys.readouterr().err


def test_the_recorded_runs_of_pid_are_of_this_pid() -> None:
    """With a run's readings, of four digits, the controller gives the run's betas."""
    benchmark = load("scripts/benchmark_control_training.py")
    traces = benchmark.main(["--show", "--controllers", "pid", benchmark.LIMITED])
    assert {key.task for key in traces} >= {"grpo", "grpo-fast", "ppo", "stories", "sums"}
    for key, trace in traces.items():
        pid = make_controller("pid", trace["start"], target=trace["level"])
        betas = [pid.update(kl) for kl in trace["kl"]]
        assert betas[:-1] == pytest.approx(trace["coef"][1:], rel=5e-3), key


def test_the_benchmark_names_each_run_once() -> None:
    benchmark = load("scripts/benchmark_control_training.py")
    keys = benchmark.wanted(benchmark.parse(["--tasks", "grpo", "stories", "--seeds", "0", "1"]))
    assert len(keys) == len(set(keys)) == 4 + 4 + 2 * (3 + 2)
    assert {key.seed for key in keys if key.controller == "fixed"} == {0}
    for name, task in benchmark.TASKS.items():
        recipe = benchmark.recipe_of(task, "pid", 0.7, 5, 11, Path("elsewhere"))
        assert (recipe["kl_controller"], recipe["kl_target"], recipe["seed"], recipe["max_steps"]) == (
            "pid",
            0.7,
            5,
            11,
        )
        assert recipe["kl_target_unit"] == "sequence" and recipe[task.coef] > 0, name
        assert recipe["model_name_or_path"].startswith("elsewhere/")
        fixed = benchmark.recipe_of(task, "fixed", 0.7, 5, 11, Path("elsewhere"))
        assert fixed[task.coef] == 0.7 and "kl_target" not in fixed
        limited = benchmark.recipe_of(task, benchmark.LIMITED, 0.7, 5, 11, Path("elsewhere"))
        assert limited == recipe | {"kl_step_limit": pytest.approx(0.015 * 0.7)}, name


def a_trace(relative: list[float], level: float = 0.4, reward: float = 0.5, error: float = 0.1) -> dict:
    kls = [value * level for value in relative]
    errors, rewards = [error * level] * len(kls), [reward] * len(kls)
    return {"level": level, "every": 1, "kl": kls, "kl_se": errors, "reward": rewards}


def test_figures_of_a_run_by_hand() -> None:
    figures = load_part("control_bench.figures")
    relative = [0.1, 0.6, 0.9, 1.5, 1.1, 0.8, 1.2, 1.0, 2.0, 1.1, 0.9, 1.0, 0.0]
    found = figures.figures(a_trace(relative))
    # Means of five from the fifth step on: 0.84 0.98 1.1 1.12 1.22 1.22 1.24 1.2 1.0
    assert (found.crossed, found.within, found.stays) == (5, 1.0, 0)
    assert found.single == pytest.approx(7 / 9)
    assert found.possible == pytest.approx(math.erf(2.5 / math.sqrt(2)))
    assert (found.overshoot, found.undershoot) == (pytest.approx(1.24), pytest.approx(0.84))
    late = figures.figures(a_trace([0.1] * 5 + [1.0] * 5 + [2.0] * 5 + [1.0] * 7))
    # 0.28 0.46 0.64 0.82 1.0 1.2 1.4 1.6 1.8 2.0 1.8 1.6 1.4 1.2 1.0 1.0 1.0
    assert (late.crossed, late.within, late.stays) == (9, pytest.approx(7 / 14), 10)
    assert figures.figures(a_trace([0.1] * 12)) == (None,) * 7
    assert figures.figures(a_trace([1.0] * 8 + [3.0] * 5)).stays is None
    coarse = {**a_trace([0.5, 0.8, 1.2, 1.4]), "every": 5}
    assert figures.figures(coarse)[:2] == (10, pytest.approx(2 / 3))


def test_the_frontier_lies_between_fixed_betas() -> None:
    figures = load_part("control_bench.figures")
    fixed = [a_trace([1.0] * 10, level=kl, reward=reward) for kl, reward in ((4.0, 0.9), (1.0, 0.5))]
    mine = a_trace([0.3] * 8 + [2.0] * 2, level=1.0, reward=0.65)  # the last fifth counts
    assert figures.over_frontier(mine, fixed) == pytest.approx(0.65 - 0.7)
    assert figures.over_frontier(a_trace([9.0] * 10, level=1.0), fixed) is None


def test_a_fit_finds_the_plant_that_made_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = load_part("control_bench.fit")
    plant = fit.follow(
        fitted("stories pid of 0.1"), fit.betas_of(made := {"coef": [0.1] * 60, "start": 0.1, "every": 1})
    )
    made |= {"task": "stories", "controller": "pid", "level": 12.8, "seed": 0, "steps": 60, "seconds": 1}
    made |= {"kl": plant[:, 0].tolist(), "kl_se": (0.1 * plant[:, 0]).tolist(), "reward": [0.5] * 60}
    assert fit.misfit(plant, made)[0] == pytest.approx(0, abs=1e-12)
    assert fit.misfit(2 * plant, made)[0] == pytest.approx(math.log(2))
    (tmp_path / "stories.jsonl").write_text(json.dumps(made))
    best = fit.main(["--traces", str(tmp_path), "--count", "300", "--rows"])
    assert [kind for kind, _ in best] == ["simulated", "learning"]
    (_, learnt) = best.values()
    assert fit.misfit(fit.follow(learnt, fit.betas_of(made)), made)[0] < 0.15
    assert "learning, stories, pid 12.8: 0." in capsys.readouterr().out


def test_benchmark_of_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("scripts/benchmark_measure.py")
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
    benchmark = load("scripts/benchmark_measure.py")
    assert benchmark.main(["--memory", "--vocabulary", "50000", "--tokens", "2048"]) < 300


def test_check_of_a_gpu_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole course with its quickest stage, on the CPU; the other stages were run so by hand."""
    check = load("scripts/check_gpu.py")
    assert check.main(["--device", "cpu", "--stages", "kernels", "--output_dir", str(tmp_path), "--patience", "3"]) == 0
    written = json.loads((tmp_path / "check.json").read_text())
    findings = written["stages"]["kernels"]["findings"]
    assert len(findings) == 2 * (2 + 2 + 3 + 2)
    assert all(row["ok"] for row in findings)
    shown = capsys.readouterr().out
    assert "0 failed" in shown and all(row["what"][:40] in shown for row in findings)


def test_a_stage_that_takes_too_long_fails_and_stops_no_other(tmp_path: Path) -> None:
    check = load("scripts/check_gpu.py")
    arguments = ["--device", "cpu", "--stages", "steps", "kernels", "--output_dir", str(tmp_path)]
    assert check.main([*arguments, "--patience", "0.001"]) == 1
    stages = json.loads((tmp_path / "check.json").read_text())["stages"]
    assert list(stages) == ["steps", "kernels"]
    for stage in stages.values():
        assert [(row["what"], row["ok"]) for row in stage["findings"]] == [("the stage", False)]


def test_the_check_of_a_gpu_machine_ends_within_eight_minutes() -> None:
    check = load("scripts/check_gpu.py")
    assert sum(check.ALONE.values()) + max(check.TOGETHER.values()) <= 460


def test_layouts_are_compared_by_their_furthest_number() -> None:
    layouts = load("scripts/gpu_check/layouts.py")
    alone = [{"loss": 1e-7 * step, "grad_norm": 0.5, "kl/exact": 0.01 * step, "kl/coef": 0.5} for step in range(4)]
    assert layouts.furthest(alone, alone) == (0.0, "loss at step 1")
    other = [dict(row) for row in alone]
    other[2]["grad_norm"], other[1]["loss"] = 0.51, 5e-6  # the loss differs by next to nothing
    assert layouts.furthest(other, alone) == (pytest.approx(0.01 / 0.51), "grad_norm at step 3")
    other[3]["kl/exact"] = math.nan
    assert not layouts.furthest(other, alone)[0] <= layouts.TOLERANCE
    assert layouts.furthest(alone[:3], alone)[0] == math.inf


def test_benchmark_of_stale_answers(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO, and GRPO with an engine that is behind; a finished run is not repeated."""
    benchmark = load("scripts/benchmark_staleness.py")
    # An untrained model is never right.
    monkeypatch.setattr(rewards, "exact_match", lambda completions, **_: [len(text) / 8 for text in completions])
    arguments = ["--starter", str(tiny_runs / "starter"), "--output_dir", str(tmp_path), "--seeds", "3"]
    arguments += ["--situations", "ppo", "engine near", "--ppo_steps", "2", "--engine_steps", "8"]
    arguments += ["--kls", "k1 reward", "--weights", "default", "prefix"]
    runs = benchmark.main(arguments)
    assert [(run["situation"], run["weights"]) for run in runs] == [
        (situation, weights) for situation in ("ppo", "engine near") for weights in ("default", "prefix")
    ]
    for run in runs:
        found = benchmark.figures(run, start=0.0)
        assert found.kl > 0 and found.gradient > 0 and math.isfinite(found.gain)
        assert (found.behind is not None) == (run["situation"] == "engine near")
        assert found.behind is None or found.behind > 0
    assert benchmark.main(arguments) == runs
    assert "engine near, k1 reward, prefix" in capsys.readouterr().out


def test_plot_of_staleness(tmp_path: Path) -> None:
    plot = load("scripts/plot_staleness.py")
    errors, variances, shares = plot.main(["--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert max(errors["exact in both, prefix"]) < 1e-9 < min(errors["exact in both, token"])
    assert variances["k1 in reward, prefix"] < variances["k1 in reward, token"]
    for level, share in shares.items():
        assert share == sorted(share, reverse=True), level
    assert all(token > prefix > whole for token, prefix, whole in zip(*shares.values(), strict=True))
