"""Recipes gone wrong, from two fixed seeds: each is refused in one sentence, or runs and means something.

`PYTHONPATH=tests python -m support.recipe_fuzzer --seed 7 --cases 1000` tries more.
"""

import re
import subprocess
import sys

import pytest
from support.processes import SUPPORT, environment


@pytest.mark.situation("gives a recipe with a field, key, word, file or reward that is wrong", "refused")
@pytest.mark.processes
@pytest.mark.parametrize("seed", [1, 2])
def test_recipes_gone_wrong(seed: int) -> None:
    """No traceback but of the user's own code, nothing that a dry run misses, nothing that runs and means nothing."""
    command = [sys.executable, str(SUPPORT / "recipe_fuzzer.py"), "--seed", str(seed), "--cases", "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) (\w+)$", result.stdout, flags=re.MULTILINE)}
    assert counts["cases"] == 60
    assert counts["refused"] > 36
    assert counts["ran"] >= 2  # the fuzzer's own recipes work
