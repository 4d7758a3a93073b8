"""Measures what bfloat16 does to k1, k2 and k3 near the reference, by who scores the tokens.

python scripts/measure_bf16.py

Tokens are drawn from a policy, and each estimator is computed from log-probs in float64 and from those of a scoring, on
the same bfloat16 hidden states and heads: what is measured is the arithmetic of the output head, not that of the layers
below. The largest logits are near 25, as in language models, where bfloat16 has steps of 0.125.

- logits: TRL below 1.16, the model's logits and a softmax in float32;
- fused: the fused head of TRL 1.16, where it is installed;
- bf16: TRL below 1.16, of a model loaded in bfloat16 with `bf16: false`, whose softmax is in bfloat16 too;
- fp32 head: either with `cast_lm_head_to_fp32`;
- trl_klx: `token_scores`, by which the trainers score where an exact KL is wanted, and PPO always.

`floor` is the mean that a scoring adds, and `noise` the deviation of one token's.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import selective_log_softmax

from trl_klx.kl import exact_kl, kl_estimate
from trl_klx.kl.chunked import token_scores
from trl_klx.kl.estimators import SAMPLED_ESTIMATORS
from trl_klx.trainers.seams import FUSED_LM_HEAD

KLS = (0.04, 0.0035, 0.00045, 0.0002)


class Case(NamedTuple):
    """N tokens of a policy and its reference, which share their head; in bfloat16."""

    hidden: Tensor  # (N, H)
    ref_hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)

    def logits(self) -> tuple[Tensor, Tensor]:
        """(N, V) of policy and reference, in float64."""
        weight = self.weight.double().t()
        return self.hidden.double() @ weight, self.ref_hidden.double() @ weight


def make_case(kl: float, args: argparse.Namespace) -> Case:
    """At about `kl` nats per token by other hidden states, one rounding of bfloat16 and more away."""
    generator = torch.Generator().manual_seed(args.seed)
    hidden, off_hidden = torch.randn(2, args.tokens, args.hidden, generator=generator)
    weight = torch.randn(args.vocabulary, args.hidden, generator=generator)
    weight = 25 * weight / (hidden @ weight.t()).amax(-1).mean()
    step = 0.1
    for _ in range(20):
        made = Case(*(tensor.bfloat16() for tensor in (hidden, hidden + step * off_hidden, weight)))
        value = float(exact_kl(*(logits[:256] for logits in made.logits())).mean())
        if abs(value / kl - 1) < 0.05:
            return made
        step *= (kl / max(value, 1e-12)) ** 0.5
    return made


def in_float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().t()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def scored_by_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return selective_log_softmax(F.linear(hidden, weight).float().unsqueeze(0), targets.unsqueeze(0)).squeeze(0)


def scored_in_bf16(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return selective_log_softmax(F.linear(hidden, weight).unsqueeze(0), targets.unsqueeze(0)).squeeze(0)


def scored_by_fused_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    fused: Any = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    return fused.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]


def scored_by_float32_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return scored_by_logits(hidden.float(), weight.float(), targets)


SCORINGS: dict[str, Callable[..., Any]] = {"bf16": scored_in_bf16, "logits": scored_by_logits}
if FUSED_LM_HEAD:
    SCORINGS["fused"] = scored_by_fused_head
SCORINGS["fp32 head"] = scored_by_float32_head
SCORINGS["trl_klx"] = lambda hidden, weight, targets: token_scores(hidden, weight, targets).logps


def estimates(case: Case, scored: Callable[..., Tensor], targets: Tensor) -> dict[str, Tensor]:
    """(N,) of each estimator."""
    logps = scored(case.hidden, case.weight, targets)
    ref_logps = scored(case.ref_hidden, case.weight, targets)
    return {name: kl_estimate(logps, ref_logps, name).double() for name in SAMPLED_ESTIMATORS}


class Row(NamedTuple):
    """What one scoring does to one estimator."""

    kl: float  # exact, nats per token
    scoring: str
    estimator: str
    true: float  # of the estimator in float64, on these tokens
    floor: float
    noise: float


def measure(args: argparse.Namespace) -> list[Row]:
    rows = []
    for wanted in args.kls:
        case = make_case(wanted, args)
        logits, ref_logits = case.logits()
        kl = float(exact_kl(logits, ref_logits).mean())
        generator = torch.Generator().manual_seed(args.seed)
        targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        true = estimates(case, in_float64, targets)
        for scoring, scored in SCORINGS.items():
            for name, found in estimates(case, scored, targets).items():
                error = found - true[name]
                row = Row(kl, scoring, name, float(true[name].mean()), float(error.mean()), float(error.std()))
                rows.append(row)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kls", type=float, nargs="+", default=list(KLS), help="nats per token")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Row]:
    rows = measure(parse(arguments))
    table = Table("KL, nats per token", "scoring", *(f"{name}: float64, floor, noise" for name in SAMPLED_ESTIMATORS))
    for kl, scoring in dict.fromkeys((row.kl, row.scoring) for row in rows):
        of = [row for row in rows if (row.kl, row.scoring) == (kl, scoring)]
        table.add_row(f"{kl:.2g}", scoring, *(f"{row.true:.2g}  {row.floor:+.1g}  {row.noise:.1g}" for row in of))
    Console(width=120).print(table)
    return rows


if __name__ == "__main__":
    main()
