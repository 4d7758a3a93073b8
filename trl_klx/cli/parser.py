"""What the commands that take plain arguments share: a parser whose complaints are one sentence, like all bad input."""

import argparse
from typing import NoReturn


class UsageError(ValueError):
    """The command line cannot be understood. The message is one sentence that names the command for help."""


class CommandParser(argparse.ArgumentParser):
    """argparse's, raising `UsageError` where argparse prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`.")
