"""Recipes as files: reading one, and where those are that come with the package, in a checkout or a wheel."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parent
_INSIDE = _PACKAGE / "recipes"  # where pyproject.toml puts the folder in a wheel
RECIPES = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent / "recipes"


class _StrictLoader(yaml.SafeLoader):
    """YAML without what its writer cannot have meant: a key given twice, 010 for eight, 1:30 for ninety."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    given = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name is not None and name in given and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            raise yaml.YAMLError(f"{name!r} is given a second time in line {line}: remove one of the two")
        given.add(name)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> int | float:
    text = node.value
    if ":" in text or re.match(r"[-+]?0[0-9_]", text):
        value = yaml.safe_load(text)
        raise yaml.YAMLError(
            f"{text} in line {node.start_mark.line + 1} is read as {value}: write {value}, or {text!r} in quotes"
        )
    is_whole = node.tag.endswith("int")
    return loader.construct_yaml_int(node) if is_whole else loader.construct_yaml_float(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


_WORDS = {"true": True, "t": True, "yes": True, "y": True, "1": True}
_WORDS |= {"false": False, "f": False, "no": False, "n": False, "0": False}


def truth(given: object) -> bool | None:
    """The truth value that a word or a value in YAML spells; None: it spells none."""
    if isinstance(given, str):
        return _WORDS.get(given.lower())
    return bool(given) if isinstance(given, (bool, int)) and given in (0, 1) else None


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
    """The accelerate file that `accelerate_config` means: a path, or the name of one of ours or TRL's. None: none."""
    trl = find_spec("trl")  # which imports nothing
    own, of_trl = RECIPES / "accelerate", Path(trl.origin if trl and trl.origin else ".").parent / "accelerate_configs"
    paths = (Path(name), own / f"{name}.yaml", of_trl / f"{name}.yaml")
    return next((path for path in paths if name and path.is_file()), None)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe's file, which may be one that was shipped.

    Raises:
        ValueError: it is missing, no YAML or no mapping; one sentence for the user.
    """
    file = shipped_recipe(str(path))
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"--config {path} {what}: give the path of a recipe (`trl-klx recipes` lists some).")
    try:
        content = yaml.load(file.read_text(), _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that does not exist, or of no text
        said = " ".join(str(error).replace(' in "<unicode string>",', ",").split())
        hints = {r"'\t'": "indent by spaces, not tabs", "':'": "write field: value, with a space after the colon"}
        hint = next((f" ({remedy})" for sign, remedy in hints.items() if sign in said), "")
        raise ValueError(f"{path} is not valid YAML: {said}{hint}.") from error
    if not isinstance(content, dict):
        kinds = {str: "text", list: "a list", type(None): "empty"}
        raise ValueError(f"{path} must be a YAML mapping of field: value, and is {kinds.get(type(content), 'none')}.")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"{path} has {name!r} where a field's name belongs: write field: value.")
    return content
