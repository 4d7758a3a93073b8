"""The command `trl-klx`."""

from .commands import main

__all__ = ["main"]
