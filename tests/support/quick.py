"""What makes tiny runs quick, in this process and in those that tests start."""

import gc
import importlib.metadata
from functools import cache

import torch


def make_quick() -> None:
    """To be called once all that a run needs is imported."""
    torch.set_num_threads(1)  # the models are so small that threads cost more than they bring
    # accelerate asks whether DeepSpeed is installed whenever it unwraps a model, and reads the package's record for it.
    importlib.metadata.metadata = cache(importlib.metadata.metadata)  # type: ignore[assignment]
    # TRL and accelerate collect garbage often; what was imported is none, and would be looked through each time.
    gc.collect()
    gc.freeze()
