"""Scores of an answer's tokens from the hidden states that an output head is given, in the head's place.

While a model scores answers, the forward of its output head is replaced by a function that selects the answers' tokens
and returns their log-probs, entropy and exact KL from one projection, chunk by chunk (`token_scores`): no (B, T, V)
logits are made, and the results are float32 where the model is bfloat16. Because it runs as the head's own forward,
what shards or offloads the head gathers its weights around it, forward and backward. In place of logits the model's
forward gets the raw projections of a few rows of the vocabulary on one token: what it makes of them shows whether all
that it does to logits is known.

PPO scores this way, because its scoring is ours alone. In GRPO and DPO it is TRL's, whose models give what its loss
takes: logits, or log-probs of a fused head (`forward`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ...kl import token_scores
from ...kl.chunked.products import compute_dtype
from ...kl.exact import Direction
from ...kl.logits import LogitTransform
from ...kl.masking import places_of
from ..reference.build import causal_lm
from ..reference.shards import is_flattened
from ..seams import swapped
from .forward import check_not_flat
from .head import are_close, check_heads, not_called, place_of_forward, unknown_transform, whole

Entropy = Literal["none", "measured", "trained"]

_SHOWN_ROWS = 8  # of the vocabulary, on one token: what the model's forward gets in place of logits


@dataclass(frozen=True)
class HiddenStates:
    """A tensor that passes through wrappers in its own precision: they would make an output's floats float32."""

    tensor: Tensor


@dataclass(frozen=True)
class Scored:
    """Of the answers' tokens, (B, T), float32 or wider, 0 on masked positions; None where it was not asked for."""

    logps: Tensor
    entropy: Tensor | None
    exact: Tensor | None
    hidden: HiddenStates | None  # (N, H) of the tokens that count, as the head takes them, without gradient


@dataclass(frozen=True)
class Asked:
    """The answers that a forward is to score, and what of them. No pytree: wrappers pass it on as it is."""

    head: "ScoredHead"  # of the model that scores
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, the N tokens that count
    count: int  # N, known on the host, so that selecting them waits for no device
    entropy: Entropy = "none"  # "trained": with gradient
    ref_hidden: Tensor | None = None  # (N, H') for the exact KL to `reference`
    reference: "ScoredHead | None" = None
    direction: Direction = "reverse"
    keeps_hidden: bool = False  # for an exact KL of another model to this one

    def scores(self, run: Callable[[], Any]) -> Scored:
        """The scores of a model whose forward `run` calls; its output has no logits that mean anything."""
        return self.head.scores(self, run)

    @functools.cached_property
    def places(self) -> Tensor:
        """(N,) where the tokens that count are in the flattened (B, T)."""
        return places_of(self.mask, self.count)


