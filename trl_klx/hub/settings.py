"""The settings of a run as plain fields: what `resolved_recipe.yaml` holds, and what of it may leave the machine."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..recipe_files import read_recipe
from .versions import version_of

RECIPE_FILE, VERSIONS_FILE = "resolved_recipe.yaml", "versions.json"
Settings = dict[str, Any]
# Computed by TRL from other fields and the number of processes: refused beside them, or wrong, when run again.
_DERIVED = {"generation_batch_size"}
_VOCABULARY_TOKENS = {"pad_token", "eos_token", "stop_token"}
_SECRETS = ("token", "api_key", "password", "secret")  # as a name, or its last part
_VERSIONED = ("trl_klx", "trl", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers")


def plain_settings(args: Any, *others: Any) -> Settings:
    """Every field of a trainer's config and of other dataclasses, with the value it ended up with; no secrets."""
    settings: Settings = {}
    for other in others:
        settings |= asdict(other)
    settings |= args.to_dict()
    # `to_dict` puts a placeholder wherever a name ends in token: right for secrets, wrong for a vocabulary's tokens.
    settings |= {name: getattr(args, name) for name in _VOCABULARY_TOKENS & set(settings)}
    plain = {name: value for name, value in settings.items() if _is_plain(value) and name not in _DERIVED}
    return _cleaned(plain, lambda value: value if _is_plain(value) else str(value))  # for example a dtype


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def _cleaned(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value without the secrets in it, and with all others changed."""
    if isinstance(value, dict):
        return {name: _cleaned(part, change) for name, part in value.items() if not _is_secret(name)}
    if isinstance(value, (list, tuple)):
        return [_cleaned(part, change) for part in value]
    return change(value)


def _is_secret(name: object) -> bool:
    return name not in _VOCABULARY_TOKENS and str(name).lower().endswith(_SECRETS)


def write_settings(folder: Path, settings: Settings) -> None:
    """Write the settings (`resolved_recipe.yaml`) and the versions of what runs here (`versions.json`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(as_yaml(settings))
    versions = {name: version_of(name) for name in _VERSIONED} | {"python": platform.python_version()}
    (folder / VERSIONS_FILE).write_text(json.dumps(versions, indent=2) + "\n")


def read_settings(folder: Path) -> Settings:
    """The settings that a run left.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise ValueError(f"there is no {path}, which every run writes: give the output_dir of a run.")
    return read_recipe(path)


def as_yaml(settings: Settings) -> str:
    return yaml.safe_dump(settings, sort_keys=True)


def public_settings(settings: Settings) -> Settings:
    """The settings without secrets, and without where this machine keeps its files."""
    return _cleaned(settings, lambda value: without_path(value) if isinstance(value, str) else value)


def without_path(text: str) -> str:
    """A path that only this machine has becomes `./<its last part>`; all other text stays.

    A relative path below the working directory stays: it reveals no more than the recipe that was written by hand. A
    path is never made a bare name, which from_pretrained would look up on the Hub.
    """
    if text.startswith(("/", "~", "../", "file:")):
        return f"./{Path(text).name}"
    return text
