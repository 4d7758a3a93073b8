"""The command `trl-klx explain`: a recipe's gradient in words and one table, without loading a model."""

import argparse
import sys
import warnings
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ...cli.parser import CommandParser
from ...kl.term import KLTerm
from ...kl.variance import DISTANCES
from ..algorithms import ALGORITHMS, algorithm_of, config_of
from ..arguments import BadInput, Recipe, parse_recipe
from .choices import Row, best_of, gradient_of, is_sound, name_of, rows, variance_ratio
from .notes import notes, sentence

_WIDTH = 116  # of the table; narrower terminals wrap its lines
_LEGEND = """\
gradient    KLseq: of the sequence KL(policy || reference); P: less how a token moves later states; F: forward KL
bias        distance of the expected gradient from KLseq, in % of KLseq
off-policy  how far the gradient moves on answers of a policy 0.01 nats away, in the same unit
variance    of one answer's gradient, the best with the same gradient = 1, at {kls} nats per answer
cost        log-probs of sampled tokens, or the vocabulary of each, in chunks; scoring: again, once per rollout
Bias and variance are enumerated exactly on small policies (trl_klx/kl/variance.py): read them as ratios."""
_ON_DATA = (
    ("no KL loss (kl_coef 0)", "DPO's own", "none", "none"),
    ("exact in loss", "P on the data", "states are the data's", "vocabulary"),
    ("exact forward in loss", "F on the data", "states are the data's", "vocabulary"),
)


def command_parser(program: str) -> argparse.ArgumentParser:
    """The options of `trl-klx explain`; whatever else is given overrides the recipe."""
    parser = CommandParser(
        prog=program,
        usage=f"{program} --config RECIPE.yaml [--algorithm {{{','.join(ALGORITHMS)}}}] [--field value ...]",
        description="Say which gradient a recipe's KL has, its bias and relative variance, and what to use instead. "
        "Exit status 0: accepted; 1: refused for its gradient; 2: no recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, help="default: the first word of the recipe's name, as in grpo_k3_loss.yaml"
    )
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx explain") -> int:
    """Explain a recipe. Returns the exit status: 0, 1 where it is refused for its gradient, 2 for bad input."""
    try:
        options, overrides = command_parser(program).parse_known_args(argv)
        algorithm = algorithm_of(options.config, options.algorithm)
        recipe, refusal = _parsed(algorithm, program, ["--config", options.config, *overrides])
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    _print(console, Path(options.config), algorithm, recipe, refusal)
    return 1 if refusal else 0


def _parsed(algorithm: str, program: str, argv: list[str]) -> tuple[Recipe, str | None]:
    """The recipe, and why it is refused; one that is refused for its gradient only is read as if that were allowed."""
    config = config_of(algorithm)
    argv = [*argv, "--use_cpu", "true"]  # a recipe for GPUs is explained anywhere
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return parse_recipe(program, config, argv), None
        except BadInput as error:
            try:
                return parse_recipe(program, config, [*argv, "--allow_biased_kl", "true"]), str(error)
            except BadInput:
                raise error from None


def _print(console: Console, path: Path, algorithm: str, recipe: Recipe, refusal: str | None) -> None:
    args = recipe.args
    term = args.kl_term()
    on_data = algorithm == "dpo"
    say = console.print
    say(f"{path}: {algorithm.upper()}, {name_of(term)}, {args.kl_controller} {args.kl_coef_name}", markup=False)
    say(sentence(algorithm, args), markup=False)
    if refusal:
        say(f"Refused: {refusal}", markup=False)
    if not on_data and args.kl_placement != "none":
        say(advice(term), markup=False)
        say(_table(rows(term, scores_anyway=algorithm == "ppo")))
        say(_LEGEND.format(kls=", ".join(f"{kl:g}" for kl in DISTANCES)), markup=False)
    if on_data:
        say(_data_table(term, args.kl_in_loss))
    for note in notes(algorithm, args):
        say(f"- {note}", markup=False)


def advice(term: KLTerm) -> str:
    """The verdict, and what to use instead."""
    whole = best_of("KLseq")
    if not is_sound(term):
        return f"Instead: {name_of(whole)} has the whole gradient at the lowest variance."
    gradient = gradient_of(term)
    best = best_of(gradient)
    ratio = variance_ratio(term, best)
    if ratio > 1.05:
        text = f"Accepted. {name_of(best)} has the same gradient at {ratio:.1f} times less variance"
    else:
        text = f"Accepted. No choice has less variance with this gradient ({gradient})"
    if gradient == "P":
        return (
            f"{text}; {name_of(whole)} adds what P leaves out, at nearly the same variance as {name_of(best_of('P'))}."
        )
    return f"{text}; for the reverse KL use {name_of(whole)}." if gradient.startswith("F") else f"{text}."


def _table(found: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in ("configuration", "gradient", "bias", "off-policy", "variance", "cost", "verdict"):
        is_number = column in ("bias", "off-policy", "variance")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for row in found:
        variance = "  ".join(f"{value:.1f}" for value in row.relative_variance)
        bias, error = (f"{100 * value:.0f} %" for value in (row.figures.bias, row.figures.off_policy_error))
        table.add_row(row.name, row.gradient, bias, error, variance, row.cost, row.verdict)
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
