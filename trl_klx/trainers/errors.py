"""What ends a run, or keeps one from starting: each message names the cause and the remedy."""


class RunError(RuntimeError):
    """A run cannot continue; the message tells what happened, and what to do."""


class NotSavedError(RunError):
    """A checkpoint could not be written; those before it are as they were."""


class NonFiniteError(RunError):
    """Weights, or too many steps in a row, are not finite; the message tells what, where, and what to try."""


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from; the message names the file and the remedy."""


class FolderError(ValueError):
    """A run cannot have its folder. The message names the folder, the reason and the remedy."""
