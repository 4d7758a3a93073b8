"""Measures what an exact KL costs: extra peak memory and time, forward and backward, by route, vocabulary and tokens.

python scripts/benchmark_exact_kl.py --tokens 256 1024 --vocabularies 32000 49152 128000 152000

Every route goes from the hidden states of policy and reference, (N, H), and two output heads, (V, H), to the gradients
of the policy's hidden states and head. `dense` projects both and calls `exact_kl`; `logits` projects the policy's and
gives them to `chunked_exact_kl_from_logits`, as a trainer does that has them already; `chunked` is `chunked_exact_kl`;
`trl` is TRL's own `ChunkedDivergenceFunction` where it is installed.

Peak memory is what a route takes beyond inputs and returned gradients. On a CPU it is the peak resident size of a
fresh process for each case, minus that of a process that makes only inputs and gradients; on CUDA it is the allocator's
peak. Time is the median of interleaved repeats in one process.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

ROUTES = ("dense", "logits", "chunked", "trl")
NOT_INSTALLED = "needs trl>=1.16"

Arguments = argparse.Namespace
Result = dict[str, float]


def parse(arguments: list[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 49_152, 128_000, 152_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hidden", type=int, default=576, help="hidden size of policy and reference (default: 576)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each case; the median is reported")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, on a busy machine")
    parser.add_argument("--direction", choices=["reverse", "forward"], default="reverse")
    parser.add_argument("--frozen_head", action="store_true", help="no gradient for the head, as with LoRA")
    parser.add_argument("--chunk_size", type=int, help="tokens per chunk (default: the package's)")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one case as JSON, run in this process
    return parser.parse_args(arguments)


# --- in the process that measures. Torch is imported here: the parent's size would hide a child's ---------------------


def make_inputs(vocab: int, tokens: int, args: Arguments) -> dict[str, Any]:
    """Hidden states and heads; logits have a standard deviation near 3, the reference's differ by about 0.3."""
    import torch

    generator = torch.Generator(args.device).manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    def normal(rows: int, scale: float) -> Any:
        return torch.empty(rows, args.hidden, **options).normal_(0, scale, generator=generator)

    hidden, weight = normal(tokens, 1.0), normal(vocab, 3 / math.sqrt(args.hidden))
    ref_hidden = normal(tokens, 0.1).add_(hidden)
    hidden.requires_grad_()
    weight.requires_grad_(not args.frozen_head)
    return {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": weight.detach().clone()}


def trl_divergence() -> Any:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return None
    return ChunkedDivergenceFunction


def route(name: str, args: Arguments) -> Callable[..., Any] | None:
    """(hidden, weight, ref_hidden, ref_weight) -> (N,) KL, or None where the route is not installed."""
    import torch
    from torch.nn.functional import linear

    from trl_klx.kl import chunked_exact_kl, chunked_exact_kl_from_logits, exact_kl

    options = {"direction": args.direction, "chunk_size": args.chunk_size}

    def dense(hidden, weight, ref_hidden, ref_weight):
        with torch.no_grad():
            ref_logits = linear(ref_hidden, ref_weight)
        return exact_kl(linear(hidden, weight), ref_logits, args.direction)

    def logits(hidden, weight, ref_hidden, ref_weight):
        return chunked_exact_kl_from_logits(linear(hidden, weight), ref_hidden, ref_weight, **options)

    def chunked(hidden, weight, ref_hidden, ref_weight):
        return chunked_exact_kl(hidden, weight, ref_hidden, ref_weight, **options)

    def trl(hidden, weight, ref_hidden, ref_weight):
        beta = 1.0 if args.direction == "reverse" else 0.0
        return trl_divergence().apply(hidden, weight, None, ref_hidden, ref_weight, None, beta)[0]

    routes = {"dense": dense, "logits": logits, "chunked": chunked, "trl": trl}
    return None if name == "trl" and trl_divergence() is None else routes[name]


def run(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, ...]:
    """One forward and backward; the gradients."""
    import torch

    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    gradients = torch.autograd.grad(function(**inputs).mean(), leaves)
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
    return gradients


def measure_memory(case: dict[str, Any], args: Arguments) -> Result:
    """Peak bytes of this process after one run of the route, or after inputs and gradients alone (route "none")."""
    import torch

    function = None if case["route"] == "none" else route(case["route"], args)
    if case["route"] != "none" and function is None:
        return {}
    dense = route("dense", args)
    assert dense is not None
    run(function or dense, make_inputs(50, 4, args))  # loads what a first call loads
    inputs = make_inputs(case["vocab"], case["tokens"], args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    if function is None:
        made = [torch.zeros_like(tensor).add_(1) for tensor in inputs.values() if tensor.requires_grad]
        assert made
    else:
        run(function, inputs)
    if args.device != "cpu":
        return {"peak": torch.cuda.max_memory_allocated()}
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_times(case: dict[str, Any], args: Arguments) -> Result:
    """Median seconds by route; the routes take turns, so that a busy moment of the machine meets all of them."""
    functions = {name: route(name, args) for name in args.routes}
    installed = {name: function for name, function in functions.items() if function is not None}
    inputs = make_inputs(case["vocab"], case["tokens"], args)
    seconds: dict[str, list[float]] = {name: [] for name in installed}
    now = time.perf_counter if args.clock == "wall" else time.process_time
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, function in installed.items():
            start = now()
            run(function, inputs)
            if repeat:
                seconds[name].append(now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# --- in the parent ---------------------------------------------------------------------------------------------------


def in_fresh_process(case: dict[str, Any], args: Arguments) -> Result:
    settings = {name: value for name, value in vars(args).items() if name != "worker"}
    command = [sys.executable, __file__, "--worker", json.dumps({"case": case, "settings": settings})]
    # glibc keeps freed blocks of up to 32 MiB for reuse: with a fixed threshold they go back, as larger ones do.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ} if case["kind"] == "memory" else dict(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: Arguments) -> dict[tuple[int, int, str], Result]:
    """(vocabulary, tokens, route) -> extra peak bytes and seconds; empty where the route is not installed."""
    out: dict[tuple[int, int, str], Result] = {}
    for vocab in args.vocabularies:
        for tokens in args.tokens:
            case = {"vocab": vocab, "tokens": tokens}
            seconds = in_fresh_process({**case, "kind": "time"}, args)
            base = in_fresh_process({**case, "kind": "memory", "route": "none"}, args)["peak"]
            for name in args.routes:
                if name not in seconds:
                    out[vocab, tokens, name] = {}
                    continue
                peak = in_fresh_process({**case, "kind": "memory", "route": name}, args)["peak"]
                out[vocab, tokens, name] = {"bytes": max(peak - base, 0.0), "seconds": seconds[name]}
                print(f"vocabulary {vocab}, {tokens} tokens, {name}: {out[vocab, tokens, name]}", file=sys.stderr)
    return out


def slope(sizes: list[int], values: list[float]) -> float:
    """Least-squares slope of log(value) over log(size): 1 is linear, 0 constant; NaN with fewer than two sizes."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return math.nan
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def cost_table(results: dict[tuple[int, int, str], Result]) -> Table:
    table = Table(title="Exact KL, forward and backward: extra peak memory and median time")
    for column in ("vocabulary", "tokens", "route", "extra MiB", "of dense", "ms", "of dense"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for (vocab, tokens, name), result in results.items():
        if not result:
            table.add_row(str(vocab), str(tokens), name, NOT_INSTALLED, "", "", "")
            continue
        dense = results.get((vocab, tokens, "dense"), {})
        share = [f"{result[key] / dense[key]:.2f}" if dense.get(key) else "" for key in ("bytes", "seconds")]
        table.add_row(
            str(vocab),
            str(tokens),
            name,
            f"{result['bytes'] / 2**20:.0f}",
            share[0],
            f"{1000 * result['seconds']:.0f}",
            share[1],
        )
    return table


def slope_table(results: dict[tuple[int, int, str], Result]) -> Table:
    """Slopes are medians over the other size."""
    table = Table(title="Log-log slopes (1: linear, 0: constant)")
    for column in ("route", "time in tokens", "time in vocabulary", "memory in tokens", "memory in vocabulary"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for name in dict.fromkeys(key[2] for key in results):
        cells = []
        for quantity in ("seconds", "bytes"):
            for axis, other in ((1, 0), (0, 1)):
                slopes = []
                for fixed in {key[other] for key in results}:
                    keys = [key for key in results if key[2] == name and key[other] == fixed and results[key]]
                    slopes.append(slope([key[axis] for key in keys], [results[key][quantity] for key in keys]))
                known = [number for number in slopes if not math.isnan(number)]
                cells.append(f"{statistics.median(known):.2f}" if known else "")
        table.add_row(name, *cells)
    return table


def main(arguments: list[str] | None = None) -> dict[tuple[int, int, str], Result]:
    args = parse(arguments)
    if args.worker:
        task = json.loads(args.worker)
        settings, case = Arguments(**task["settings"]), task["case"]
        print(json.dumps((measure_memory if case["kind"] == "memory" else measure_times)(case, settings)))
        return {}
    results = measure(args)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(cost_table(results))
    console.print(slope_table(results))
    return results


if __name__ == "__main__":
    main()
