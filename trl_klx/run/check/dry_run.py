"""The course of a dry run: parse to the end, count, estimate, check, print. Nothing is written, no weight loaded."""

import os
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import NamedTuple

import datasets
import torch
from huggingface_hub import constants
from rich.console import Console
from transformers import TrainingArguments

from ...cli.words import CommandLine
from ...trainers.seams import swapped
from ..explain.alternatives import advice
from ..recipe.algorithm import Algorithm
from ..recipe.algorithms import ALGORITHMS
from ..recipe.arguments import Findings, Recipe, other_number
from ..recipe.parse import parse
from ..sources.read import read_inputs, start_problems
from . import page
from .layout import Layout, read_layout
from .machine import check_machine, run_warnings, unreachable
from .memory import Memory, Models, count_models, estimate
from .problems import check_run, rows_of_training


class Plan(NamedTuple):
    """What a dry run has found out; what could not be found out is None, and a problem gives the reason."""

    recipe: Recipe | None
    layout: Layout
    models: Models | None
    memory: Memory | None
    rows: int | None  # of the training split
    problems: list[str]  # for which a run would stop
    warnings: list[str]


def dry_run(algorithm: Algorithm, words: CommandLine) -> int:
    """Print the plan of a recipe. Returns the exit status: 0, or 1 where there are problems. Raises as `make_plan`."""
    plan = make_plan(algorithm, words)
    if os.environ.get("RANK", "0") == "0":  # of several processes, all plan and one prints
        _print(algorithm, plan)
    return 1 if plan.problems else 0


def make_plan(algorithm: Algorithm | str, words: Iterable[str]) -> Plan:
    """Find out everything about a recipe that can be known without running it.

    Raises:
        ValueError: there is no recipe, or no such accelerate file.
    """
    algorithm = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
    line = words if isinstance(words, CommandLine) else CommandLine(words)
    layout = read_layout(line.given("accelerate_config"), line.given("num_processes"))
    found = Findings(stops=False)
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    processes = property(lambda self: layout.processes)  # by which training arguments compute their batches
    with swapped(TrainingArguments, world_size=processes), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe, complaints = parse(algorithm.config, line, **({} if has_accelerator else {"use_cpu": True}))
    for complaint in complaints:
        found.add(complaint)
    if recipe is None:
        return Plan(None, layout, None, None, None, found.sentences, [])
    if recipe.run.num_processes not in (None, layout.processes):
        found.add(other_number(recipe.run.num_processes, layout.processes))
    with ExitStack() as held:
        away = unreachable(recipe)
        if away is not None:
            for settings in (constants, datasets.config):  # what is cached is looked at, as with that variable
                held.enter_context(swapped(settings, HF_HUB_OFFLINE=True))
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for problem in start_problems(recipe):
            found.add(f"on this machine: {problem}")
        inputs, named = read_inputs(algorithm, recipe, found, streaming=True)
        rows = None if inputs is None else rows_of_training(inputs, recipe, found)
    models = None if named is None else found.ask(count_models, algorithm, recipe, named)
    for problem in check_run(algorithm, recipe, rows, models, layout):
        found.add(problem)
    on_cpu = False
    with suppress(ValueError):  # neither true nor false: a problem that parsing has found
        on_cpu = line.flag("use_cpu")
    for problem in check_machine(recipe, layout, on_cpu=on_cpu):
        found.add(f"on this machine: {problem}")
    memory = None if models is None else estimate(algorithm, recipe, models, layout)
    warned = [*filter(None, [away]), *run_warnings(recipe, layout, models)]
    return Plan(recipe, layout, models, memory, rows, found.sentences, warned)


def _print(algorithm: Algorithm, plan: Plan) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str = "") -> None:
        console.print(text, markup=False)

    name = algorithm.name.upper()
    say(f"dry run of {name} on {plan.layout.name} ({plan.layout.source}): nothing is trained or written\n")
    if plan.recipe is not None:
        args = plan.recipe.args
        say("configuration (the KL, and what is not at its default)")
        for field, value in page.configuration(plan.recipe):
            say(f"  {field}: {value}")
        say("\ngradient")
        say(f"  {args.kl_gradient}")
        if args.kl_is_penalised and not algorithm.rows.is_pairs:
            say(f"  {advice(args.kl_term())}")
        say("\nbatches")
        for line in page.batches(algorithm, args, plan.layout, plan.rows):
            say(f"  {line}")
    if plan.models is not None and plan.memory is not None:
        say("\nmodels")
        for line in page.counts(plan.models):
            say(f"  {line}")
        say()
        console.print(page.memory_table(plan.memory, plan.layout))
        say(f"{page.memory_sentence(plan.memory, use_cpu=args.use_cpu)}. {page.assumptions(algorithm)}")
    say()
    if not plan.problems:
        say("no problems found")
    for kind, sentences in (("problem", plan.problems), ("warning", plan.warnings)):
        for number, text in enumerate(sentences, 1):
            say(f"{kind} {number}: {text}")
