"""Imports what a run imports; for processes that others are forked from."""

import datasets  # noqa: F401

from support import fault_tools  # noqa: F401
from support.quick import make_quick
from trl_klx.trainers.seams import TRL_HAS_PPO

if TRL_HAS_PPO:
    from trl_klx import KLXPPOTrainer  # noqa: F401
make_quick()