class ScoredHead:
    """The output head of a causal language model as something that scores tokens.

    A head that is not a plain linear layer, or whose outputs the model transforms in an unknown way, is left to itself:
    log-probs and entropy then come from the model's own logits, one answer at a time, in the model's precision.

    Args:
        model: the causal language model (the base model inside PEFT).
        temperature: sampling temperature.
        is_flat: whether what shards the model flattens the head's weight into one with others (FSDP1).
    """

    def __init__(self, model: PreTrainedModel, temperature: float, *, is_flat: bool = False) -> None:
        self._model, self._temperature = model, temperature
        self._transform = LogitTransform.of(model.config, temperature)
        self._is_read = not is_flat and type(model.get_output_embeddings()) is nn.Linear
        self._is_checked = False

    def scores(self, asked: Asked, run: Callable[[], Any]) -> Scored:
        """See `Asked.scores`.

        Raises:
            ValueError: an exact KL is wanted of a head that cannot be read, or does more than is known.
        """
        if self._is_read:
            call = _Call(self._model.get_output_embeddings(), self._transform, asked)
            output = call.run(run)
            problem = None if self._is_checked else self._problem(call, output)
            if problem is None:
                self._is_checked = True
                return _in_places(call.stacked, asked, call.kept)
            if asked.keeps_hidden or asked.ref_hidden is not None:
                raise problem
            self._is_read = False
        return self._from_logits(run().logits, asked)

    @torch.no_grad()
    def check(self) -> None:
        """Run the model on a few tokens, before it is sharded, to see that what its head does is known.

        Raises:
            ValueError: it is not.
        """
        model: Any = self._model
        embedding, training = model.get_input_embeddings(), model.training
        ids = torch.arange(4, device=embedding.weight.device).unsqueeze(0)
        mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        model.eval()
        try:
            asked = Asked(self, ids[:, 1:], mask, mask.numel(), keeps_hidden=True)
            asked.scores(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
        finally:
            model.train(training)

    def weights(self, head: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, frozen, as the reference's of a policy whose head is `head` and has its weights gathered."""
        own: Any = self._model.get_output_embeddings()
        if own is not head:
            return whole(own)
        weight, bias = own.weight, own.bias
        return weight.detach(), None if bias is None else bias.detach()

    def _problem(self, call: "_Call", output: Any) -> ValueError | None:
        """Why the head cannot be read, where the output of the model's forward shows it."""
        if call.shown is None:
            return not_called(self._model)
        ours = self._transform._replace(temperature=1.0).apply_(call.shown.float().clone())
        return None if are_close(ours, output.logits.float()) else unknown_transform(self._model)

    def _from_logits(self, logits: Tensor, asked: Asked) -> Scored:
        length = asked.ids.size(1)

        def scores(logits_TV: Tensor, ids: Tensor) -> Tensor:
            logps = (logits_TV.float() / self._temperature).log_softmax(-1)
            found = [logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)]
            if asked.entropy != "none":
                found.append(-(logps.exp() * logps).sum(-1))
            return torch.stack(_without_gradient(found, asked))

        # A slice of each answer, and a float32 copy of one at a time, which backward makes again.
        answers = [
            checkpoint(scores, row[-length - 1 : -1], ids.to(row.device), use_reentrant=False, preserve_rng_state=False)
            for row, ids in zip(logits.unbind(), asked.ids.unbind(), strict=True)
        ]
        stacked: Any = torch.stack(answers, dim=1)
        masked = torch.where(asked.mask.to(stacked.device), stacked, stacked.new_zeros(()))
        return _by_name(masked, asked, None)


class _Call:
    """One forward of a model, with the head's forward replaced."""

    def __init__(self, head: Any, transform: LogitTransform, asked: Asked) -> None:
        self._head, self._transform, self._asked = head, transform, asked
        self.stacked = torch.empty(0)  # (scores, N)
        self.shown: Tensor | None = None  # raw projections that the model's forward got
        self.kept: HiddenStates | None = None

    def run(self, run: Callable[[], Any]) -> Any:
        """Call `run`, the model's forward. What gathers the head's weights sees the scores leave the head."""
        handle = self._head.register_forward_hook(self._hand_on)
        try:
            with swapped(self._head, **{place_of_forward(self._head): self._forward}):
                return run()
        finally:
            handle.remove()

    def _forward(self, hidden: Tensor) -> Tensor:
        head, asked = self._head, self._asked
        length = asked.ids.size(1)
        if hidden.dim() != 3 or hidden.size(1) <= length:
            return F.linear(hidden, head.weight, head.bias)
        with torch.no_grad():
            bias = None if head.bias is None else head.bias[:_SHOWN_ROWS]
            self.shown = F.linear(hidden[:1, -1:], head.weight[:_SHOWN_ROWS], bias)
        places = asked.places.to(hidden.device)
        # The hidden states of the token before each.
        before = places // length * hidden.size(1) + places % length + hidden.size(1) - length - 1
        selected = hidden.flatten(0, 1).index_select(0, before)
        if asked.keeps_hidden:
            self.kept = HiddenStates(selected.detach().to(compute_dtype(hidden, head.weight)))
        return self._scores(selected, asked.ids.to(hidden.device).flatten()[places])

    def _scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(scores, N)"""
        head, asked = self._head, self._asked
        reference: dict[str, Any] = {}
        if asked.ref_hidden is not None and asked.reference is not None:
            weight, bias = asked.reference.weights(head)
            reference["ref_hidden"] = asked.ref_hidden.to(hidden.device)
            reference["ref_weight"] = weight.to(hidden.device)
            reference["ref_bias"] = None if bias is None else bias.to(hidden.device)
        found = token_scores(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            direction=asked.direction,
            with_entropy=asked.entropy != "none",
            **self._transform.arguments,
            **reference,
        )
        named = [found.logps, found.entropy, found.exact]
        return torch.stack(_without_gradient([score for score in named if score is not None], asked))

    def _hand_on(self, head: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.shown is None:
            return output
        self.stacked = output
        return self.shown


def _without_gradient(scores: list[Tensor], asked: Asked) -> list[Tensor]:
    """The same; the entropy, which comes second, is a constant where it is only measured."""
    if asked.entropy == "measured":
        scores[1] = scores[1].detach()
    return scores


def _in_places(scores_N: Tensor, asked: Asked, kept: HiddenStates | None) -> Scored:
    """Scores (scores, N) of the tokens that count at their places in (B, T)."""
    empty = scores_N.new_zeros(scores_N.size(0), asked.mask.numel())
    placed = empty.index_copy(1, asked.places.to(scores_N.device), scores_N)
    return _by_name(placed.view(-1, *asked.mask.shape), asked, kept)


def _by_name(scores: Tensor, asked: Asked, kept: HiddenStates | None) -> Scored:
    logps, *more = scores.unbind()
    entropy = more.pop(0) if asked.entropy != "none" else None
    return Scored(logps, entropy, more[0] if more else None, kept)


def scored_heads(
    trainer: Any, policy: nn.Module, *, temperature: float, with_exact: bool
) -> tuple[ScoredHead, ScoredHead]:
    """The heads of a trainer's policy and of its reference: one and the same where the two differ by an adapter.

    Raises:
        ValueError: the exact KL is wanted and cannot be computed for these models, or for this kind of sharding.
    """
    if with_exact:
        check_not_flat(trainer)
    causal, is_flat = causal_lm(policy), is_flattened(trainer.accelerator)
    reference = causal if trainer.ref_model is None else causal_lm(trainer.accelerator.unwrap_model(trainer.ref_model))
    if with_exact:
        check_heads(causal, reference)
    head = ScoredHead(causal, temperature, is_flat=is_flat)
    if with_exact and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # there the first step looks
        head.check()
    return head, head if reference is causal else ScoredHead(reference, temperature, is_flat=is_flat)
