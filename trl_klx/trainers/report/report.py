"""`RunReport`: what a run tells about itself, in Python as from a recipe; the field kl_report switches it off."""

from typing import Any

from rich.console import Console

from ..parts import Part
from .banner import banner


class RunReport(Part):
    """Prints a banner when a run begins."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def begin(self) -> None:
        if self._trainer.accelerator.is_main_process:
            Console(highlight=False).print(banner(self._trainer))
