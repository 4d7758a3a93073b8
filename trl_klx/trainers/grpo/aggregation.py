"""How each of TRL's loss types averages a loss per token. Shape legend: B answers, C completion tokens."""

from torch import Tensor

TOKEN_MEANS = ("cispo", "dapo", "vespo")  # divide by the tokens of the whole generation batch, whatever the micro-batch


def mean_as_trl(per_token: Tensor, mask: Tensor, loss_type: str, max_completion_length: int) -> Tensor:
    """The mean of a micro-batch as the other loss types take it.

    Args:
        per_token: (B, C), 0 where `mask` is.
        mask: (B, C) tokens that count.
        loss_type: `grpo` and `sapo` average each answer over its own tokens, `bnpo` over all tokens, `dr_grpo` over the
            largest possible number of them; `luspo` sums over each answer.
        max_completion_length: C at most.

    Raises:
        ValueError: TRL has a loss type that is not known here.
    """
    if loss_type in ("grpo", "sapo"):
        return (per_token.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return per_token.sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return per_token.sum() / (per_token.size(0) * max_completion_length)
    if loss_type == "luspo":
        return per_token.sum(-1).mean()
    raise ValueError(f"loss_type={loss_type!r} is unknown to trl_klx: set kl_aggregation='token'.")
