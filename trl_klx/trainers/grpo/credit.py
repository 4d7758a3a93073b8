"""The KL in GRPO's reward: what each token of an answer is charged for. Shapes as in `grpo`.

A rollout keeps the credit in nats, not as an advantage; the loss multiplies it by beta. So a controller's new beta acts
at once, also on answers that several optimizer steps use.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from ...kl import leave_one_out_baseline
from .scoring import VISION_INPUTS, Scoring, loss_mask

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class RewardCredit(_Trainer):
    """Mix in before `GRPOTrainer`. The trainer records scorings (`_recording`) and knows its KL (`kl_term`, `args`)."""

    model: PreTrainedModel
    kl_term: Any
    args: Any
    _exact: Any
    _recording: Any

    @property
    def _group_size(self) -> int:
        """Answers per prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval  # type: ignore[return-value]

    @property
    def _shares_hidden(self) -> bool:
        """Whether the policy's hidden states of TRL's own scoring serve an exact KL in the reward."""
        return self.kl_term.estimator == "exact" and self.kl_term.in_reward and self.args.kl_is_penalised

    @torch.no_grad()
    def _kl_credit(self, output: dict, old: Scoring | None) -> Tensor:
        """(B, C) KL credit of each token less its leave-one-out baseline, in nats; times -beta it is an advantage.

        `old` is TRL's own scoring of the policy as it is now, which it makes where the loss needs it; without it the
        answers are scored here.
        """
        mask = loss_mask(output)
        if old is None:
            old = self._score_policy(output, mask)
        elif self._exact is not None and old.hidden is not None:
            with self.accelerator.autocast():
                old.exact = self._exact.of_hidden_states(old.hidden, output["ref_hidden_states"], mask)
        credit = self.kl_term.credit(old.logps, output["ref_per_token_logps"], mask, exact=old.exact)
        return credit - self._baseline(credit, mask)

    def _score_policy(self, output: dict, mask: Tensor) -> Scoring:
        """Score the sampled answers under the policy as it is now, in TRL's own way."""
        training = self.model.training
        exact = (output["ref_hidden_states"], mask, False) if self.kl_term.estimator == "exact" else None
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            with self._recording(exact=exact) as scorings:
                self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                    torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                    output["completion_ids"].size(1),
                    batch_size=self.args.per_device_train_batch_size
                    if training
                    else self.args.per_device_eval_batch_size,
                    **{name: output[name] for name in VISION_INPUTS if name in output},
                )
        return scorings[0]

    def _baseline(self, credit: Tensor, mask: Tensor) -> Tensor:
        """Leave-one-out baseline; the answers to one prompt may lie on several processes."""
        accelerator = self.accelerator
        all_credit, all_mask = (
            accelerator.gather(accelerator.pad_across_processes(tensor, dim=1)) for tensor in (credit, mask.int())
        )
        baseline = leave_one_out_baseline(all_credit, all_mask, self._group_size)
        rows, length = credit.shape
        start = accelerator.process_index * rows
        return baseline[start : start + rows, :length]
