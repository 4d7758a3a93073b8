"""The processes of `accelerate launch`, or this one alone."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """accelerate's state; made on CPUs where the launch asks for it or there is nothing else.

    Without being told, accelerate lets processes without a GPU run unconnected, each as if it were the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
