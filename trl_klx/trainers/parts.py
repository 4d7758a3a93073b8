"""The moments of a run at which its parts have something to do; `shared/lifecycle.py` calls them, in one order."""

from pathlib import Path
from typing import Any


class Part:
    """What watches a run, or keeps something of it, beside the training loop. Each moment reaches every process."""

    def begin(self) -> None:
        """`train` was called: forget what an earlier run left."""

    def end_step(self) -> dict[str, float]:
        """All micro-batches of a step have their gradients, and the optimizer is about to step. Returns metrics."""
        return {}

    def log(self, mode: str, found: dict[str, float], evaluation: str | None) -> dict[str, float]:
        """The metrics since the last log, beside those that other parts have `found`.

        `evaluation` is the prefix of an evaluation's metrics; None in training.
        """
        return {}

    def saving(self, folder: Path) -> None:
        """All other files of a checkpoint are written, but for the state: write one's own."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable."""
        return {}

    def wrote(self, folder: Path, *, regular: bool) -> None:
        """A checkpoint is whole; `regular`: it is one of those that `save_steps` asks for."""

    def keeps(self) -> set[Path]:
        """Checkpoints that must not be deleted."""
        return set()

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        """Continue from `state`, which may be of an older version: what it does not hold starts from the beginning.

        `run` is output_dir where the checkpoint lies in it; only then do the names in the state mean folders there.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, OverflowError: it is not the state of such a part.
        """

    def end(self) -> None:
        """`train` is over, and its weights are sound."""

    def is_over(self) -> bool:
        """Whether the run ends where it is now."""
        return False
