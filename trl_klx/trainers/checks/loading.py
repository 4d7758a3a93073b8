"""Keyword arguments that models are loaded with (`model_init_kwargs`)."""

from collections.abc import Mapping
from typing import Any


def loading_arguments(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy in which `torch_dtype`, as transformers called it up to 4, is `dtype`; beside TRL's own default of that
    name it would have no effect.

    Raises:
        ValueError: both are given, and differ.
    """
    given = dict(init_kwargs or {})
    if "torch_dtype" not in given:
        return given
    old = given.pop("torch_dtype")
    if _name(given.setdefault("dtype", old)) != _name(old):
        raise ValueError(
            f"model_init_kwargs gives dtype={given['dtype']!r} and torch_dtype={old!r}, which is the same option: "
            "keep dtype."
        )
    return given


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
