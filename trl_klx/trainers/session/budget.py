"""How far the policy may go from its start in a run, and which checkpoint is the last within that budget."""

import logging
import math
from pathlib import Path
from typing import Any

from ..checkpoints.own_folders import own_checkpoint

logger = logging.getLogger(__name__)

_DECAY = 0.8  # the budget is compared with a mean over about five readings
_STEP = 0.05  # a checkpoint is due whenever the KL has come this share of the budget closer to it


class KLBudget:
    """The KL of a run against `limit`, in nats per sequence; all readings are the same on every process.

    A reading is of the policy before the step's update: only the reading after a checkpoint was written tells whether
    it is within the budget.

    Args:
        limit: nats per sequence; None where there is no budget, or none yet (`kl_budget: auto`, see `set_limit`).
        ends_run: whether training ends beyond it.
        to: what the KL is to, in words.
    """

    def __init__(self, limit: float | None, *, ends_run: bool, to: str = "the reference") -> None:
        self.limit, self._ends_run, self._to = limit, ends_run, to
        self._sum = self._weight = 0.0
        self._checkpointed = 0.0  # smoothed KL at which the last checkpoint was asked for
        self.exceeded = False
        self.checkpoint: str | None = None  # the last that is known to be within the budget, and its KL
        self.checkpoint_kl = math.nan
        self._is_extra = False  # whether that checkpoint was written for the budget alone
        self._unconfirmed: tuple[str, bool] | None = None  # written since the last reading; whether for this alone
        self._before_limit: list[tuple[str, float]] = []  # checkpoints and their KL, while there was no limit
        self.superseded: list[str] = []  # written for the budget alone, and no longer the last within it
        self.wants_checkpoint = False  # of this step

    @property
    def kl(self) -> float:
        """The smoothed KL, in nats per sequence; NaN before the first reading."""
        return self._sum / self._weight if self._weight else math.nan

    def read(self, kl: float) -> bool:
        """Take a reading; one that is not finite is ignored. Returns whether the KL has left the budget with it."""
        if not math.isfinite(kl):
            return False
        self._sum = _DECAY * self._sum + (1 - _DECAY) * kl
        self._weight = _DECAY * self._weight + (1 - _DECAY)
        if self.limit is None:
            if self._unconfirmed is not None:
                self._before_limit.append((self._unconfirmed[0], self.kl))
                self._unconfirmed = None
            return False
        was_exceeded = self.exceeded
        self.judge()
        if self._unconfirmed is not None:
            self._confirm(*self._unconfirmed)
            self._unconfirmed = None
        return self.exceeded and not was_exceeded

    def judge(self) -> None:
        """Decide whether the KL that is known is beyond the budget, as it is of a run that is resumed where it
        ended."""
        self.exceeded = self.limit is not None and self.kl > self.limit

    def _confirm(self, folder: str, is_extra: bool) -> None:
        """Take the checkpoint that this reading is of for the last within the budget, if it is."""
        if self.exceeded:
            self.superseded += [folder] if is_extra else []
            return
        if self.checkpoint is not None and self._is_extra and self.checkpoint != folder:
            self.superseded.append(self.checkpoint)
        self.checkpoint, self.checkpoint_kl, self._is_extra = folder, self.kl, is_extra

    def set_limit(self, limit: float) -> None:
        """Set the budget in the middle of a run; the last checkpoint within it, of those until now, is then kept."""
        self.limit = limit
        within = [(folder, kl) for folder, kl in self._before_limit if kl <= limit and Path(folder).is_dir()]
        if within and self.checkpoint is None:
            self.checkpoint, self.checkpoint_kl = within[-1]

    @property
    def ends_run(self) -> bool:
        """Whether training ends here."""
        return self._ends_run and self.exceeded

    def end_step(self) -> None:
        """Decide whether a checkpoint of this step is wanted, after its reading."""
        self.wants_checkpoint = self.ends_run or self.checkpoint_is_due()

    def take_superseded(self) -> list[Path]:
        """The checkpoints written for the budget alone that nothing needs any more, once."""
        folders, self.superseded = self.superseded, []
        return [Path(folder) for folder in folders]

    def checkpoint_is_due(self) -> bool:
        """Whether the KL has come so much closer to the budget that a checkpoint should be written now."""
        if self.limit is None or self.exceeded or not self.kl >= self._checkpointed + _STEP * self.limit:
            return False
        self._checkpointed = self.kl
        return True

    def wrote(self, folder: Path, *, extra: bool) -> None:
        """Note that a checkpoint was written, of the policy of the next reading; `extra`: for the budget alone."""
        self._unconfirmed = str(folder), extra

    def message(self) -> str:
        """The message of a run that has used its budget."""
        consequence = "training stops here" if self._ends_run else "training continues"
        kept = (
            f"the last checkpoint within the budget is {self.checkpoint} ({self.checkpoint_kl:.3g} nats)"
            if self.checkpoint
            else "no checkpoint was written within the budget"
        )
        return (
            f"The KL to {self._to} has reached {self.kl:.3g} nats per sequence (smoothed), beyond "
            f"kl_budget={self.limit:g}; {consequence}; {kept}."
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable; of folders only their names, because a run may be moved or
        copied."""
        kept = {}
        if self.checkpoint:
            name = Path(self.checkpoint).name
            kept = {"checkpoint": name, "checkpoint_kl": self.checkpoint_kl, "is_extra": self._is_extra}
        numbers = {"sum": self._sum, "weight": self._weight, "checkpointed": self._checkpointed}
        return {**numbers, "before_limit": [[Path(folder).name, kl] for folder, kl in self._before_limit], **kept}

    def load(self, state: dict[str, Any], run: Path | None) -> None:
        """Continue from `state`; the limit is the recipe's.

        Args:
            state: of a checkpoint.
            run: the folder with the checkpoints that it names; None where there is none: no name is taken.

        Raises:
            ValueError, KeyError, TypeError: it is not the state of a budget.
        """
        numbers = [float(state[name]) for name in ("sum", "weight", "checkpointed")]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"budget={state!r}")
        self._sum, self._weight, self._checkpointed = numbers
        before_limit = [(_own(str(name), run), float(kl)) for name, kl in state["before_limit"]]
        self._before_limit = [(folder, kl) for folder, kl in before_limit if folder is not None]
        if state.get("checkpoint") is None:
            return
        name, kl, is_extra = str(state["checkpoint"]), float(state["checkpoint_kl"]), bool(state["is_extra"])
        self.checkpoint = _own(name, run)
        if self.checkpoint is None:
            logger.warning("%s, the last checkpoint within kl_budget, is not this run's: it is left alone.", name)
        else:
            self.checkpoint_kl, self._is_extra = kl, is_extra


def _own(name: str, run: Path | None) -> str | None:
    """The folder that a name means, among the checkpoints of a run."""
    folder = None if run is None else own_checkpoint(name, run)
    return None if folder is None else str(folder)
