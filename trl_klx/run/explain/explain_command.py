"""The command `trl-klx explain`: a recipe's gradient in words and one table, without loading a model."""

import argparse
import sys
import warnings
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ...cli.parser import CommandParser, UsageError
from ...cli.words import CommandLine
from ...kl.term import KLTerm
from ...kl.variance import DISTANCES, REUSED
from ..recipe.algorithm import Algorithm, quantised_notes
from ..recipe.algorithms import ALGORITHMS, algorithm_for
from ..recipe.arguments import Recipe
from ..recipe.parse import parse
from .alternatives import Alternative, advice, alternatives, name_of
from .notes import notes

_WIDTH = 128  # of the table; narrower terminals wrap its lines
_LEGEND = """\
gradient    KLseq: of the sequence KL(policy || reference); P: its part with the states held fixed; F: forward KL
bias        distance of the expected gradient from KLseq, in % of KLseq
stale       on answers of a policy {behind} nats per answer away: how far the gradient moves, in
            the same unit, and its variance, on the policy's own answers = 1
variance    of one answer's gradient, the best with the same gradient = 1, at {kls} nats per answer
cost        log-probs of sampled tokens, or the vocabulary of each, in chunks; scoring: again, once per rollout
Bias and variance are enumerated exactly on small policies (trl_klx/kl/variance.py): read them as ratios."""
_ON_DATA = (
    ("no KL loss (kl_coef 0)", "DPO's own", "none", "none"),
    ("exact in loss", "P on the data", "states are the data's", "vocabulary"),
    ("exact forward in loss", "F on the data", "states are the data's", "vocabulary"),
)


def command_parser(program: str) -> argparse.ArgumentParser:
    """The options of `trl-klx explain`, for help and completion; whatever else is given overrides the recipe."""
    parser = CommandParser(
        prog=program,
        usage=f"{program} --config RECIPE.yaml [--algorithm {{{','.join(ALGORITHMS)}}}] [--field value ...]",
        description="Show which gradient a recipe's KL has, its bias and relative variance, and what to use instead. "
        "Exit status 0: accepted; 1: refused for its gradient; 2: no recipe.",
    )
    parser.add_argument("--config", help="the recipe")
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, help="default: the first word of the recipe's name, as in grpo_k3_loss.yaml"
    )
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx explain") -> int:
    """Explain a recipe. Returns the exit status: 0, 1 where it is refused for its gradient, 2 for bad input."""
    line = CommandLine(sys.argv[1:] if argv is None else argv)
    if line.asks_for_help:
        command_parser(program).print_help()
        return 0
    try:
        path = "".join(line.options.get("config", [])[:1])
        if not path:
            raise UsageError(f"--config is missing: give the path of a recipe; see `{program} --help`.")
        given = line.options.pop("algorithm", None)
        algorithm = algorithm_for(path, None if given is None else "".join(given[:1]))
        recipe, refusal = _parsed(algorithm.config, line)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    _print(console, Path(path), algorithm, recipe, refusal)
    return 1 if refusal else 0


def _parsed(config: type, line: CommandLine) -> tuple[Recipe, str | None]:
    """The recipe, and why it is refused; one that is refused for its gradient only is read as if that were allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parse(config, line, use_cpu=True)  # a recipe for GPUs is explained anywhere
        if not found.problems:
            return found.whole(), None
        allowed = parse(config, line, use_cpu=True, allow_biased_kl=True)
    return (found if allowed.problems else allowed).whole(), found.problems[0]


def _print(console: Console, path: Path, algorithm: Algorithm, recipe: Recipe, refusal: str | None) -> None:
    args, term, on_data = recipe.args, recipe.args.kl_term(), algorithm.rows.is_pairs

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(f"{path}: {algorithm.name.upper()}, {name_of(term)}, {args.kl_controller} {args.kl_coef_name}")
    say(args.kl_gradient)
    if refusal:
        say(f"Refused: {refusal}")
    if not on_data and args.kl_placement != "none":
        say(advice(term))
        is_stale = algorithm.is_off_policy(args)
        console.print(_table(alternatives(term, scores_anyway=algorithm.scores_answers, off_policy=is_stale)))
        behind = " and ".join(f"{kl:.2f}" for kl in REUSED)
        say(_LEGEND.format(behind=behind, kls=", ".join(f"{kl:g}" for kl in DISTANCES)))
    if on_data:
        console.print(_data_table(term, args.kl_in_loss))
    for note in (*notes(algorithm, args), *quantised_notes(recipe)):
        say(f"- {note}")


def _table(found: list[Alternative]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    stale = tuple(f"stale {kl:.2f}" for kl in REUSED)
    for column in ("configuration", "gradient", "bias", *stale, "variance", "cost", "verdict"):
        is_number = column in ("bias", *stale, "variance")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=column != "configuration")
    for row in found:
        variance = "  ".join(f"{value:.1f}" for value in row.relative_variance)
        stale_cells = [f"{100 * one.error:.0f} % {one.variance:.1f}" for one in row.figures.stale]
        bias = f"{100 * row.figures.bias:.0f} %"
        table.add_row(row.name, row.gradient, bias, *stale_cells, variance, row.cost, row.verdict)
    return table


def _data_table(term: KLTerm, in_loss: bool) -> Table:
    """DPO's choices: its KL is a sum over the vocabulary at given tokens, so that sampling adds no variance."""
    table = Table("configuration", "gradient", "bias", "variance", "cost", "verdict", box=box.SIMPLE_HEAD)
    own = name_of(term) if in_loss else _ON_DATA[0][0]
    for name, gradient, bias, cost in _ON_DATA:
        table.add_row(name, gradient, bias, "none added", cost, "this recipe" if name == own else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
