"""The course of every run of a recipe: parse, check, train, save, write the card."""

import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..cli.words import CommandLine
from ..hub.push import HubError, create_repo, push_command
from ..hub.settings import Settings, plain_settings
from ..launching import end_with_launcher
from ..trainers.checkpoints.run_lock import run_folder
from ..trainers.checks.vocabulary import TokenError
from ..trainers.errors import CheckpointError, NotSavedError, RunError
from ..trainers.reference.resumed import check_resume
from ..trainers.rewarding.calls import RewardError
from .check.dry_run import dry_run
from .recipe.algorithm import Algorithm, Inputs
from .recipe.arguments import BadInput, Findings, Recipe, check_processes
from .recipe.parse import parse
from .sources.read import read_inputs, start_problems
from .sources.users_code import users_traceback

# One process may find its disk full, or have the answer or the prompt that a run fails on; that a step is not finite
# all of them know.
_OF_ONE_PROCESS = (NotSavedError, RewardError, TokenError)


def run(algorithm: Algorithm, argv: Iterable[str] | None = None, program: str = "") -> int:
    """Check everything, then train, save and write the card; or with `dry_run`, print what that would be.

    Args:
        algorithm: of the command.
        argv: the command line, `sys.argv` where None; a `CommandLine` is not read again.
        program: what the usage text calls the command.

    Returns:
        The exit status: 0, 2 for bad input, or 1 for a run that could not continue (of a dry run: for problems found).
    """
    words = sys.argv[1:] if argv is None else argv
    line = words if isinstance(words, CommandLine) else CommandLine(words)
    try:
        config = algorithm.config
    except ImportError as error:  # PPO, where TRL has none
        return refuse(error)
    if line.asks_for_help:
        algorithm.command_parser(program or f"{algorithm.name}.py").print_help()
        return 0
    launched = end_with_launcher()
    with ExitStack() as held:
        try:
            if line.flag("dry_run"):
                return dry_run(algorithm, line)
            recipe = parse(config, line).whole()
            check_processes(recipe.run, launched=launched)
            found = Findings(stops=True)
            for problem in start_problems(recipe):
                found.add(problem)
            inputs, _ = read_inputs(algorithm, recipe, found)
            assert inputs is not None  # or a problem was raised
            check_resume(recipe.args, recipe.model.model_name_or_path)
            check_push(recipe.args)
            if os.environ.get("RANK", "0") == "0":
                held.enter_context(run_folder(recipe.args.output_dir))
            trainer = build_trainer(algorithm, recipe, inputs)
        except (ValueError, HubError) as error:
            return refuse(error)
        return _train_to_the_end(trainer, recipe)


def build_trainer(algorithm: Algorithm, recipe: Recipe, inputs: Inputs) -> Any:
    """The trainer of a recipe that nothing was found wrong with; loads its models."""
    return algorithm.build(recipe, inputs)


def _train_to_the_end(trainer: Any, recipe: Recipe) -> int:
    """Train, save and write the card. Returns the exit status."""
    status = 0
    try:
        _train(trainer, recipe)
    except CheckpointError as error:
        return refuse(error)
    except RunError as error:
        return refuse(error, status=1, from_any_process=isinstance(error, _OF_ONE_PROCESS))
    except HubError as error:  # the run itself is whole
        status = refuse(error, status=1)
    _leave_together(trainer)
    return status


def check_push(args: Any) -> None:
    """Where the run is to be pushed at its end, find out now whether it can be, before a model is loaded.

    Raises:
        BadInput: there is no token, the Hub refuses it, or the repository cannot be made.
    """
    if not args.push_to_hub or os.environ.get("RANK", "0") != "0":
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        create_repo(name, token=args.hub_token, private=args.hub_private_repo)
    except HubError as error:
        later = push_command(args.output_dir, name, private=args.hub_private_repo, revision=args.hub_revision)
        raise BadInput(
            f"push_to_hub=true cannot work ({error}); or leave it out, and push later with `{later}`."
        ) from error


def refuse(error: Exception, *, status: int = 2, from_any_process: bool = False) -> int:
    """Print one sentence, from the first process or from any, and return the exit status: that of bad input.

    What the user's own code raised is shown after it, with its traceback.
    """
    if from_any_process or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
        print(users_traceback(error), file=sys.stderr, end="")
    return status


def resolved_recipe(recipe: Recipe) -> Settings:
    """Every field of a recipe, with the value that it ended up with."""
    return plain_settings(recipe.args, recipe.run, recipe.model)


def _train(trainer: Any, recipe: Recipe) -> None:
    args = recipe.args
    trainer.recipe = resolved_recipe(recipe)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir, _internal_call=True)  # not a push of its own
    # Last, because the card shows the pictures and the push takes them along.
    on_the_hub = [name for name in recipe.run.dataset_names if not Path(name).exists()] or None
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_the_hub)
    else:
        trainer.create_model_card(dataset_name=on_the_hub)


def _leave_together(trainer: Any) -> None:
    """End all processes in order: gloo aborts now and then when one leaves while another still talks."""
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5 if trainer.accelerator.num_processes > 1 else 0)
    if getattr(trainer.args, "use_vllm", False) and trainer.args.vllm_mode == "colocate":
        # Before the process group, without which it fails when Python exits.
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    trainer.accelerator.end_training()
