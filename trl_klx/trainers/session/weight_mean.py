"""The mean of importance weights: 1 where answers were sampled by the log-probs that the weights are made with."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ...monitor.moments import prompt_moments, sequence_rows, summarise

_NAME = "weight"


class WeightMean:
    r"""Mean over tokens of w = pi(a|s) / mu(a|s), with a standard error that counts prompts as independent.

    In every state, E_mu[w] = sum_a pi(a|s) = 1, wherever the policy pi has moved: only a mu that the answer was not
    sampled by, or that never samples what pi would (top_k, top_p), gives another mean. Give it answers that pi has not
    been trained on: training raises the probability of some tokens because they were sampled, and the mean with it.

    Args:
        accelerator: for gathering.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}  # of this process, since the last log

    def add(self, mode: str, weights: Tensor, mask: Tensor, prompts: Tensor) -> None:
        """Take token weights, (B, T); `mask`, (B, T), says which count, and `prompts`, (B,), are as in `KLControl`."""
        self._rows[mode].append(sequence_rows({_NAME: weights}, mask, prompts))

    def metrics(self, mode: str) -> dict[str, float]:
        """`kl/weight_mean` and `kl/weight_mean_se` since the last call; {} without weights. Call on every process."""
        rows, self._rows[mode] = self._rows[mode], []
        if not rows:
            return {}
        moments = prompt_moments(self._accelerator.gather(torch.cat(rows)).cpu())
        found = summarise(moments, (_NAME,))[_NAME]
        out = {"kl/weight_mean": found.per_token, "kl/weight_mean_se": found.per_token_se}
        return {name: value for name, value in out.items() if math.isfinite(value)}
