"""On which device tests run: the CPU, or what KLX_TEST_DEVICE names, such as cuda.

The tiny models, the settings of their trainers and the tensors of the maths tests (fixture `device`) are there.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

DEVICE = torch.device(os.environ.get("KLX_TEST_DEVICE", "cpu"))


def made_here() -> AbstractContextManager:
    """While active, tensors are made on this device; on the CPU they are anyway, and without what a context costs."""
    return nullcontext() if DEVICE.type == "cpu" else DEVICE


# Settings of every trainer: float32 on this device, and nothing written that a test does not ask for.
PLAIN = {
    "use_cpu": DEVICE.type == "cpu",
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
