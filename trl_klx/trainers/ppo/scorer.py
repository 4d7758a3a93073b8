"""What policy, value model and reference say about answers. Shape legend: see trainer.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from trl.trainer.utils import selective_log_softmax

from ...kl.masking import fill_masked
from ..exact.forward import ExactKLForward
from .config import KLXPPOConfig
from .rollout import Rewarded, Rollout


@dataclass(frozen=True)
class Scores:
    """Of some answers by policy and value model; (B, T) and 0 on masked positions, but for the logits."""

    logps: Tensor  # of the answer's tokens, at the sampling temperature
    logits: Tensor  # (B, T, V)
    values: Tensor
    exact: Tensor | None  # exact KL to the reference, where its hidden states were given


class Scorer:
    """Scores answers at the sampling temperature.

    Args:
        args: the trainer's config.
        accelerator: the trainer's.
        ref_model: the frozen reference; None: the policy is its own.
        as_reference: while active, the policy is the reference.
        exact: computes the exact KL; None where none is wanted.
    """

    def __init__(
        self,
        args: KLXPPOConfig,
        accelerator: Accelerator,
        ref_model: Any,
        as_reference: Callable[[], AbstractContextManager[None]],
        exact: ExactKLForward | None,
    ) -> None:
        self._args, self._accelerator = args, accelerator
        self._ref_model, self._as_reference, self._exact = ref_model, as_reference, exact
        term = args.kl_term()
        self._exact_is_in_loss = term.estimator == "exact" and term.in_loss and args.kl_is_penalised

    def rollout(self, model: Any, part: Rewarded) -> Rollout:
        """The answers as scored by policy, value model and reference now. Call without gradients."""
        ref_logps, ref_hidden = self._reference(model, part) if self._args.kl_is_measured else (None, None)
        scores = self.policy(model, part, ref_hidden, with_grad=False)
        return Rollout(
            **vars(part),
            sampler_logps=scores.logps,
            values=scores.values,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden if self._exact_is_in_loss else None,  # the largest tensor of all
            exact=scores.exact,
        )

    def policy(self, model: Any, part: Rewarded, ref_hidden: Tensor | None, *, with_grad: bool) -> Scores:
        """By policy and value model, in one forward; and the exact KL, where the reference's `ref_hidden` is given."""
        wanted: Any = nullcontext([])
        if self._exact is not None and ref_hidden is not None:
            wanted = self._exact.exact_kl(model, ref_hidden, part.mask, with_grad=with_grad)
        with wanted as exact:
            output = model(part.input_ids, part.attention_mask, part.length)
        values = fill_masked(output.state_values.float(), part.mask)
        return Scores(self._logps(output.logits, part), output.logits, values, exact[0] if exact else None)

    def _reference(self, model: Any, part: Rewarded) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs and, where the exact KL needs them, (B, T, H) hidden states, in one forward."""
        runner = model if self._ref_model is None else self._ref_model
        capture: Any = nullcontext([]) if self._exact is None else self._exact.hidden_states(runner, part.length)
        with capture as hidden:
            if self._ref_model is None:
                with self._as_reference():
                    output = model(part.input_ids, part.attention_mask, part.length, with_values=False)
            else:
                wrapper = self._accelerator.unwrap_model(model)
                output = wrapper.run(self._ref_model, part.input_ids, part.attention_mask, part.length)
        return self._logps(output.logits, part), hidden[0] if hidden else None

    def _logps(self, logits: Tensor, part: Rewarded) -> Tensor:
        logps = selective_log_softmax(logits.float() / self._args.temperature, part.input_ids[:, -part.length :])
        return fill_masked(logps, part.mask)
