"""Sphinx: `make docs` builds the pages of this folder, and the API from the docstrings, without a network."""

import dataclasses
import re

from trl_klx import __version__

project, author, release = "trl_klx", "the trl_klx contributors", __version__
copyright = "the trl_klx contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"trl_klx {release}"

myst_heading_anchors = 3  # [text](page.md#a-heading), as GitHub has it

default_role = "code"  # docstrings put code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what shape and unit an argument has


def _as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: an indented block is an equation or a table, and * and | mean themselves."""
    out: list[str] = []
    is_literal, after_blank, in_section = False, True, False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section = bool(re.fullmatch(r"(Args|Returns|Raises|Yields|Example|Examples):", line))
            is_literal = False
        elif indented and not in_section and after_blank and not is_literal:
            is_literal = True
            out += ["::", ""]
        out.append(line if is_literal else _escaped(line))
        after_blank = not line.strip()
    lines[:] = out + _fields(obj) if what == "class" else out


def _fields(obj) -> list[str]:
    """A config's own options, with what `--help` says of them."""
    if not dataclasses.is_dataclass(obj):
        return []
    own = [f for f in dataclasses.fields(obj) if f.name in obj.__annotations__ and "help" in f.metadata]
    return [
        line
        for field in own
        for line in ("", f"``{field.name}`` (default ``{field.default}``)", f"    {_escaped(field.metadata['help'])}")
    ]


def _short_signature(app, what, name, obj, options, signature, returns):
    """A config's would be its 200 fields."""
    return ("(output_dir, **fields)", None) if what == "class" and name.endswith("Config") else None


def _escaped(line: str) -> str:
    parts = re.split(r"(``?[^`]+``?)", line)
    head = re.match(r"\s*\*\*\w+:", line)  # napoleon knows **kwargs
    return line if head else "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in parts)


def _outside(app, name, source: list[str]) -> None:
    """Files of the repository outside this folder are no pages: the site offers them as they are."""
    source[0] = re.sub(r"\]\((\.\./[^)#]*)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app) -> None:
    app.connect("source-read", _outside)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-signature", _short_signature)
