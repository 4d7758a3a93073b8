"""Which tensors of a GRPO batch mean what. Shape legend: B answers, P prompt tokens, C completion tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kl import kl_estimate, last_token_index, masked_sum
from ...kl.estimators import SAMPLED_ESTIMATORS
from ...monitor.metrics import finite
from ..exact.tokens import AnswerTokens
from ..session.session import ORIGIN
from ..shared.engine import weighted, with_trainers

# Model inputs of vision-language models that TRL carries from the rollout to the loss.
VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
_ROUNDING = 1e-9  # nats per answer: less than this is float32's rounding of log-probs that are equal


def loss_mask(inputs: dict) -> Tensor:
    """(B, C) tokens that the policy produced: no padding, and no tool output."""
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def shuffled(rollout: dict[str, Any]) -> dict[str, Any]:
    """The answers of a rollout in another order, as TRL's `shuffle_sequence_dict` gives it.

    TRL leaves the permutation on the host, which then waits for the device at every tensor.
    """
    permutation = torch.randperm(len(next(values for values in rollout.values() if values is not None)))
    there: dict[torch.device, Tensor] = {}

    def permuted(values: Any) -> Any:
        if values is None or (isinstance(values, Tensor) and values.dim() == 0):
            return values
        if not isinstance(values, Tensor):
            return [values[place] for place in permutation]
        if values.device not in there:
            there[values.device] = permutation.to(values.device, non_blocking=True)
        return values[there[values.device]]

    return {name: permuted(values) for name, values in rollout.items()}


class RefStates(NamedTuple):
    """The reference's hidden states of one answer. A batch has a list of them, which TRL shuffles and splits as it is.

    Tensors of different lengths in a list: no padding, no copy, and their lengths known on the host.
    """

    hidden: Tensor  # (n, H) at the tokens of the loss mask, in the precision of the output head; a view
    scored: int  # tokens of the answer that get a log-prob


def ref_states_of(inputs: dict) -> tuple[list[Tensor], AnswerTokens]:
    """The reference's hidden states, a tensor (n, H) an answer, and the tokens that they are at."""
    states: list[RefStates] = inputs["ref_hidden_states"]
    counts, scored = [len(each.hidden) for each in states], [each.scored for each in states]
    return [each.hidden for each in states], AnswerTokens(loss_mask(inputs).bool(), counts, scored)


def with_cut_answers(mask: Tensor, ids: Tensor, pad_token_id: int) -> Tensor:
    """(B, C) all tokens of the answers: TRL masks one that is cut off as a whole (`mask_truncated_completions`).

    Such an answer does not end in padding: its last other token is its last.
    """
    positions = torch.arange(ids.size(1), device=ids.device)
    length = last_token_index(ids != pad_token_id).unsqueeze(1) + 1
    return torch.where(mask.bool().any(1, keepdim=True), mask, (positions < length).to(mask.dtype))


def is_cut_off(ids: Tensor, mask: Tensor, ends: list[int]) -> Tensor:
    """(B,) bool: answers whose last token is none of `ends`."""
    last = last_token_index(mask)
    final = ids.gather(1, last.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (last < 0) | ~torch.isin(final, torch.tensor(ends, device=ids.device))


def attention_to_cut_answers(attention_mask: Tensor, ids: Tensor, length: int, pad_token_id: int) -> Tensor:
    """(B, P + C) attention mask in which answers, the last `length` tokens, are not hidden for being cut off."""
    answers = with_cut_answers(attention_mask[:, -length:], ids[:, -length:], pad_token_id)
    return torch.cat([attention_mask[:, :-length], answers], dim=1)


def hidden_mask(inputs: dict, pad_token_id: int) -> Tensor:
    """(B, C) bool: tokens that the policy made and the loss leaves out.

    Without tools all of an answer is the policy's. With them, or with a mask of the environment's, it is what that mask
    marks, and what it leaves out although the inference engine gives it a log-prob: 0 there stands for what the engine
    has not sampled. (Without a mask it is a token that the policy was certain of.)
    """
    answers = with_cut_answers(inputs["completion_mask"], inputs["completion_ids"], pad_token_id).bool()
    outside = answers & ~loss_mask(inputs).bool()
    if "tool_mask" not in inputs:
        return outside
    made = inputs.get("policy_made", torch.zeros_like(outside)).bool()
    engine_logps = inputs.get("sampling_per_token_logps")
    return outside & (made if engine_logps is None else made | (engine_logps != 0))


def health_sums(logps: Tensor, inputs: dict, pad_token_id: int) -> dict[str, Tensor]:
    """Sums over a micro-batch: the k3 of the KL inside and outside the loss mask."""
    mask, hidden = loss_mask(inputs), hidden_mask(inputs, pad_token_id)
    k3 = kl_estimate(logps, inputs["ref_per_token_logps"], "k3")
    return {"seen": masked_sum(k3, mask), "hidden": masked_sum(k3, hidden), "answers": mask.new_full((), len(mask))}


def health_metrics(sums: dict[str, float], *, behind_mask: bool) -> dict[str, float]:
    """`kl/masked` (nats per answer outside the loss mask) and its share of the KL, 0 of a KL that is rounding alone.

    Args:
        sums: of `health_sums`, over all processes.
        behind_mask: whether the loss mask may leave out what the policy made, and that was scored.
    """
    if not behind_mask or sums["answers"] <= 0:
        return {}
    whole = sums["hidden"] + sums["seen"]
    share = sums["hidden"] / whole if whole > _ROUNDING * sums["answers"] else 0.0
    return finite({"kl/masked": sums["hidden"] / sums["answers"], "kl/masked_share": share})


def sampled_kls(policy_logps: Tensor, inputs: dict, names: Sequence[str], weights: Tensor | None) -> dict[str, Tensor]:
    """(B, C) sampled estimates of the KL to the reference by name and, where it is wanted, of that to the start.

    Args:
        policy_logps: (B, C).
        inputs: a micro-batch.
        names: of estimators, among them those to take.
        weights: (B, C) of policy to sampler; None where they are the same.
    """
    ref_logps = inputs["ref_per_token_logps"]
    wanted = [name for name in SAMPLED_ESTIMATORS if name in names]
    found: dict[str, Tensor] = {name: kl_estimate(policy_logps, ref_logps, name) for name in wanted}
    if inputs.get("origin_per_token_logps") is not None:
        found[ORIGIN] = kl_estimate(policy_logps, inputs["origin_per_token_logps"], "k3")
    return found if weights is None else {name: weighted(weights, values) for name, values in found.items()}


def sampler_logps_of(policy_logps: Tensor, inputs: dict) -> Tensor | None:
    """(B, C) log-probs under the policy that really sampled; None where that is the policy as it is.

    The inference engine's own, where TRL has them; NaN there marks tokens it could not score, which fall back to the
    trainer's.
    """
    trainer_logps = inputs.get("old_per_token_logps")
    engine_logps = inputs.get("sampling_per_token_logps")
    if engine_logps is None:
        return trainer_logps
    return with_trainers(engine_logps, policy_logps if trainer_logps is None else trainer_logps)


def scored_by_sampler(inputs: dict, mask: Tensor) -> Tensor:
    """(B, C) bool: tokens of `mask` that have a log-prob of the policy that sampled them."""
    engine_logps = inputs.get("sampling_per_token_logps")
    return mask.bool() if engine_logps is None else mask.bool() & ~engine_logps.isnan()
