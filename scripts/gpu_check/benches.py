"""The benchmarks at the bars: time and memory of the exact KL, and of an optimizer step."""

import json
import math
import os
from pathlib import Path
from typing import Any

from gpu_check import Report, Settings, last_words, run

# Of the products, by hidden size. Beside them the logits of both models are passed over, whatever the hidden size: at
# 1536 that alone takes a third of the products' time (docs/performance.md).
RATIOS = {1536: 1.6, 3584: 1.35, 4096: 1.35}
PEAK = 1e9  # bytes, with a frozen head at a vocabulary of 152,000
ERRORS = {"value": 0.01, "gradient of hidden": 0.02, "gradient of head": 0.02}
EXACT_STEP, SAMPLED_STEP = 1.08, 1.01  # of stock's
ROUNDS = 7
_VARIANTS = ("stock again", "k1 reward", "k2 loss", "k3 loss", "exact loss", "exact both")


def exact_kl(settings: Settings, report: Report) -> None:
    folder = settings.folder("exact_kl")
    options = ["--pair", "--heads", "frozen", "trained", "--token_weights", "--repeats", "5"]
    if settings.is_try:
        options += ["--vocabularies", "500", "--hidden", "16", "--tokens", "32"]
    else:
        options += ["--vocabularies", "128256", "151936", "152064", "--hidden", "4096", "1536", "3584"]
        options += ["--tokens", "8192"]
    found = _figures("benchmark_exact_kl", [*options, "--device", settings.device], folder, "exact_kl", {})
    for case in found["cases"]:
        where = f"V {case['vocabulary']}, H {case['hidden']}, N {case['tokens']}, {case['head']} head"
        routes = case["routes"]
        floor = routes["products"]["seconds"]
        report.add(f"{where}: its products", f"{1000 * floor:.3g} ms")
        bar = RATIOS.get(case["hidden"], 1.35)
        report.at_most(f"{where}: chunked, of its products", routes["chunked"]["seconds"] / floor, bar, of_size=True)
        if case["head"] == "frozen" and case["vocabulary"] > 150_000:
            report.at_most(f"{where}: chunked, peak in GB", routes["chunked"]["bytes"] / 1e9, PEAK / 1e9, of_size=True)
        for name, result in routes.items():
            if result and name not in ("products", "chunked"):
                memory = f", {result['bytes'] / 1e9:.2f} GB" if "bytes" in result else ""
                report.add(f"{where}: {name}", f"{result['seconds'] / floor:.3g} of the products{memory}")
    for row in found["accuracy"]:
        for what, bar in ERRORS.items():
            barred = row["route"] in ("chunked", "scores")
            name = f"{row['route']} at {row['nats']:.1g} nats: error of {what}"
            report.at_most(name, row[what], bar) if barred else report.add(name, f"{row[what]:.3g}")


def steps(settings: Settings, report: Report) -> None:
    """A step so large that the device is never idle: else the host's noise is many times the bar."""
    size = ["--shape", "qwen2.5-0.5b", "--batch_size", "32", "--completion_length", "512", "--rounds", str(ROUNDS)]
    if settings.is_try:
        size = ["--shape", "tiny", "--batch_size", "4", "--completion_length", "4", "--rounds", "2"]
    options = [*size, "--whole_rounds", "0", "--no_memory", "--variants", *_VARIANTS]
    folder, path = settings.folder("steps"), os.environ.get("PYTHONPATH")
    paths = [path] if settings.other_trl is None else [path, os.pathsep.join(filter(None, (settings.other_trl, path)))]
    for number, places in enumerate(paths):
        variables = {} if places is None else {"PYTHONPATH": places}
        found = _figures("benchmark_overhead", options, folder, f"steps{number}", variables)
        where = f"TRL {found['trl']}"
        for name, kinds in found["variants"].items():
            ratio, error = kinds["step"]["over stock"][0], _error(kinds["step"]["over stock"])
            row = f"{where}: {name}, of stock's (error {error:.3f})"
            if name == "stock k3 loss":
                report.add(f"{where}: {name}", f"{1000 * kinds['step']['seconds']:.1f} ms")
            elif name == "stock again":
                report.add(row, f"{ratio:.4g}", "the noise")
            else:
                _judge(report, row, ratio, error, EXACT_STEP if "exact" in name else SAMPLED_STEP, settings.is_try)


def _error(median_and_quartiles: list[float]) -> float:
    """The standard error of a median, were the rounds' ratios normal."""
    _, low, high = median_and_quartiles
    return 1.25 * (high - low) / 1.35 / math.sqrt(ROUNDS)


def _judge(report: Report, row: str, ratio: float, error: float, bar: float, is_try: bool) -> None:
    """A ratio within two standard errors of its bar is neither above nor below it."""
    if abs(ratio - bar) > 2 * error or is_try:
        report.at_most(row, ratio, bar, of_size=True)
    else:
        report.add(row, f"{ratio:.4g}", f"at most {bar:g}: the noise hides it")


def _figures(script: str, options: list[str], folder: Path, name: str, variables: dict[str, str]) -> dict[str, Any]:
    output, log = folder / f"{name}.json", folder / f"{name}.log"
    status = run([f"scripts/{script}.py", *options, "--output", str(output)], log, **variables)
    if status:
        raise RuntimeError(f"{script} ended with {status}: {last_words(log)}")
    return json.loads(output.read_text(), parse_constant=lambda _: math.nan)
