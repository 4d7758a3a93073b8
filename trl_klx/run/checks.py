"""What a run and a dry run check alike before a model is loaded: packages, folders and the models' files."""

from collections.abc import Iterator
from typing import Any

from ..trainers.checkpoints.run_lock import check_not_in_use, folder_problem
from ..trainers.checks.packages import missing_packages
from ..trainers.checks.start import overwritten_checkpoints, overwritten_models
from ..trainers.errors import FolderError
from .arguments import Recipe
from .meta_models import policy_problems
from .model_files import weight_problems


def start_problems(recipe: Recipe) -> Iterator[str]:
    """Sentences about packages that are not installed and about output_dir."""
    args, model = recipe.args, recipe.model
    fields = ("attn_implementation", "load_in_4bit", "load_in_8bit")
    asked = {name: getattr(model, name) for name in fields if getattr(model, name, None)}
    yield from missing_packages(args, {**(getattr(args, "model_init_kwargs", None) or {}), **asked})
    yield from _folder_problems(args)


def _folder_problems(args: Any) -> Iterator[str]:
    problem = folder_problem(args.output_dir)
    if problem is not None:
        yield problem
        return
    try:
        check_not_in_use(args.output_dir)
    except FolderError as error:
        yield str(error)


def model_problems(recipe: Recipe) -> Iterator[str]:
    """Sentences about a recipe's models: weights, a run over them, keywords and adapters that do not fit."""
    args, model = recipe.args, recipe.model
    classifiers = {name: getattr(args, name, None) for name in ("reward_model_path", "value_model_path")}
    paths = {"model_name_or_path": model.model_name_or_path, **classifiers}
    yield from overwritten_models(args.output_dir, paths)
    if not args.resume_from_checkpoint:
        yield from overwritten_checkpoints(args.output_dir, paths)
    # Weights in a folder below, or under another name, are left to transformers to find.
    loading = getattr(args, "model_init_kwargs", None) or {}
    elsewhere = {"subfolder", "variant", "gguf_file", "state_dict"} & set(loading)
    for option, path in ({} if elsewhere else paths).items():
        yield from weight_problems(path, option, classifier=option in classifiers)
    yield from policy_problems(recipe)
