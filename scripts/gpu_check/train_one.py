"""Runs `trl-klx` with the given words, then writes the peak of the device's memory to a file.

train_one.py FILE ALGORITHM WORDS...
"""

import json
import sys
import time
from pathlib import Path

import torch

from trl_klx.cli import main


def run(file: str, words: list[str]) -> int:
    start = time.perf_counter()
    status = main(words)
    device = torch.cuda.is_available()
    measured = {
        "seconds": time.perf_counter() - start,
        "peak": torch.cuda.max_memory_allocated() if device else None,
        "reserved": torch.cuda.max_memory_reserved() if device else None,
    }
    Path(file).write_text(json.dumps(measured))
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
