"""Recipes gone wrong, a few hundred from a fixed seed: each is refused in one sentence, or runs and means something."""

import re
import subprocess
import sys

import pytest
from support.processes import SUPPORT, environment


@pytest.mark.situation("gives a recipe with a field, key, word, file or reward that is wrong", "refused")
def test_recipes_gone_wrong() -> None:
    """No traceback but of the user's own code, nothing that a dry run misses, nothing that runs and means nothing."""
    command = [sys.executable, str(SUPPORT / "recipe_fuzzer.py"), "--seed", "1", "--cases", "200"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) (\w+)$", result.stdout, flags=re.MULTILINE)}
    assert counts["cases"] > 180
    assert counts["refused"] > 120
    assert counts["ran"] > 5  # the fuzzer's own recipes work
