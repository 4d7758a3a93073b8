"""Recipes as files: reading one, and where those are that come with the package, in a checkout or a wheel."""

from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parent
_INSIDE = _PACKAGE / "recipes"  # where pyproject.toml puts the folder in a wheel
RECIPES = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipe(path: str) -> Path:
    """The recipe at `path`; where there is no such file and it begins with recipes/, the one that was shipped.

    So a command that names a recipe works in any folder. What is neither there nor shipped is returned as it is.
    """
    given = Path(path)
    if not given.exists() and given.parts[:1] == (RECIPES.name,):
        shipped = RECIPES.joinpath(*given.parts[1:])
        return shipped if shipped.is_file() else given
    return given


def accelerate_file(name: str) -> Path | None:
    """The accelerate file that `--accelerate_config` means: a path, or the name of one that was shipped. None: none."""
    paths = (Path(name), RECIPES / "accelerate" / f"{name}.yaml")
    return next((path for path in paths if name and path.is_file()), None)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe's file, which may be one that was shipped.

    Raises:
        ValueError: it is missing, no YAML or no mapping; one sentence for the user.
    """
    file = shipped_recipe(str(path))
    if not file.is_file():
        raise ValueError(f"--config {path} does not exist: give the path of a recipe (see recipes/README.md).")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a YAML mapping of field: value, and is a {type(content).__name__}.")
    return content
