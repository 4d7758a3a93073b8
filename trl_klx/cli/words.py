"""The words of a command line and the recipe that `--config` names, each read once.

It imports nothing heavy: `trl-klx` asks it whether to start processes, and what it starts parses the same words by it.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from ..recipe_files import read_recipe, truth
from .parser import UsageError


class CommandLine(list[str]):
    """The words `--field value ...`, and what they mean.

    A hyphen inside an option's name counts as an underscore. Of an option that is given twice, the last counts.

    Attributes:
        options: the words after each option, by its name.
        stray: the words before the first option.
    """

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(words)
        self.stray: list[str] = []
        self.options: dict[str, list[str]] = {}
        current = self.stray
        for word in self:
            if word.startswith("--") or word == "-h":
                name, equals, value = word.partition("=")
                current = self.options[_field(name)] = [value] * bool(equals)
            else:
                current.append(word)

    @property
    def asks_for_help(self) -> bool:
        return not {"help", "h"}.isdisjoint(self.options)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The fields of the recipe's file; none where no file is named.

        Raises:
            ValueError: the file is missing or no mapping; one sentence for the user.
        """
        if "config" not in self.options:
            return {}
        if not self.options["config"]:
            raise UsageError(
                "--config needs the path of a recipe, for example recipes/starter/grpo_exact_both_pid.yaml."
            )
        return read_recipe(self.options["config"][0])

    def given(self, name: str) -> Any:
        """What is written for a field, on the command line or else in the recipe; None where neither has it.

        Raises:
            ValueError: the recipe cannot be read.
        """
        return "".join(self.options[name][:1]) if name in self.options else self.recipe.get(name)

    def flag(self, name: str) -> bool:
        """A field that is true or false, false where it is not given; the command line wins.

        Raises:
            ValueError: it is neither, or the recipe cannot be read.
        """
        if name in self.options:
            given: Any = self.options[name][0] if self.options[name] else True
        elif name in self.recipe:
            given = self.recipe[name]
        else:
            return False
        value = truth(given)
        if value is None:
            raise UsageError(f"{name}={given!r} must be true or false.")
        return value

    def without(self, name: str) -> list[str]:
        """All words but those of an option."""
        kept: list[str] = []
        dropped = 0  # of the words that follow
        for word in self:
            if word.startswith("--") and _field(word.partition("=")[0]) == name:
                dropped = 0 if "=" in word else 1
            elif dropped and not word.startswith("--"):
                dropped = 0
            else:
                kept.append(word)
        return kept


def _field(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
