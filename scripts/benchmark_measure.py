"""Compares measuring with running two models: time, memory, and whether both compute the same.

python scripts/benchmark_measure.py --reference runs/sums/model --policy runs/smollm2-135m/dpo_exact_loss/checkpoint-36
python scripts/benchmark_measure.py --memory --vocabulary 152000 --tokens 4096

`plain` is the forward of both models on the same padded batch, with the logits of all positions and nothing else.
`first` measures one policy: both models' hidden states, the reference's written and read, all statistics, the rows
written. `next` is a further policy against the same reference, whose hidden states are stored: its plain form is
the forward of that one model. They take turns; a ratio is taken within a round. Then every number is compared with
plain logits.

`--memory` makes a head of that vocabulary (hidden size 896, random weights) and prints the peak above what the process
held before, for one response of that many tokens.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trl_klx.measure.passes.divergence import TokenStatistics, chunked_token_statistics, token_statistics
from trl_klx.measure.passes.measurement import REFERENCE, Measurement, compare
from trl_klx.measure.passes.models import Scorer, Source, load_model
from trl_klx.measure.passes.options import MeasureOptions
from trl_klx.measure.passes.responses import Encoded, Response
from trl_klx.measure.passes.store import Store

HIDDEN = 896


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference")
    parser.add_argument("--policy")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of every response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, on a busy machine")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=152_000)
    return parser.parse_args(arguments)


def random_batch(args: argparse.Namespace, vocab_size: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    length = args.prompt_tokens + args.tokens
    ids = torch.randint(3, vocab_size, (args.batch_size, length), generator=generator).tolist()
    return [
        Encoded(
            Response(place, str(place), str(place), None, "", None, None),
            row[: args.prompt_tokens],
            row[args.prompt_tokens :],
        )
        for place, row in enumerate(ids)
    ]


class Benchmark:
    """Both models, a batch, and what is timed."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sources = [Source(REFERENCE, args.reference), Source("policy", args.policy)]
        models = [load_model(source, dtype=torch.float32, device=self.device) for source in self.sources]
        self.reference, self.policy = (Scorer(model, temperature=1.0, name="model") for model in models)
        self.batch = random_batch(args, self.policy.vocab_size)
        options = MeasureOptions(reference=args.reference, policies=[args.policy], output_dir=str(folder))
        tokenizer = AutoTokenizer.from_pretrained(args.reference)
        self.done = Measurement(options, Store(folder), self.sources[0], tokenizer, self.batch)
        self.done.store.open_policy(self.sources[1], write=True)
        self.ids = torch.tensor([item.prompt_ids + item.response_ids for item in self.batch], device=self.device)

    def logits(self, scorer: Scorer) -> torch.Tensor:
        with torch.no_grad():
            return scorer.model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), use_cache=False).logits

    def plain(self) -> None:
        self.logits(self.reference)
        self.logits(self.policy)

    def plain_policy(self) -> None:
        self.logits(self.policy)

    def first(self) -> list[dict[str, Any]]:
        for item, hidden in zip(self.batch, self.reference.hidden_states(self.batch), strict=True):
            self.done.store.save_hidden(REFERENCE, item.row.index, hidden)
        return self.next()

    def next(self) -> list[dict[str, Any]]:
        new = list(zip(self.batch, self.policy.hidden_states(self.batch), strict=True))
        heads = self.policy.head, self.reference.head
        rows = compare(self.done, self.sources[1], new, *heads, self.policy.vocab_size)
        self.done.store.add(self.sources[1], rows)
        return rows

    def largest_difference(self) -> dict[str, float]:
        """Of every statistic from that of plain logits in float64, relative where it is above 1."""
        rows, prompt = self.first(), len(self.batch[0].prompt_ids)
        logits, ref_logits = (
            self.logits(scorer)[:, prompt - 1 : -1].flatten(0, 1) for scorer in (self.policy, self.reference)
        )
        tokens, out = self.ids[:, prompt:].flatten(), dict.fromkeys(TokenStatistics._fields, 0.0)
        names = [name for name in out if not name.startswith(("top_ids", "rank"))]
        found = {name: torch.tensor([value for row in rows for value in row[name]]).double() for name in names}
        for start in range(0, len(tokens), 32):
            part = slice(start, start + 32)
            expected = token_statistics(logits[part].double(), ref_logits[part].double(), tokens[part])
            for name in names:
                wanted = getattr(expected, name).cpu()
                gap = (found[name][part] - wanted).abs() / wanted.abs().clamp_min(1.0)
                out[name] = max(out[name], float(gap.max()))
        return {name: out[name] for name in names}


def seconds(function: Callable[[], Any], clock: str) -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def measure_times(args: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(args, Path(folder))
        functions = {name: getattr(benchmark, name) for name in ("plain", "first", "plain_policy", "next")}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(args.rounds + 1):  # one to warm up
            for name, function in functions.items():
                took = seconds(function, args.clock)
                if number:
                    times[name].append(took)
        for one, two in (("first", "plain"), ("next", "plain_policy")):
            ratio = statistics.median(a / b for a, b in zip(times[one], times[two], strict=True))
            speed = args.batch_size * args.tokens / statistics.median(times[one])
            print(f"{one}: {ratio:.3f} of {two}, {speed:.0f} response tokens per second")
        for name, gap in benchmark.largest_difference().items():
            print(f"  {name}: at most {gap:.1e} from plain logits")
    return times


def memory(args: argparse.Namespace) -> float:
    """MiB at the peak over what was held, for one response."""
    weights = [torch.randn(args.vocabulary, HIDDEN) / HIDDEN**0.5 for _ in range(2)]
    hidden = [torch.randn(args.tokens, HIDDEN) for _ in range(2)]
    tokens = torch.randint(args.vocabulary, (args.tokens,))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    held = status("VmRSS")
    start = time.perf_counter()
    heads = [weight.t().__rmatmul__ for weight in weights]
    chunked_token_statistics(heads[0], hidden[0], heads[1], hidden[1], tokens, vocab_size=args.vocabulary)
    peak = (status("VmHWM") - held) / 2**10
    logits = 2 * 4 * args.tokens * args.vocabulary / 2**20
    print(
        f"{args.tokens} tokens, vocabulary {args.vocabulary}: {peak:.0f} MiB at the peak, all logits {logits:.0f} MiB"
    )
    print(f"{args.tokens / (time.perf_counter() - start):.0f} tokens per second")
    return peak


def status(kind: str) -> int:
    """KiB of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def main(arguments: list[str] | None = None) -> Any:
    args = parse(arguments)
    return memory(args) if args.memory else measure_times(args)


if __name__ == "__main__":
    main()
