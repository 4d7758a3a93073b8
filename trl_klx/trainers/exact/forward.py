"""The exact KL computed inside the policy's forward, where DDP and its kin see every parameter that is used.

The reference's hidden states (B, C, H), what its output head is given, are kept from its scoring pass and go through
that head chunk by chunk.
Where the policy's forward returns logits (TRL below 1.16), the KL is taken from them (`chunked_exact_kl_from_logits`);
where it does not, from the hidden states of its backbone (`chunked_exact_kl`). The result rides out on the model's
output, as a field of a subclass of the output's own class: wrappers rebuild outputs from their declared fields, and
an ad-hoc key would be lost or crash them.
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

from ...kl import chunked_exact_kl, chunked_exact_kl_from_logits
from ...kl.exact import Direction
from ...kl.logits import LogitTransform
from ..reference.build import causal_lm
from ..seams import FUSED_LM_HEAD, swapped
from .head import (
    WITHOUT_EXACT,
    are_close,
    call_as_forward,
    check_heads,
    not_called,
    reshard,
    unknown_transform,
    whole,
)


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


def is_fsdp1(trainer: Trainer) -> bool:
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and plugin.fsdp_version != 2


def check_not_flat(trainer: Trainer) -> None:
    """Raise ValueError under FSDP1, which flattens the head into one parameter with others."""
    if is_fsdp1(trainer):
        raise ValueError(
            "fsdp_version=1 flattens the output head, which the exact KL reads: use fsdp_version 2, DDP or DeepSpeed, "
            "or kl_estimator k1, k2 or k3 (in DPO kl_coef 0 and no kl_probe_steps)."
        )


class _Call:
    """What passes by while a model scores: the latest input of an output head, (rows, L, H)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hidden: Tensor | None = None

    def keep_input(self, head: nn.Module, args: tuple) -> None:
        self._hidden = args[0]

    def keep_output(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def completion(self, length: int) -> Tensor:
        """(rows, C, H) the hidden states that predict the completion's `length` tokens."""
        if self._hidden is None or self._hidden.dim() != 3:
            raise not_called(self._model)
        return self._hidden[:, -length - 1 : -1]


class _KLCall(_Call):
    """A scoring that asks for the exact KL. The trainer may split its batch; rows are handed out in order."""

    def __init__(self, model: nn.Module, ref_hidden: Tensor, mask: Tensor, *, with_grad: bool) -> None:
        super().__init__(model)
        self._ref_hidden, self._mask, self.with_grad = ref_hidden, mask, with_grad
        self._next_row, self.length = 0, mask.size(1)

    @property
    def is_served(self) -> bool:
        return self._next_row == len(self._mask)

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """The reference's hidden states (rows, C, H) and the mask (rows, C) of the next rows."""
        start, self._next_row = self._next_row, self._next_row + rows
        return self._ref_hidden[start : self._next_row], self._mask[start : self._next_row].bool()


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
        self._call: _KLCall | None = None  # what the policy's forward is to serve
        self._checked = False
        check_heads(policy, reference)
        self._wrap_forward()

    def _wrap_forward(self) -> None:
        # For good, and not while scoring only: accelerate's autocast goes around it.
        kept = f"_forward_{id(self)}"
        # Kept on the model: a copy of the model has a copy of it, which is bound to that copy.
        setattr(self._policy, kept, self._policy.forward)

        # Same signature: `generate` validates its model arguments against it.
        @functools.wraps(type(self._policy).forward)
        def forward(model, *args, **kwargs):
            original, call = getattr(model, kept), self._call
            if call is None or call.is_served or model is not self._policy:
                return original(*args, **kwargs)
            reshard(model.get_output_embeddings())
            output = original(*args, **kwargs)
            return _with_exact_kl(output, self._exact_kl(call, output))

        self._policy.forward = types.MethodType(forward, self._policy)

    @torch.no_grad()
    def check(self) -> None:
        """Run the policy on a few tokens, before it is sharded, to see that what its head does is known.

        Raises:
            ValueError: it is not.
        """
        policy, training, call = self._policy, self._policy.training, _Call(self._policy)
        embedding: Any = policy.get_input_embeddings()
        ids = torch.arange(4, device=embedding.weight.device).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        policy.eval()
        try:
            with self._watching(policy, call, lambda *_: None):
                output = policy(**inputs)
                hidden = call.completion(ids.size(1) - 1)
                self._check_projection(hidden, output)
                if FUSED_LM_HEAD:
                    policy.base_model(**inputs)
                    if not are_close(call.completion(ids.size(1) - 1), hidden):
                        raise ValueError(
                            f"TRL's fused head reads other hidden states of {type(policy).__name__} than the model's "
                            f"own head does: {WITHOUT_EXACT}."
                        )
        finally:
            policy.train(training)

    @contextmanager
    def hidden_states(self, model: nn.Module, completion_length: int) -> Iterator[list[Tensor]]:
        """While active, collect the (rows, C, H) hidden states that predict the completion, one tensor per forward."""
        collected: list[Tensor] = []
        call = _Call(self._policy)

        def collect(*_) -> None:
            collected.append(call.completion(completion_length).detach())

        with self._watching(model, call, collect):
            yield collected

    @contextmanager
    def exact_kl(
        self, model: nn.Module, ref_hidden: Tensor, mask: Tensor, *, with_grad: bool
    ) -> Iterator[list[Tensor]]:
        """While active, forwards of `model` also compute the exact KL; collect it (rows, C), one tensor per forward.

        Args:
            model: the model as it is called, wrappers (DDP, PEFT) included.
            ref_hidden: (B, C, H) from `hidden_states` of the reference.
            mask: (B, C) tokens that count; the others are not computed and are 0.
            with_grad: False where the value is only measured.
        """
        collected: list[Tensor] = []
        call = _KLCall(self._policy, ref_hidden, mask, with_grad=with_grad)

        def collect(_module: nn.Module, _args: tuple, output) -> None:
            if sum(map(len, collected)) < len(mask):  # the trainer may run the model once more, for its outputs
                collected.append(output.exact_kl)

        with swapped(self, _call=call), self._watching(model, call, collect):
            yield collected

    @torch.no_grad()
    def of_hidden_states(self, hidden: Tensor, ref_hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, C) exact KL of hidden states (B, C, H) of policy and reference that `hidden_states` kept; a constant."""
        return self._from_hidden(hidden, ref_hidden, mask.bool())

    @contextmanager
    def _watching(self, model: nn.Module, call: _Call, hook: Callable[..., None]) -> Iterator[None]:
        # Only while scoring: generation runs the backbone too, and a copy of the model must not carry our hooks.
        models = {id(model): model for model in (self._policy, self._reference)}.values()
        handles = [model.get_output_embeddings().register_forward_pre_hook(call.keep_input) for model in models]
        if FUSED_LM_HEAD:  # which reads the head's weights and does not call it
            handles += [model.base_model.register_forward_hook(call.keep_output) for model in models]
        handles.append(model.register_forward_hook(hook))
        try:
            # A compiled model (torch_compile) keeps graphs that know nothing of hooks which came later.
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _exact_kl(self, call: _KLCall, output: Any) -> Tensor:
        hidden = call.completion(call.length)
        ref_hidden, mask = call.take(hidden.size(0))
        if not self._checked:
            self._check_projection(hidden, output)
        logits = self._logits_of(output)
        with torch.set_grad_enabled(torch.is_grad_enabled() and call.with_grad):
            if logits is None:
                return self._from_hidden(hidden, ref_hidden, mask)
            return self._from_logits(logits, ref_hidden, mask)

    def _logits_of(self, output: Any) -> Tensor | None:
        return getattr(output, "logits", None)  # TRL >= 1.16's fused head returns none

    @property
    def _options(self) -> dict[str, Any]:
        """How both heads' outputs become logits, and which way the KL goes."""
        scale, softcap, temperature = self._transform
        return {"temperature": temperature, "logit_scale": scale, "softcap": softcap, "direction": self._direction}

    def _from_hidden(self, hidden: Tensor, ref_hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, C) from the hidden states of both, (B, C, H)."""
        head = self._policy.get_output_embeddings()
        ref_hidden, mask = ref_hidden.to(hidden.device), mask.to(hidden.device)

        def kl(hidden_NH: Tensor, ref_weight: Tensor, ref_bias: Tensor | None) -> Tensor:
            return chunked_exact_kl(
                hidden_NH,
                head.weight,
                ref_hidden[mask].to(hidden_NH.device),
                ref_weight,
                bias=head.bias,
                ref_bias=ref_bias,
                **self._options,
            )

        return _scattered(self._with_ref_head(kl, hidden[mask], in_policy_head=True), mask)

    def _from_logits(self, logits: Tensor, ref_hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, C) from the policy's logits, (B, at least C + 1, V): only the reference is projected.

        Takes them whole, the last one included, because a slice or a selection would copy them, forward and backward.
        """
        length = mask.size(1)
        ref_hidden, mask = ref_hidden.to(logits.device), mask.to(logits.device)
        rows = mask.new_zeros(logits.shape[:-1])
        rows[:, logits.size(1) - length - 1 : logits.size(1) - 1] = mask

        def kl(logits: Tensor, ref_weight: Tensor, ref_bias: Tensor | None) -> Tensor:
            return chunked_exact_kl_from_logits(
                logits, ref_hidden[mask], ref_weight, mask=rows, ref_bias=ref_bias, **self._options
            )

        return _scattered(self._with_ref_head(kl, logits, in_policy_head=False), mask)

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
        logits = self._logits_of(output)
        if logits is None or hidden.size(1) == 0:
            return
        self._checked = True
        with torch.no_grad():
            raw = self._policy.get_output_embeddings()(hidden[:1, -1]).float()
            ours = self._transform._replace(temperature=1.0).apply_(raw)
        if not are_close(ours, logits[:1, -2].detach().float()):
            raise unknown_transform(self._policy)


def _scattered(kl_N: Tensor, mask: Tensor) -> Tensor:
    """Per-token values at their places in (B, C), 0 elsewhere."""
    # masked_scatter keeps an all-masked batch connected to the graph, which DDP needs.
    return kl_N.new_zeros(mask.shape).masked_scatter(mask.to(kl_N.device), kl_N)


@functools.cache
def _output_class(base: type) -> Any:
    return dataclasses.make_dataclass(
        f"{base.__name__}WithExactKL", [("exact_kl", Tensor | None, dataclasses.field(default=None))], bases=(base,)
    )


def _with_exact_kl(output, exact_kl: Tensor):
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return _output_class(type(output))(**fields, exact_kl=exact_kl)  # type: ignore[arg-type]
