"""The course of every run: parse, check, train, save, report. What one algorithm needs is passed in by its module."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer
from trl import get_peft_config, get_quantization_config

from ..monitor.history import HistoryCallback
from ..monitor.progress import KLProgressCallback
from ..trainers.checkpoints import CheckpointError, NotSavedError, RunError, resolve_checkpoint
from .arguments import BadInput, Recipe, parse_recipe
from .dry_run.command import dry_run, wants_dry_run
from .inputs import Inputs
from .report import report, write_resolved_recipe


def run_recipe(
    argv: list[str] | None,
    program: str,
    config: type,
    load_inputs: Callable[[Recipe], Inputs],
    build_trainer: Callable[[Recipe, Inputs], Any],
) -> int:
    """Check everything, then train, save and report; or with `dry_run`, say what that would be. Returns the exit
    status: 0, 2 for bad input, or 1 for a run that could not go on (of a dry run: for problems found).

    Args:
        argv: the command line, `sys.argv` where None.
        program: what the usage text calls the command.
        config: the algorithm's config class.
        load_inputs: checks what the recipe names, and loads all but the models; raises ValueError.
        build_trainer: makes the trainer, and with it loads the models.
    """
    argv = sys.argv[1:] if argv is None else argv
    if wants_dry_run(argv):
        return dry_run(argv, program, config)
    try:
        recipe = parse_recipe(program, config, argv)
        if recipe.run.accelerate_config is not None:
            raise BadInput(
                f"accelerate_config={recipe.run.accelerate_config!r} starts processes only as `trl-klx` or `accelerate "
                "launch --config_file`: give it there, or plan for it by dry_run."
            )
        inputs = load_inputs(recipe)
        resolve_checkpoint(recipe.args.resume_from_checkpoint, recipe.args.output_dir)
        trainer = build_trainer(recipe, inputs)
    except ValueError as error:
        return refuse(error)
    try:
        _train(trainer, recipe)
    except CheckpointError as error:
        return refuse(error)
    except RunError as error:
        # One process may find its disk full; that a step is not finite all of them know.
        return refuse(error, status=1, from_any_process=isinstance(error, NotSavedError))
    _leave_together(trainer)
    return 0


def trainer_arguments(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments that the trainers of all algorithms share, as TRL's own scripts set them."""
    args, model = recipe.args, recipe.model
    args.model_init_kwargs = {
        **(args.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {
        "model": model.model_name_or_path,
        "args": args,
        "train_dataset": inputs.train_dataset,
        "eval_dataset": inputs.eval_dataset,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
        "callbacks": [HistoryCallback()],
    }


def refuse(error: Exception, *, status: int = 2, from_any_process: bool = False) -> int:
    """Print one sentence, from the first process or from any, and return the exit status: that of bad input."""
    if from_any_process or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return status


def _train(trainer: Any, recipe: Recipe) -> None:
    args, folder = recipe.args, Path(recipe.args.output_dir)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(KLProgressCallback(coef_name=args.kl_coef_name))
    if trainer.accelerator.is_main_process:
        write_resolved_recipe(folder, recipe)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    dataset_name = str(recipe.run.dataset_name)
    on_the_hub = None if Path(dataset_name).exists() else dataset_name
    trainer.create_model_card(model_name=folder.name, dataset_name=on_the_hub)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_the_hub)
    if trainer.accelerator.is_main_process:
        report(folder, args)
        if trainer.kl.budget.exceeded:
            print(trainer.kl.budget.message())
        if trainer.overoptimisation is not None:
            print(trainer.overoptimisation.summary())


def _leave_together(trainer: Trainer) -> None:
    """End all processes in order: gloo aborts now and then when one leaves while another still talks."""
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5 if trainer.accelerator.num_processes > 1 else 0)
    trainer.accelerator.end_training()
