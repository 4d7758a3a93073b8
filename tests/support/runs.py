"""What a short run of a trainer gave: its log, step by step, and its weights."""

from typing import Any

import torch
from torch import Tensor


def trained(made: Any, *args: Any) -> tuple[list[dict], list[Tensor]]:
    """What a run logged at each step, and its weights."""
    made.train(*args)
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return logs, [weight.detach().clone() for weight in made.model.parameters()]


def equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, mine, theirs))
