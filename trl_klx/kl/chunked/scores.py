"""Log-probs, entropy and exact KL of tokens from one projection of the policy and one of the reference."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from ..exact import Direction, exact_kl
from .products import float32_linear


class TokenScores(NamedTuple):
    """Of N tokens; (N,) float32 or wider, None where it was not asked for."""

    logps: Tensor | None  # log-prob of each token, nats
    entropy: Tensor | None  # of the distribution that it was drawn from, nats
    exact: Tensor | None  # exact KL to the reference, nats


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    direction: Direction = "reverse",
    with_entropy: bool = False,
    chunk_size: int | None = None,
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> TokenScores:
    """Scores of tokens from hidden states (N, H) and heads (V, H); `gathered` is entered around backward's products.

    Args:
        targets: (N,) token ids; None: no log-probs.
        ref_hidden: (N, H'); None: no exact KL.
    """
    cap = (lambda x: x) if softcap is None else (lambda x: softcap * (x / softcap).tanh())
    logits = cap(logit_scale * float32_linear(hidden, weight, bias)) / temperature
    logps_NV = logits.log_softmax(-1)
    exact = None
    if ref_hidden is not None and ref_weight is not None:
        ref = cap(logit_scale * float32_linear(ref_hidden, ref_weight, ref_bias).detach()) / temperature
        exact = exact_kl(logits, ref, direction)
    return TokenScores(
        None if targets is None else logps_NV.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        -(logps_NV.exp() * logps_NV).sum(-1) if with_entropy else None,
        exact,
    )
