"""`RunReport`: what a run shows and leaves behind, in Python as from a recipe; the field kl_report switches it off."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import ProgressCallback

from ...monitor.history import HistoryCallback
from ...monitor.progress import KLProgressCallback
from ..parts import Part
from .banner import banner
from .outcome import show_outcome

logger = logging.getLogger(__name__)


class RunReport(Part):
    """Prints a banner when a run begins, a progress bar, and a table at its end; leaves its settings, metrics and
    pictures in output_dir.

    Args:
        trainer: the trainer, which has its other callbacks.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        trainer.remove_callback(HistoryCallback)  # one of the user's would write each entry a second time
        trainer.add_callback(HistoryCallback())
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is ProgressCallback:  # and neither the user's own nor that of a notebook
                trainer.remove_callback(callback)
                trainer.add_callback(KLProgressCallback(coef_name=trainer.args.kl_coef_name))
                break

    def begin(self) -> None:
        if self._trainer.accelerator.is_main_process:
            Console(highlight=False).print(banner(self._trainer))
            self._trainer.pushes.write_settings()

    def end(self) -> None:
        trainer = self._trainer
        if not trainer.accelerator.is_main_process:
            return
        try:
            show_outcome(Console(), Path(trainer.args.output_dir), trainer.args)
        except Exception as error:  # whatever it is, the model that was trained may not be saved yet
            logger.warning("the table and the pictures of the run could not be made (%s)", error)
        if trainer.kl.budget.exceeded:
            print(trainer.kl.budget.message())
        if trainer.overoptimisation is not None:
            print(trainer.overoptimisation.summary())
