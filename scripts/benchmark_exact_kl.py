"""Measures what an exact KL costs, forward and backward, by route, vocabulary, hidden size, tokens and head.

python scripts/benchmark_exact_kl.py --tokens 256 1024 --vocabularies 32000 49152 128000 152000

Every route goes from the hidden states of policy and reference, (N, H), and two output heads, (V, H), to the gradients
of the policy's hidden states and, if it is trained, head:

- dense: projects both and calls `exact_kl`;
- logits: projects the policy's and gives them to `chunked_exact_kl_from_logits`, as a trainer does that has them;
- chunked: `chunked_exact_kl`;
- scores: `token_scores`, the log-probs of N tokens and their entropy besides the exact KL;
- trl: TRL's own `ChunkedDivergenceFunction`, where it is installed.

`products` is the floor: the matrix products alone that no route avoids (policy, reference, the gradient of the hidden
states, and that of a trained head), in the same precision and chunks. `stock` are those of the policy's log-probs
alone: what `scores` takes beyond it is the price of the exact KL where log-probs are computed anyway.

Time is the median over rounds in which all take turns, by events of the stream on CUDA. Peak memory is what a route
takes beyond inputs and returned gradients: on CUDA by the allocator; on a CPU the resident size of a fresh process,
minus that of one that makes only inputs and gradients. Accuracy is against float64, on the same rounded inputs.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROUTES = ("dense", "logits", "chunked", "scores", "trl")
FLOORS = ("products", "stock")
NOT_INSTALLED = "needs trl>=1.16"
GAPS = (0.1, 0.01)  # of the hidden states, at which the accuracy is measured: about 0.04 and 0.0004 nats per token

Arguments = argparse.Namespace
Result = dict[str, float]  # "seconds" and "bytes"; empty where a route is not installed


class Case(NamedTuple):
    vocabulary: int
    hidden: int
    tokens: int
    head: str  # "trained" or "frozen"


Results = dict[Case, dict[str, Result]]


def parse(arguments: list[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 49_152, 128_000, 152_000])
    parser.add_argument("--hidden", type=int, nargs="+", default=[576], help="hidden sizes of policy and reference")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--pair", action="store_true", help="first vocabulary with first hidden size, and so on")
    parser.add_argument("--heads", nargs="+", choices=["trained", "frozen"], default=["trained"], help="frozen: LoRA")
    parser.add_argument("--token_weights", action="store_true", help="tell `chunked` the tokens' weights beforehand")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each case; the median is reported")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, on a busy machine")
    parser.add_argument("--direction", choices=["reverse", "forward"], default="reverse")
    parser.add_argument("--chunk_size", type=int, help="tokens per chunk (default: the package's)")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--no_accuracy", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one case as JSON, run in this process
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def cases(args: Arguments) -> Iterator[Case]:
    if args.pair:
        sizes = list(zip(args.vocabularies, args.hidden, strict=True))
    else:
        sizes = [(vocabulary, hidden) for vocabulary in args.vocabularies for hidden in args.hidden]
    for vocabulary, hidden in sizes:
        for tokens in args.tokens:
            for head in args.heads:
                yield Case(vocabulary, hidden, tokens, head)


# --- in the process that measures. Torch is imported here: the parent's size would hide a child's ---------------------


def make_inputs(case: Case, args: Arguments, gap: float = 0.1) -> dict[str, Any]:
    """Hidden states and heads; logits have a standard deviation near 3, and the reference's differ by 3 * `gap`."""
    import torch

    generator = torch.Generator(args.device).manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    def normal(rows: int, scale: float) -> Any:
        return torch.empty(rows, case.hidden, **options).normal_(0, scale, generator=generator)

    hidden, weight = normal(case.tokens, 1.0), normal(case.vocabulary, 3 / math.sqrt(case.hidden))
    ref_hidden = normal(case.tokens, gap).add_(hidden)
    hidden.requires_grad_()
    weight.requires_grad_(case.head == "trained")
    return {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": weight.detach().clone()}


def trl_divergence() -> Any:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return None
    return ChunkedDivergenceFunction


def route(name: str, args: Arguments) -> Callable[..., Any] | None:
    """(hidden, weight, ref_hidden, ref_weight) -> (N,) KL, with the log-probs below it (2, N) for scores; None where
    the route is not installed."""
    import torch
    from torch.nn.functional import linear

    from trl_klx.kl import chunked_exact_kl, chunked_exact_kl_from_logits, exact_kl, token_scores

    options = {"direction": args.direction, "chunk_size": args.chunk_size}

    def dense(hidden, weight, ref_hidden, ref_weight):
        with torch.no_grad():
            ref_logits = linear(ref_hidden, ref_weight)
        return exact_kl(linear(hidden, weight), ref_logits, args.direction)

    def logits(hidden, weight, ref_hidden, ref_weight):
        return chunked_exact_kl_from_logits(linear(hidden, weight), ref_hidden, ref_weight, **options)

    def chunked(hidden, weight, ref_hidden, ref_weight):
        known = {"token_weights": hidden.new_ones(hidden.size(0), dtype=torch.float32)} if args.token_weights else {}
        return chunked_exact_kl(hidden, weight, ref_hidden, ref_weight, **known, **options)

    def scores(hidden, weight, ref_hidden, ref_weight):
        targets = torch.arange(hidden.size(0), device=hidden.device) % weight.size(0)
        reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
        found = token_scores(hidden, weight, targets, **reference, with_entropy=True, **options)
        return torch.stack((found.exact, found.logps))

    def trl(hidden, weight, ref_hidden, ref_weight):
        beta = 1.0 if args.direction == "reverse" else 0.0
        return trl_divergence().apply(hidden, weight, None, ref_hidden, ref_weight, None, beta)[0]

    routes = {"dense": dense, "logits": logits, "chunked": chunked, "scores": scores, "trl": trl}
    return None if name == "trl" and trl_divergence() is None else routes[name]


def kl_of(out: Any) -> Any:
    return out if out.dim() == 1 else out[0]


def gradients(out: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(out.mean(-1).sum(), [tensor for tensor in inputs.values() if tensor.requires_grad])


def floor(name: str, inputs: dict[str, Any], args: Arguments) -> Callable[[], None]:
    """The matrix products of `products` or `stock`, into memory that is there already."""
    import torch

    from trl_klx.kl.chunked.checks import default_chunk_size

    trained = inputs["weight"].requires_grad
    hidden, weight, ref_hidden, ref_weight = (tensor.detach() for tensor in inputs.values())
    size = args.chunk_size or default_chunk_size(weight.size(0), hidden.device.type, is_trained=trained)
    space = hidden.new_empty(min(size, hidden.size(0)), weight.size(0))
    grad, grad_weight = torch.empty_like(hidden), torch.empty_like(weight) if trained else None

    def call() -> None:
        for start in range(0, hidden.size(0), size):
            rows = slice(start, start + size)
            logits = space[: hidden[rows].size(0)]
            if name == "products":
                torch.mm(ref_hidden[rows], ref_weight.t(), out=logits)
            torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(logits, weight, out=grad[rows])
            if grad_weight is not None:
                torch.addmm(grad_weight, logits.t(), hidden[rows], beta=int(start > 0), out=grad_weight)

    return call


def calls(case: Case, args: Arguments) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: the floors, and one forward and backward of every route that is installed."""
    inputs = make_inputs(case, args)
    found: dict[str, Callable[[], Any]] = {name: floor(name, inputs, args) for name in FLOORS}
    for name in args.routes:
        function = route(name, args)
        if function is not None:
            found[name] = lambda function=function: gradients(function(**inputs), inputs)
    return found


def measure_times(case: Case, args: Arguments) -> dict[str, Result]:
    """Median seconds by name, and on CUDA peak bytes; all take turns, so that a busy moment meets all of them."""
    found, seconds, out = calls(case, args), {}, {}
    for name, call in list(found.items()):  # a first call, to warm up
        out[name] = {} if args.device == "cpu" else {"bytes": peak_on_device(call)}
        call()
        seconds[name] = []
    for _ in range(args.repeats):
        for name, call in found.items():
            seconds[name].append(seconds_of(call, args))
    return {name: {**out[name], "seconds": statistics.median(values)} for name, values in seconds.items()}


def seconds_of(call: Callable[[], Any], args: Arguments) -> float:
    import torch

    if args.device == "cpu":
        now = time.perf_counter if args.clock == "wall" else time.process_time
        start = now()
        call()
        return now() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_on_device(call: Callable[[], Any]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    made = call() or ()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held - sum(tensor.nbytes for tensor in made)


def measure_memory(name: str, case: Case, args: Arguments) -> Result:
    """Peak bytes of this process after one run of the route, or after inputs and gradients alone (route "none")."""
    import torch

    function = route("dense" if name == "none" else name, args)
    if function is None:
        return {}
    small = make_inputs(Case(50, case.hidden, 4, case.head), args)
    gradients(function(**small), small)  # loads what a first call loads
    inputs = make_inputs(case, args)
    if name == "none":
        made = [torch.zeros_like(tensor).add_(1) for tensor in inputs.values() if tensor.requires_grad]
        assert made
    else:
        gradients(function(**inputs), inputs)
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_accuracy(args: Arguments) -> list[dict[str, Any]]:
    """Errors over the norm of what float64 gives: of the value and of both gradients, by route and distance."""
    import torch

    out, case = [], Case(4000, 512, 64, "trained")
    for gap in GAPS:
        inputs = make_inputs(case, args, gap)
        wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
        value = route("dense", args)(**wide)  # type: ignore[misc]
        wanted = (value.detach(), *gradients(value, wide))
        for name in args.routes:
            function = route(name, args)
            if function is None:
                continue
            value = kl_of(function(**inputs))
            found = (value.detach(), *gradients(value, inputs))
            errors = [float(torch.dist(a.double(), b) / b.norm()) for a, b in zip(found, wanted, strict=True)]
            names = ("value", "gradient of hidden", "gradient of head")
            out.append({"route": name, "nats": float(wanted[0].mean()), **dict(zip(names, errors, strict=True))})
    return out


def work(task: str, case: Case, args: Arguments) -> Any:
    if task == "time":
        return measure_times(case, args)
    return measure_accuracy(args) if task == "accuracy" else measure_memory(task, case, args)


# --- in the parent ---------------------------------------------------------------------------------------------------


def in_fresh_process(task: str, case: Case, args: Arguments) -> Any:
    settings = {name: value for name, value in vars(args).items() if name not in ("worker", "output")}
    command = [sys.executable, __file__, "--worker", json.dumps({"task": task, "case": case, "settings": settings})]
    # glibc keeps freed blocks of up to 32 MiB for reuse: with a fixed threshold they go back, as larger ones do.
    environment = dict(os.environ) if task == "time" else {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} of {case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: Arguments) -> Results:
    """What every floor and route took, by case."""
    do, out = in_fresh_process if args.device == "cpu" else work, {}
    for case in cases(args):
        found = {**{name: {} for name in (*FLOORS, *args.routes)}, **do("time", case, args)}
        if args.device == "cpu":
            base = do("none", case, args)["bytes"]
            for name in args.routes:
                if found[name]:
                    found[name]["bytes"] = max(do(name, case, args)["bytes"] - base, 0)
        out[case] = found
        print(f"{case}: {found}", file=sys.stderr)
    return out


def slope(sizes: list[int], values: list[float]) -> float:
    """Least-squares slope of log(value) over log(size): 1 is linear, 0 constant; NaN with fewer than two sizes."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return math.nan
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def over(found: dict[str, Result], name: str, other: str, key: str) -> str:
    whole = found.get(other, {}).get(key)
    return f"{found[name][key] / whole:.2f}" if whole else ""


def cost_table(results: Results) -> Table:
    table = Table(title="Exact KL, forward and backward: extra peak memory and median time")
    for column in (*Case._fields, "route", "extra MiB", "of dense", "ms", "of products", "of dense"):
        table.add_column(column, justify="left" if column in ("head", "route") else "right")
    for case, found in results.items():
        for name, result in found.items():
            row = [*map(str, case), name]
            if not result:
                table.add_row(*row, NOT_INSTALLED)
                continue
            row += (
                ["", ""] if name in FLOORS else [f"{result['bytes'] / 2**20:.0f}", over(found, name, "dense", "bytes")]
            )
            row += [f"{1000 * result['seconds']:.3g}"]
            table.add_row(*row, over(found, name, "products", "seconds"), over(found, name, "dense", "seconds"))
    return table


def slope_table(results: Results) -> Table:
    """Slopes are medians over all else."""
    table = Table(title="Log-log slopes (1: linear, 0: constant)")
    for column in ("route", "time in tokens", "time in vocabulary", "memory in tokens", "memory in vocabulary"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for name in dict.fromkeys(name for found in results.values() for name in found if name not in FLOORS):
        cells = []
        for quantity in ("seconds", "bytes"):
            for axis in ("tokens", "vocabulary"):
                groups: dict[Case, list[Case]] = {}
                for case in (case for case in results if results[case][name]):
                    groups.setdefault(case._replace(**{axis: 0}), []).append(case)
                slopes = [
                    slope([getattr(case, axis) for case in group], [results[case][name][quantity] for case in group])
                    for group in groups.values()
                ]
                known = [number for number in slopes if not math.isnan(number)]
                cells.append(f"{statistics.median(known):.2f}" if known else "")
        table.add_row(name, *cells)
    return table


def accuracy_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Errors against float64")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "route" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2g}" for value in row.values()))
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.worker:
        task = json.loads(args.worker)
        print(json.dumps(work(task["task"], Case(*task["case"]), Arguments(**task["settings"]))))
        return {}
    results = measure(args)
    do = in_fresh_process if args.device == "cpu" else work
    accuracy = [] if args.no_accuracy else do("accuracy", Case(0, 0, 0, ""), args)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(cost_table(results))
    if args.device == "cpu":
        console.print(slope_table(results))
    if accuracy:
        console.print(accuracy_table(accuracy))
    figures = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("worker", "output")},
        "machine": machine(args),
        "cases": [{**case._asdict(), "routes": found} for case, found in results.items()],
        "accuracy": accuracy,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1))
    return figures


def machine(args: Arguments) -> dict[str, str]:
    import torch

    name = platform.processor() or platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


if __name__ == "__main__":
    main()
