"""Checkpoints that are whole or none: which folder is one, which is the last, and how one is written.

transformers writes `checkpoint-<step>` in place. Our state file is written last, from all processes' files, and names
them: a folder is a whole checkpoint exactly when it has that file and all files that it names.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import whole
from ..errors import CheckpointError, FolderError, NotSavedError
from ..parts import Part
from ..seams import swapped
from .own_folders import STATE_FILE, discard, is_own, own_checkpoint
from .run_lock import run_folder

logger = get_logger(__name__)
T = TypeVar("T")
# Not needed to resume, and not pushed with a checkpoint: a pickle of all arguments, and PEFT's card.
_NOT_LISTED = (STATE_FILE, "training_args.bin", "README.md")
LAST = "last"  # as a checkpoint to resume from: the last complete one in output_dir


def write_state(folder: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write the state file, whole or not at all; with it the folder becomes a whole checkpoint.

    Call when every other file is written; it lists those that resuming needs.
    """
    path = Path(folder) / STATE_FILE
    files = sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())
    files = [name for name in files if name not in _NOT_LISTED]
    with whole(path) as partial:
        partial.write_text(json.dumps({**state, "saved_at": time.time(), "files": files}, indent=2))


def read_state(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of the state file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise unreadable(folder, str(error)) from error
    if not isinstance(state, dict):
        raise unreadable(folder, f"a {type(state).__name__} and no object")
    return state


def unreadable(folder: str | os.PathLike, reason: str) -> CheckpointError:
    """The refusal of a spoilt state file."""
    return CheckpointError(
        f"{Path(folder) / STATE_FILE} is not a readable controller state ({reason}): resume from another checkpoint, "
        "or let the file hold {} to start the controller from the beginning."
    )


def missing_file(folder: str | os.PathLike) -> str | None:
    """What keeps a folder from being a whole checkpoint: the name of a file that is not there. None: it is one."""
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        return STATE_FILE
    try:
        files = read_state(folder).get("files", [])
    except CheckpointError:
        return None  # complete, and spoilt afterwards: reading it will report that
    return next((name for name in files if not (folder / name).is_file()), None)


def whole_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole checkpoints of a run, the one written last at the end.

    By the time that they record themselves, not by step: a run that began in the folder of a longer one must not
    be resumed from the older run's checkpoints.
    """

    def age(folder: Path) -> tuple[float, int]:
        try:
            saved_at = float(read_state(folder).get("saved_at", 0.0))
        except (CheckpointError, TypeError):
            saved_at = 0.0
        return saved_at, _step(folder)

    return sorted((folder for folder in _folders(output_dir) if missing_file(folder) is None), key=age)


def resolve_checkpoint(wanted: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint folder that `resume_from_checkpoint` means: a folder; "last" or true for the last complete one.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    if wanted is None or str(wanted).lower() in ("false", ""):
        return None
    last = [str(folder) for folder in whole_checkpoints(output_dir)[-1:]]
    if str(wanted).lower() in ("true", LAST):
        if not last:
            raise CheckpointError(
                f"resume_from_checkpoint={wanted!r} finds no complete checkpoint in {output_dir}: leave it out to "
                f"start "
                "from the beginning."
            )
        return last[0]
    if not Path(str(wanted)).is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint={wanted!r} is not a folder: give a checkpoint-<step> folder of an earlier run, or "
            f"{LAST!r} for the last one in output_dir."
        )
    missing = missing_file(str(wanted))
    if missing is not None:
        beside = whole_checkpoints(Path(str(wanted)).parent)[-1:]
        remedy = f"resume from {beside[0]}, the last complete one" if beside else "there is no complete one beside it"
        raise CheckpointError(
            f"resume_from_checkpoint={wanted!r} is not a complete checkpoint, because it has no {missing}: {remedy}."
        )
    return str(wanted)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete all but `limit` checkpoints, half-written ones first and then the oldest, but none of `keep`."""
    if limit is None or limit <= 0:
        return
    own = [folder for folder in _folders(output_dir) if is_own(folder, output_dir)]
    whole = [folder for folder in whole_checkpoints(output_dir) if folder in own]
    everything = [folder for folder in own if folder not in whole] + whole
    surplus = len(everything) - max(limit, len(keep))
    kept = {folder.resolve() for folder in keep}
    for folder in [folder for folder in everything if folder.resolve() not in kept][: max(surplus, 0)]:
        discard(folder, output_dir)


def _folders(output_dir: str | os.PathLike) -> list[Path]:
    return [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def as_main_does(is_main: bool, act: Callable[[], T], refusal: type[Exception]) -> T:
    """What the main process gets by `act`, on every process; or its refusal, with the same sentence on all."""
    found: list[Any] = [None, None]
    if is_main:
        try:
            found[0] = act()
        except refusal as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise refusal(found[1])
    return found[0]


class Checkpoints(Part):
    """Writes the checkpoints of a run whole or not at all."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._accelerator = trainer, trainer.accelerator

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """While active, the main process holds output_dir for all.

        Raises:
            FolderError: another run holds it, or it cannot be written to.
        """
        is_main, folder = self._accelerator.is_main_process, self._trainer.args.output_dir
        with ExitStack() as held:
            as_main_does(is_main, lambda: held.enter_context(run_folder(folder)), FolderError)
            yield

    def agreed(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, as the main process finds it, on every process."""
        is_main, folder = self._accelerator.is_main_process, self._trainer.args.output_dir
        return as_main_does(is_main, lambda: resolve_checkpoint(wanted or None, folder), CheckpointError)

    def rotating_nothing(self) -> AbstractContextManager[None]:
        """Rotating is ours: transformers would delete old checkpoints before a new one is whole, and at the end of a
        run all but the best, also what the budget keeps and what is to be resumed from."""
        return swapped(self._trainer.args, save_total_limit=None)

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """While active, transformers writes this checkpoint, in place of an earlier run's or a half-written one.

        Raises:
            NotSavedError: it could not; what was written of it is deleted.
        """
        run, should_save = folder.parent, self._trainer.args.should_save
        if should_save and (folder.is_symlink() or folder.exists()) and not is_own(folder, run):
            raise NotSavedError(
                f"{folder} is not a folder but a link or a file, which a run does not overwrite: move it out of "
                f"{run}, and resume from the last checkpoint."
            )
        try:
            if should_save:
                discard(folder, run)
            self._accelerator.wait_for_everyone()
            yield
        except Exception as error:  # a full disk is an OSError, RuntimeError or SafetensorError, by who writes
            free = shutil.disk_usage(run).free / 1e6 if run.is_dir() else 0.0
            if should_save:
                discard(folder, run)
            earlier = whole_checkpoints(run)[-1:]
            remedy = f"resume from {earlier[0]}, the last complete one" if earlier else "start again: there is no other"
            reason = " ".join(str(error).split())[:300]
            raise NotSavedError(
                f"the checkpoint {folder} could not be written ({type(error).__name__}: {reason}; {free:.1f} MB were "
                f"free): make room, and {remedy}."
            ) from error

    def complete(self, folder: Path, state: dict[str, Any]) -> None:
        """Make the folder a whole checkpoint, once all processes have written their files."""
        self._accelerator.wait_for_everyone()
        if self._trainer.args.should_save:
            write_state(folder, state)

    def keeps(self) -> set[Path]:
        best = self._trainer.state.best_model_checkpoint
        return set() if best is None else {Path(best)}

    def run_of(self, checkpoint: str | os.PathLike) -> Path | None:
        """output_dir, where the checkpoint lies in it: only then do the names in its files mean folders there."""
        run = Path(self._trainer.args.output_dir)
        return run if Path(checkpoint).parent.resolve() == run.resolve() else None

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        """Take the best checkpoint for the folder of its name in output_dir: the path is of where the run once was."""
        trainer_state = self._trainer.state
        if run is None and trainer_state.best_metric is not None:
            logger.warning(
                f"{checkpoint} belongs to another run than {self._trainer.args.output_dir}: the best is looked for "
                f"again."
            )
            trainer_state.best_metric = trainer_state.best_global_step = None
        name = trainer_state.best_model_checkpoint or f"{PREFIX_CHECKPOINT_DIR}-{trainer_state.best_global_step}"
        best = None if run is None else own_checkpoint(name, run)
        trainer_state.best_model_checkpoint = None if best is None else str(best)
