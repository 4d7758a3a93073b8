"""What all three trainers refuse before they load or train anything: packages, folders and tokenizers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from ...wording import first_line
from ..checkpoints.run_lock import folder_problem
from .packages import missing_packages
from .quantised import check_adapter
from .vocabulary import has_tokens

Config = TypeVar("Config", bound=TrainingArguments)
_MODELS = ("ref_model", "reward_model", "value_model")


def check_start(
    args: Any,
    model: Any,
    processing_class: Any = None,
    *,
    quantization_config: Any = None,
    peft_config: Any = None,
    **others: Any,
) -> Any:
    """Refuse what cannot work, whether it comes from a recipe or from Python; returns the tokenizer or processor.

    Args:
        args: the trainer's config.
        model: the policy or its path.
        processing_class: its tokenizer or processor; None: that of the policy's path.
        quantization_config: of the policy.
        peft_config: of the adapter that the policy gets.
        others: the trainer's other arguments, of which those in `_MODELS` are looked at.

    Raises:
        ValueError: a package is missing, a quantised policy gets no adapter, output_dir cannot be written to or is a
            model's folder, or the tokenizer knows no words.
    """
    loading = {"quantization_config": quantization_config, **(args.model_init_kwargs or {})}
    for sentence in missing_packages(args, loading):
        raise ValueError(sentence)
    check_adapter(model, loading["quantization_config"], peft_config)
    problem = folder_problem(args.output_dir)
    if problem is not None:
        raise ValueError(problem)
    for sentence in overwritten_models(
        args.output_dir, {"model": model, **{name: others.get(name) for name in _MODELS}}
    ):
        raise ValueError(sentence)
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        if not path:
            raise ValueError(
                "the policy in memory does not name a path to load its tokenizer from: pass processing_class."
            )
        trusts = bool(getattr(args, "trust_remote_code", False))
        return load_tokenizer(path, repr(path), revision=loading.get("revision"), trust_remote_code=trusts)
    if not has_tokens(getattr(processing_class, "tokenizer", processing_class)):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__} that knows no words: pass the policy's tokenizer."
        )
    return processing_class


def config_for(kind: type[Config], args: Any, model: Any, trainer: str) -> Config:
    """`args`; without any, the defaults with TRL's name for output_dir.

    Raises:
        TypeError: it is another trainer's config.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return kind(f"{name.split('/')[-1] or 'model'}-{trainer}")
    if not isinstance(args, kind):
        raise TypeError(f"args is a {type(args).__name__}: KLX{trainer}Trainer takes a {kind.__name__}.")
    return args


def overwritten_models(output_dir: Any, models: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each model, or path of one, whose folder is output_dir, where the run saves its own."""
    for option, model in models.items():
        path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        if path and Path(path).is_dir() and Path(path).resolve() == Path(output_dir).resolve():
            yield (
                f"output_dir={str(output_dir)!r} is the folder of {option}: the trained model would overwrite it; give "
                "another output_dir."
            )


def overwritten_checkpoints(output_dir: Any, paths: Mapping[str, str | None]) -> Iterator[str]:
    """A sentence for each path inside a checkpoint of output_dir, which a run from the beginning overwrites."""
    for option, path in paths.items():
        parts = Path(path).resolve() if path and Path(path).is_dir() else Path("/")
        inside = [folder for folder in (parts, *parts.parents) if folder.parent == Path(output_dir).resolve()]
        if inside and inside[0].name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            yield (
                f"{option}={path!r} is a checkpoint of output_dir={str(output_dir)!r}, where a new run writes and "
                "deletes its own: give another output_dir, or continue that run with resume_from_checkpoint."
            )


def load_tokenizer(path: str, name: str, **kwargs: Any) -> Any:
    """The tokenizer at a path, which `name` names for the user.

    Raises:
        ValueError: there is none. Where no file of one is, transformers makes one without words for many kinds of
            models, and every prompt would be empty.
    """
    try:
        tokenizer, reason = AutoTokenizer.from_pretrained(path, **kwargs), "none of its files is there"
    except Exception as error:  # as many classes as there are tokenizers
        tokenizer, reason = None, f"{type(error).__name__}: {first_line(error)}"
    if tokenizer is None or not has_tokens(tokenizer):
        spelling = "" if Path(path).is_dir() else "check the spelling, for there is no such folder; else "
        raise ValueError(
            f"the tokenizer of {name} cannot be loaded here ({reason}): {spelling}put its files (tokenizer.json, "
            "tokenizer_config.json) beside the model's, or in Python pass processing_class."
        )
    return tokenizer
