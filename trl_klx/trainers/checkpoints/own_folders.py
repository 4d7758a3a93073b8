"""Which folders a run may delete: the checkpoints in its own output_dir, and nothing that a file or a link leads to."""

import logging
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "kl_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")
logger = logging.getLogger(__name__)


def is_own(folder: Path, output_dir: Path) -> bool:
    """Whether a folder is a checkpoint of the run: a real folder, no link, directly in output_dir, by its name."""
    lies_in_run = folder.parent.resolve() == output_dir.resolve()
    return bool(_NAME.fullmatch(folder.name)) and lies_in_run and folder.is_dir() and not folder.is_symlink()


def own_checkpoint(name: str, output_dir: Path) -> Path | None:
    """The checkpoint of a run that a state file names; None where the run has none of that name.

    Older state files hold whole paths, of wherever the run was when they were written: only the last part counts.
    """
    folder = output_dir / Path(name).name
    return folder if is_own(folder, output_dir) else None


def discard(folder: Path, output_dir: Path) -> None:
    """Delete a checkpoint of the run; whatever else it may be stays, with a warning.

    Killed in the middle, it does not leave what looks like a whole checkpoint.
    """
    if not is_own(folder, output_dir):
        if folder.is_symlink() or folder.exists():
            logger.warning("%s is not a checkpoint folder of the run in %s: it is not deleted.", folder, output_dir)
        return
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
