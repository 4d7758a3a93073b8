"""The recipes that come with the package: beside it in a checkout, inside it in an installed wheel."""

from pathlib import Path

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
