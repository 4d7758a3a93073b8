"""Which answers belong to one prompt: a number per prompt, the same in every step and on every process.

Standard errors count prompts as independent, so a prompt that is drawn again must be known again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets.fingerprint import Hasher
from torch import Tensor


def prompt_number(prompt: Any) -> int:
    """A number of a prompt, text, messages or token ids, by its content; that of images counts, too."""
    text = json.dumps(prompt, sort_keys=True, default=Hasher.hash)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def prompt_numbers(prompts: Sequence[Any], device: torch.device) -> Tensor:
    """(B,) numbers of prompts."""
    return torch.tensor([prompt_number(prompt) for prompt in prompts]).to(device, non_blocking=True)


class RolloutPrompts:
    """Numbers the prompts of GRPO's rollouts.

    Where environments make the prompts, rows do not hold them: there, every group of answers counts as a prompt of its
    own.

    Args:
        accelerator: knows which rows of a rollout are this process's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._seen = 0

    def numbers(self, rows: Sequence[Mapping[str, Any]], group_size: int, *, made_by_environments: bool) -> Tensor:
        """(B,) a number per prompt; TRL lays the `group_size` answers to one prompt out adjacently."""
        accelerator = self._accelerator
        if not made_by_environments:
            prompts = [[row["prompt"], row.get("image"), row.get("images")] for row in rows]
            return prompt_numbers(prompts, accelerator.device)
        place = accelerator.process_index * len(rows) + torch.arange(len(rows), device=accelerator.device)
        numbers = self._seen + place // group_size
        self._seen += -(-len(rows) * accelerator.num_processes // group_size)
        return numbers
