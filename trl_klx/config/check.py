"""Settling a config: types, then aliases and defaults, then rules."""

import re

from .options import KLArguments
from .types import convert


def check(args: KLArguments) -> None:
    """Resolve a config, in its `__post_init__`. Raises ValueError with the first sentence of `settle`."""
    for problem in settle(args).values():
        raise ValueError(problem)


def settle(args: KLArguments) -> dict[str, str]:
    """Put types, aliases and defaults into the fields, and collect a sentence for everything that is wrong with them.

    A field whose value it cannot hold falls back to its default, and what a rule finds wrong with that default is left
    out.

    Returns:
        The sentences, those of single fields by the name of the field, those of rules by themselves.
    """
    problems = convert(args, args.choices())
    refused = set(problems)
    args.resolve()
    for rule in args.rules():
        try:
            rule()
        except ValueError as error:
            if not refused & set(re.findall(r"\w+", str(error))):
                problems[str(error)] = str(error)
    return problems
