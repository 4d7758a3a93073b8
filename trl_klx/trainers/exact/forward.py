"""The exact KL computed inside the policy's forward, where DDP and its kin see every parameter that is used.

The reference's hidden states at the tokens that count, what its output head is given, are kept from its scoring pass
and go through that head chunk by chunk. Where the policy's forward is TRL's fused head (TRL >= 1.16), log-probs,
entropy and the KL come from one projection of its hidden states (`fused`); where it returns logits, the KL is taken
from them (`chunked_exact_kl_from_logits`). The result rides out on the model's output, as a field of a subclass of the
output's own class: wrappers rebuild outputs from their declared fields, and an ad-hoc key would be lost or crash them.

Policy and reference are scored alike, by logits that are not rounded to half precision: their log-ratios too are true.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from trl.trainer import utils as trl_utils

from ...kl import chunked_exact_kl, chunked_exact_kl_from_logits
from ...kl.exact import Direction
from ...kl.logits import LogitTransform
from ..reference.build import causal_lm
from ..reference.shards import is_flattened
from ..seams import FUSED_LM_HEAD, swapped
from .fused import FusedScores
from .head import (
    WITHOUT_EXACT,
    HeadInput,
    are_close,
    call_as_forward,
    check_heads,
    not_called,
    reshard,
    unknown_transform,
    unrounded,
    whole,
)
from .requests import Part, Request
from .tokens import AnswerTokens, ranks_of


def exact_kl_between(trainer: Any, policy: nn.Module, *, temperature: float, direction: Direction) -> "ExactKLForward":
    """The exact KL of a trainer's policy to its reference.

    Raises:
        ValueError: it cannot be computed for this model, or for this kind of sharding.
    """
    check_not_flat(trainer)
    causal = causal_lm(policy)
    reference = causal if trainer.ref_model is None else causal_lm(trainer.accelerator.unwrap_model(trainer.ref_model))
    exact = ExactKLForward(causal, reference, temperature=temperature, direction=direction)
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # there the first step looks
        exact.check()
    return exact


def check_not_flat(trainer: Trainer) -> None:
    """Raise ValueError under FSDP1, which flattens the head into one parameter with others."""
    if is_flattened(trainer.accelerator):
        raise ValueError(
            "fsdp_version=1 flattens the output head, which the exact KL reads: use fsdp_version 2, DDP or DeepSpeed, "
            "or kl_estimator k1, k2 or k3 (in DPO kl_coef 0 and no kl_probe_steps)."
        )


class ExactKLForward:
    """Gives a causal language model's forward the exact KL to a reference, on request.

    Args:
        policy: the causal language model being trained (the base model inside PEFT).
        reference: the frozen reference, or `policy` itself where the reference is the policy without its adapter.
        temperature: sampling temperature; both distributions are scored at it.
        direction: "reverse" or "forward".

    Raises:
        ValueError: the output head carries an adapter, or the vocabularies differ.
    """

    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel, *, temperature: float, direction: Direction
    ) -> None:
        self._policy, self._reference = policy, reference
        self._direction: Direction = direction
        self._transform = LogitTransform.of(policy.config, temperature)
        self._call: Request | None = None  # what forwards are to serve
        self._checked = False
        check_heads(policy, reference)
        for model in {id(model): model for model in (policy, reference)}.values():
            self._wrap_forward(model)

    def _wrap_forward(self, wrapped: PreTrainedModel) -> None:
        # For good, and not while scoring only: accelerate's autocast goes around it.
        kept = f"_forward_{id(self)}"
        # Kept on the model: a copy of the model has a copy of it, which is bound to that copy.
        setattr(wrapped, kept, wrapped.forward)

        # Same signature: `generate` validates its model arguments against it.
        @functools.wraps(type(wrapped).forward)
        def forward(model, *args, **kwargs):
            original, request = getattr(model, kept), self._call
            if request is None or request.is_served or model not in (self._policy, self._reference):
                return original(*args, **kwargs)
            reshard(model.get_output_embeddings())
            if kwargs.get("fused_lm_head"):
                return self._by_fused_head(request, model, kwargs["labels"], lambda: original(*args, **kwargs))
            return self._by_logits(request, model, lambda: original(*args, **kwargs))

        wrapped.forward = types.MethodType(forward, wrapped)

    @torch.no_grad()
    def check(self) -> None:
        """Run the policy on a few tokens, before it is sharded, to see that what its head does is known.

        Raises:
            ValueError: it is not.
        """
        policy, training = self._policy, self._policy.training
        embedding: Any = policy.get_input_embeddings()
        ids = torch.arange(4, device=embedding.weight.device).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        policy.eval()
        try:
            with torch.compiler.set_stance("force_eager"), unrounded(policy.get_output_embeddings()) as given:
                output = policy(**inputs)
            hidden, _ = _latest(policy, given)
            self._check_projection(hidden, output)
            if FUSED_LM_HEAD and not are_close(policy.base_model(**inputs).last_hidden_state, hidden):
                raise ValueError(
                    f"TRL's fused head reads other hidden states of {type(policy).__name__} than the model's own head "
                    f"does: {WITHOUT_EXACT}."
                )
        finally:
            policy.train(training)

    @contextmanager
    def log_probs(self, tokens: AnswerTokens) -> Iterator[None]:
        """While active, forwards of policy and reference score the answers as they do for an exact KL."""
        with self._serving(Request(tokens)):
            yield

    @contextmanager
    def hidden_states(self, tokens: AnswerTokens) -> Iterator[list[Tensor]]:
        """While active, collect the hidden states that predict the tokens: a tensor (n, H) for each answer.

        They are those that the output head is given, in the precision in which it takes them.
        """
        request = Request(tokens, keeps_hidden=True)
        with self._serving(request):
            yield request.kept

    @contextmanager
    def exact_kl(
        self, model: nn.Module, tokens: AnswerTokens, ref_hidden: list[Tensor], *, with_grad: bool
    ) -> Iterator[list[Tensor]]:
        """While active, forwards of `model` also compute the exact KL; collect it (rows, C), one tensor per forward.

        Args:
            model: the model as it is called, wrappers (DDP, PEFT) included.
            tokens: of B answers, those that count; the others are not computed and are 0.
            ref_hidden: B tensors (n, H) from `hidden_states` of the reference, at the same tokens.
            with_grad: False where the value is only measured.
        """
        collected: list[Tensor] = []

        def collect(_module: nn.Module, _args: tuple, output) -> None:
            if sum(map(len, collected)) < len(ref_hidden):  # the trainer may run the model once more, for its outputs
                collected.append(output.exact_kl)

        handle = model.register_forward_hook(collect)
        try:
            with self._serving(Request(tokens, ref_hidden=ref_hidden, with_grad=with_grad)):
                yield collected
        finally:
            handle.remove()

    @torch.no_grad()
    def of_hidden_states(
        self,
        hidden: list[Tensor],
        within: AnswerTokens,
        ref_hidden: list[Tensor],
        tokens: AnswerTokens,
        *,
        at_once: int,
    ) -> Tensor:
        """(B, C) exact KL of hidden states of policy and reference that `hidden_states` kept; a constant.

        Args:
            hidden: B tensors, the policy's at the tokens of `within`.
            ref_hidden: B tensors, the reference's at `tokens`, which are among those.
            at_once: answers whose hidden states are copied at a time.
        """
        found = []
        for start in range(0, len(hidden), at_once):
            stop = start + at_once
            policy = hidden[start:stop], within.rows(start, stop)
            found.append(self._of_answers(*policy, ref_hidden[start:stop], tokens.rows(start, stop)))
        return torch.cat(found)

    def _of_answers(
        self, hidden: list[Tensor], within: AnswerTokens, ref_hidden: list[Tensor], tokens: AnswerTokens
    ) -> Tensor:
        head = self._policy.get_output_embeddings()
        policy_hidden = torch.cat(hidden)
        if tokens.count != within.count:
            policy_hidden = policy_hidden.index_select(0, ranks_of(within.mask)[tokens.places])

        def kl(hidden_NH: Tensor, ref_weight: Tensor, ref_bias: Tensor | None) -> Tensor:
            ref_NH = torch.cat(ref_hidden).to(hidden_NH.device)
            options = {"bias": head.bias, "ref_bias": ref_bias, **self._options}
            with torch.autocast(hidden_NH.device.type, enabled=False):  # they are in the head's precision
                return chunked_exact_kl(hidden_NH, head.weight.to(hidden_NH), ref_NH, ref_weight.to(ref_NH), **options)

        return tokens.spread(self._with_ref_head(kl, policy_hidden, in_policy_head=True))

    @contextmanager
    def _serving(self, request: Request) -> Iterator[None]:
        # A compiled model (torch_compile) keeps graphs of what the forward does without a request.
        with swapped(self, _call=request), torch.compiler.set_stance("force_eager"):
            yield

    def _by_fused_head(self, request: Request, model: PreTrainedModel, labels: Tensor, run: Callable[[], Any]) -> Any:
        """TRL's fused head, with scores of our own."""
        device = model.get_output_embeddings().weight.device
        part = request.take(labels.size(0), device)
        scores = FusedScores(
            part,
            labels,
            trl_utils._ChunkedLogProbFunction,
            transform=self._transform,
            direction=self._direction,
            ref_head=self._ref_head,
        )
        with swapped(trl_utils, _ChunkedLogProbFunction=scores):
            output = run()
        return self._given(request, part, output, scores.hidden, scores.exact)

    def _ref_head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The reference's head, where the policy's is `weight` and `bias`."""
        ref_head = self._reference.get_output_embeddings()
        return (weight.detach(), bias) if ref_head is self._policy.get_output_embeddings() else whole(ref_head)

    def _by_logits(self, request: Request, model: PreTrainedModel, run: Callable[[], Any]) -> Any:
        """A forward that returns logits: they are not rounded, and the KL is taken from them."""
        head = model.get_output_embeddings()
        with unrounded(head) as given:
            output = run()
        hidden, dtype = _latest(model, given)
        part = request.take(hidden.size(0), hidden.device)
        kept = exact = None
        if part.keeps_hidden:
            kept = part.tokens.select(hidden.detach()).to(dtype)
        if part.ref_hidden is not None:
            if not self._checked:
                self._check_projection(hidden, output)
            with torch.set_grad_enabled(torch.is_grad_enabled() and part.with_grad):
                exact = self._from_logits(part, output.logits)
        return self._given(request, part, output, kept, exact)

    def _given(self, request: Request, part: Part, output: Any, hidden: Tensor | None, exact: Tensor | None) -> Any:
        if hidden is not None:
            request.kept.extend(part.tokens.split(hidden))
        return output if exact is None else _with_exact_kl(output, exact)

    @property
    def _options(self) -> dict[str, Any]:
        """How both heads' outputs become logits, and which way the KL goes."""
        return {**self._transform.arguments, "direction": self._direction}

    def _from_logits(self, part: Part, logits: Tensor) -> Tensor:
        """(B, C) from the policy's logits, (B, at least C + 1, V): only the reference is projected.

        Takes them whole, the last one included, because a slice or a selection would copy them, forward and backward.
        """
        counted = nn.functional.pad(part.tokens.to(logits.device).placed(logits.size(1) - 1), (0, 1))

        def kl(logits: Tensor, ref_weight: Tensor, ref_bias: Tensor | None) -> Tensor:
            assert part.ref_hidden is not None
            ref_hidden = part.ref_hidden.to(logits.device)
            return chunked_exact_kl_from_logits(
                logits, ref_hidden, ref_weight, mask=counted, ref_bias=ref_bias, **self._options
            )

        exact = self._with_ref_head(kl, logits, in_policy_head=False)
        return part.tokens.to(exact.device).spread(exact)

    def _with_ref_head(self, kl: Callable[..., Tensor], policy: Tensor, *, in_policy_head: bool) -> Tensor:
        """Call `kl(policy, ref_weight, ref_bias)`, as the forward of the policy's head where its weights are needed."""
        head, ref_head = self._policy.get_output_embeddings(), self._reference.get_output_embeddings()
        if ref_head is head:  # read inside, where the head's own hooks have gathered them
            return call_as_forward(head, lambda policy: kl(policy, head.weight.detach(), head.bias), policy)
        weight, bias = whole(ref_head)

        def on_its_device(policy: Tensor) -> Tensor:
            return kl(policy, weight.to(policy.device), None if bias is None else bias.to(policy.device))

        return call_as_forward(head, on_its_device, policy) if in_policy_head else on_its_device(policy)

    def _check_projection(self, hidden: Tensor, output) -> None:
        """On one token: our projection of the hidden state is the logits the model itself returns."""
        if hidden.size(1) < 2:
            return
        self._checked = True
        with torch.no_grad():
            raw = self._policy.get_output_embeddings()(hidden[:1, -2]).float()
            ours = self._transform._replace(temperature=1.0).apply_(raw)
        if not are_close(ours, output.logits[:1, -2].detach().float()):
            raise unknown_transform(self._policy)


def _latest(model: nn.Module, given: list[HeadInput]) -> HeadInput:
    """What the model's output head was given last; it has to be the hidden states of all tokens."""
    if not given or given[-1].hidden.dim() != 3:
        raise not_called(model)
    return given[-1]


@functools.cache
def _output_class(base: type) -> Any:
    return dataclasses.make_dataclass(
        f"{base.__name__}WithExactKL", [("exact_kl", Tensor | None, dataclasses.field(default=None))], bases=(base,)
    )


def _with_exact_kl(output, exact_kl: Tensor):
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return _output_class(type(output))(**fields, exact_kl=exact_kl)  # type: ignore[arg-type]
