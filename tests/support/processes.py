"""Where processes that tests start find the package and these helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SUPPORT = ROOT / "tests" / "support"


def environment(**own: str) -> dict[str, str]:
    """This process's variables, one thread, the package and `tests` as the first places to import from, and others."""
    paths = [own.pop("first", ""), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), **own}
