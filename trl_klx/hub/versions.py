"""Versions of packages, also of those that are on the path without having been installed."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "unknown"


def version_of(name: str) -> str:
    """A package's version: as it was installed, else its own `__version__`, else "unknown".

    Of this package it is that of the code that runs, which an editable install can be behind.
    """
    if name == __package__.partition(".")[0]:
        return str(import_module(name).__version__)
    try:
        return version(name)
    except PackageNotFoundError:
        pass
    try:
        return str(getattr(import_module(name), "__version__", UNKNOWN))
    except ImportError:
        return UNKNOWN
