"""The course of a dry run: parse to the end, count, estimate, check, print. Nothing is written, no weight loaded."""

import os
import sys
import warnings
from contextlib import nullcontext, suppress
from typing import NamedTuple

from huggingface_hub import constants
from rich.console import Console

from ..algorithms import ALGORITHMS, config_of
from ..arguments import BadInput, Recipe, starts_no_process
from ..checks import start_problems
from ..early import early_flag, early_value
from ..explain.command import advice
from ..explain.notes import sentence
from . import page
from .layout import Layout, as_if_on, read_layout
from .lenient import parse_leniently
from .machine import check_machine
from .memory import Memory, estimate
from .parameters import Models, count_models
from .problems import Collector, Data, check_inputs, check_run
from .reach import from_the_cache_only, hub_answers, on_the_hub


class Plan(NamedTuple):
    """What a dry run has found out; what could not be found out is None, and a problem says why."""

    recipe: Recipe | None
    layout: Layout
    models: Models | None
    memory: Memory | None
    data: Data | None
    problems: list[str]


def dry_run(argv: list[str], program: str, config: type) -> int:
    """Print the plan of a recipe. Returns the exit status: 0, 1 where there are problems, 2 without a recipe."""
    algorithm = next(name for name in ALGORITHMS if _is(config, name))
    try:
        plan = make_plan(algorithm, argv, program)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":  # of several processes, all plan and one prints
        _print(algorithm, plan)
    return 1 if plan.problems else 0


def _is(config: type, algorithm: str) -> bool:
    try:
        return config_of(algorithm) is config
    except ImportError:  # PPO, where TRL has none
        return False


def make_plan(algorithm: str, argv: list[str], program: str = "dry_run") -> Plan:
    """Find out everything about a recipe that can be known without running it.

    Raises:
        BadInput: there is no recipe, or no such accelerate file.
    """
    accelerate_config, source = early_value(argv, "accelerate_config")
    layout = read_layout(accelerate_config)
    with as_if_on(layout.processes):
        recipe, complaints = parse_leniently(program, config_of(algorithm), argv)
    found = Collector()
    for complaint in complaints:
        found.add(complaint)
    if accelerate_config is not None and source != "on the command line":
        found.add(starts_no_process(accelerate_config))
    if recipe is None:
        return Plan(None, layout, None, None, None, found.sentences)
    names = [] if constants.is_offline_mode() else on_the_hub(recipe)
    hub_is_away = bool(names) and not hub_answers()
    if hub_is_away:
        found.add(
            f"on this machine: {constants.ENDPOINT} cannot be reached, and only what is cached of {', '.join(names)} "
            "was looked at."
        )
    with warnings.catch_warnings(), from_the_cache_only() if hub_is_away else nullcontext():
        warnings.simplefilter("ignore")
        for problem in start_problems(recipe):
            found.add(f"on this machine: {problem}")
        data = check_inputs(algorithm, recipe, found)
        models = found.ask(count_models, algorithm, recipe)
    for problem in check_run(algorithm, recipe, data, models, layout):
        found.add(problem)
    for problem in check_machine(recipe, layout, models, on_cpu=_asks_for_cpu(argv)):
        found.add(f"on this machine: {problem}")
    memory = None if models is None else estimate(algorithm, recipe, models, layout)
    return Plan(recipe, layout, models, memory, data, found.sentences)


def _asks_for_cpu(argv: list[str]) -> bool:
    """Whether the recipe itself asks for the CPU; on a machine without a GPU, it is parsed as if it did."""
    with suppress(ValueError):  # neither true nor false: a problem that parsing has found
        return early_flag(argv, "use_cpu")
    return False


def _print(algorithm: str, plan: Plan) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str = "") -> None:
        console.print(text, markup=False)

    say(f"dry run of {algorithm.upper()} on {plan.layout.name} ({plan.layout.source}): nothing is trained or written\n")
    if plan.recipe is not None:
        args = plan.recipe.args
        say("configuration (the KL, and what is not at its default)")
        for name, value in page.configuration(plan.recipe):
            say(f"  {name}: {value}")
        say("\ngradient")
        say(f"  {sentence(algorithm, args)}")
        if args.kl_is_penalised and algorithm != "dpo":
            say(f"  {advice(args.kl_term())}")
        say("\nbatches")
        for line in page.batches(algorithm, args, plan.layout, plan.data.rows if plan.data else None):
            say(f"  {line}")
    if plan.models is not None and plan.memory is not None:
        say("\nmodels")
        for line in page.counts(plan.models):
            say(f"  {line}")
        say()
        console.print(page.memory_table(plan.memory, plan.layout))
        say(f"{page.memory_sentence(plan.memory)}. {page.assumptions(algorithm)}")
    say()
    if not plan.problems:
        say("no problems found")
    for number, problem in enumerate(plan.problems, 1):
        say(f"problem {number}: {problem}")
