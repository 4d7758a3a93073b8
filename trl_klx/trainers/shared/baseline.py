"""The baseline of a KL credit where the answers of a rollout lie on several processes."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ...kl import leave_one_out_baseline


def baseline_of_others(accelerator: Accelerator, credit: Tensor, mask: Tensor, group_size: int | None = None) -> Tensor:
    """(B, T) `leave_one_out_baseline` in groups of consecutive answers, those of the processes one after another.

    Args:
        accelerator: for gathering. Call on every process, with as many answers.
        credit: (B, T) nats.
        mask: (B, T) tokens that count.
        group_size: None: the answers of all processes are one group.
    """
    rows, length = credit.shape
    both = torch.stack([credit, mask.to(credit.dtype)], dim=1)
    if accelerator.num_processes > 1:
        both = accelerator.gather(accelerator.pad_across_processes(both, dim=2))
    all_credit, all_mask = both.unbind(1)
    start = accelerator.process_index * rows
    baseline = leave_one_out_baseline(all_credit, all_mask, group_size or len(both))
    return baseline[start : start + rows, :length]
