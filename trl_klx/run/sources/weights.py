"""Weights on disk: whether they are there, whole, and of the shapes in the model's config. No tensor is read."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from ...wording import first_line

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def weight_problems(
    path: str | None, option: str, config: PreTrainedConfig | None, module: nn.Module | None
) -> Iterator[str]:
    """A sentence for what is wrong with the weights of a local model; of the Hub's, none.

    Args:
        path: of the model.
        option: that names it.
        config: of the model.
        module: the model on the meta device; None: its shapes are not compared.
    """
    folder = Path(path or "")
    if not path or not (folder / "config.json").is_file():
        return
    files, missing = _weight_files(folder)
    if missing is not None:
        yield f"{option}={path!r} holds no {missing}: weights are missing; copy or download it again."
        return
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            shapes |= _shapes(file)
        except ValueError as error:
            yield f"{option}={path!r} is incomplete ({file.name} {error}): copy or download it again."
            return
    for name, parameter in module.named_parameters() if module is not None else ():
        expected = list(parameter.shape)
        found = shapes.get(name, expected)
        if found != expected and not getattr(config, "quantization_config", None):
            yield (
                f"{option}={path!r} holds weights of another shape than in its config.json ({name} is {found}, for "
                f"{expected}): put the config.json there that belongs to the weights."
            )
            return


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The files that hold the weights, as transformers looks for them, and the name of one that is missing."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name], None
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                return [], f"readable {index.name}"
            missing = next((name for name in names if not (folder / name).is_file()), None)
            return [folder / name for name in names if missing is None], missing
    return [], SAFETENSORS


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes in a file; of a pickled one none, which is only looked at from outside.

    Raises:
        ValueError: it is cut or no such file, in words that follow its name.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot be read: {first_line(error)}") from error
    with file.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
    if file.stat().st_size == 0 or (is_zip and not zipfile.is_zipfile(file)):
        raise ValueError("is cut")
    return {}
