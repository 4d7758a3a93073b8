r"""Kinds of tokens, by regular expressions over a token's text: the first that matches all of it is its class."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from ..passes.errors import MeasureError

SPECIAL, OTHER = "special", "other"
_LOGICAL = (
    "if then else thus hence therefore so because since but however although though unless not no and or nor implies "
    "suppose assume let either neither both must cannot wait actually alternatively first second next finally"
)
# In their order; special tokens come before all, by their ids.
DEFAULT_CLASSES = {
    "whitespace": r"\s+",
    "number": r"\s*[+-]?\d[\d.,]*",
    "logic": rf"(?i)\s*(?:{'|'.join(_LOGICAL.split())})",
    "math": r"\s*(?:[-+*/=<>^%±×÷≤≥≠≈∞∑∏∫√∂∈∉⊂∪∩→⇒⇔∀∃]+|\\[a-zA-Z]+|\$+)",
    "code": r"\s*(?:[{}\[\]()_;#@&|~`\\]+|(?:def|return|import|class|print|None|True|False|elif|lambda|self)\b.*)",
    "punctuation": r"\s*[^\w\s]+",
    "word": r"\s*[^\W\d_][\w'’-]*",
}


def load_classes(path: str | Path | None) -> dict[str, str]:
    """Classes of a YAML file, `name: regular expression`, ahead of the default ones; a name of theirs replaces it.

    Raises:
        MeasureError: the file is missing, no such mapping, or an expression is none.
    """
    own: Mapping[str, str] = {}
    if path is not None:
        if not Path(path).is_file():
            raise MeasureError(f"token_classes={str(path)!r} does not exist: give a YAML file of name: regex.")
        try:
            own = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise MeasureError(f"token_classes={str(path)!r} is not YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
            raise MeasureError(f"token_classes={str(path)!r} is not a mapping of name: regular expression: write one.")
    classes = {**own, **{name: text for name, text in DEFAULT_CLASSES.items() if name not in own}}
    for name, text in classes.items():
        try:
            re.compile(text)
        except re.error as error:
            raise MeasureError(f"the token class {name!r} is not a regular expression ({error}): {text!r}.") from error
    return classes


def classify(tokens: Sequence[str], ids: Sequence[int], special: set[int], classes: Mapping[str, str]) -> list[str]:
    """The class of every token: `special`, the first of `classes` that matches its whole text, or `other`."""
    patterns = {name: re.compile(text) for name, text in classes.items()}

    @cache
    def of_text(text: str) -> str:
        return next((name for name, pattern in patterns.items() if pattern.fullmatch(text)), OTHER)

    return [SPECIAL if token in special else of_text(text) for text, token in zip(tokens, ids, strict=True)]
