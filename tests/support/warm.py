"""Imports what a run imports; for processes that others are forked from."""

import datasets  # noqa: F401
import torch
import torch.distributed
import torch.utils.tensorboard

from support import fault_tools  # noqa: F401
from trl_klx.trainers.seams import TRL_HAS_PPO

torch.set_num_threads(1)
if TRL_HAS_PPO:
    from trl_klx import KLXPPOTrainer  # noqa: F401
