"""The files that docs/first-run.md has its reader write."""

import re
from pathlib import Path

from .commands import ROOT

PAGE = ROOT / "docs" / "first-run.md"
# A paragraph that begins with a file's name, and the block below it.
_FILE = re.compile(r"^`([\w.]+)`, (?:(?!^```).)*^```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def write_first_run(folder: Path) -> None:
    """Reward, data and recipe, as the page has them."""
    files = dict(_FILE.findall(PAGE.read_text()))
    assert set(files) == {"my_reward.py", "my_data.jsonl", "first.yaml"}
    for name, text in files.items():
        (folder / name).write_text(text)
