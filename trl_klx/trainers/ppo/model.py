"""Policy and value model as one module, so that one `prepare`, one optimizer and one checkpoint hold both."""

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from ..checks.quantised import NO_VALUE_MODEL
from ..checks.vocabulary import check_value_vocabulary
from ..exact.scored_head import Asked, HiddenStates, Scored
from ..reference.build import causal_lm
from ..rewarding.models import load_classifier

VALUE_FOLDER = "value_model"  # inside a checkpoint; the policy is the checkpoint itself


@dataclass
class PolicyAndValueOutput(ModelOutput):
    """What was asked of the last T tokens, see `Scored`, and the values before them, all (B, T).

    (A field named `values` would hide the dict's method, which DeepSpeed calls.)
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    exact: Tensor | None = None
    hidden: HiddenStates | None = None
    state_values: Tensor | None = None


class PolicyAndValue(nn.Module):
    """Runs the policy and the value model on the same tokens.

    Args:
        policy: causal language model, PEFT or not.
        value_model: sequence classifier with one output; its score of a prefix is the value of that state.
    """

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = policy.config  # where Trainer, DeepSpeed and the model card look
        self._can_keep_logits = "logits_to_keep" in inspect.signature(causal_lm(policy).forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, asked: Asked, with_values: bool = True
    ) -> PolicyAndValueOutput:
        """Score the last T tokens of (B, L) `input_ids` as `asked`; prompts may be padded on the left."""
        scored = self.run(self.policy, input_ids, attention_mask, asked)
        values = None
        if with_values:
            inputs = _inputs(input_ids, attention_mask)
            hidden = self.value_model.base_model(**inputs, use_cache=False).last_hidden_state
            values = self.value_model.get_submodule("score")(hidden[:, -asked.ids.size(1) - 1 : -1]).squeeze(-1)
        return PolicyAndValueOutput(**vars(scored), state_values=values)

    def run(self, model: Any, input_ids: Tensor, attention_mask: Tensor, asked: Asked) -> Scored:
        """Score the answers by the policy, or by a reference of its architecture."""
        inputs: dict[str, Any] = _inputs(input_ids, attention_mask)
        if self._can_keep_logits:
            inputs["logits_to_keep"] = asked.ids.size(1) + 1
        return asked.scores(lambda: model(**inputs, use_cache=False))

    def generate(self, **kwargs: Any) -> Tensor:
        """The policy's `generate`. Called here and not on the policy, so that FSDP gathers what it has sharded."""
        policy: Any = self.policy
        return policy.generate(**kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.policy.get_input_embeddings()

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards as one piece under FSDP."""
        parts = (causal_lm(self.policy), self.value_model)
        return sorted({name for part in parts for name in part._no_split_modules or []})

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.policy.is_gradient_checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        for model in (self.policy, self.value_model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """The name that transformers' Trainer calls it by since 5.20."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        for model in (self.policy, self.value_model):
            model.gradient_checkpointing_disable()

    def save(self, folder: Path, state_dict: Mapping[str, Tensor] | None, *, with_value_model: bool) -> None:
        """Write the policy where `from_pretrained` finds it, and the value model beside it.

        `state_dict` is that of the whole module, where sharding made gathering it necessary.
        """
        parts = [("policy.", self.policy, folder), ("value_model.", self.value_model, folder / VALUE_FOLDER)]
        for prefix, part, target in parts if with_value_model else parts[:1]:
            own = None
            if state_dict is not None:
                own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
            part.save_pretrained(target, state_dict=own)


def _inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    # Absolute position embeddings must not count the padding.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def value_model_of(
    policy: PreTrainedModel,
    given: PreTrainedModel | str | None,
    path: str | None,
    init_kwargs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The value model that was `given`, by itself or by its path, or one made from the policy.

    `path` is the policy's, from which ZeRO-3 loads one like it; None where the policy was given in memory.

    Raises:
        ValueError: there is none, it has another head than PPO needs, or another vocabulary than the policy.
    """
    given = path if given is None and is_deepspeed_zero3_enabled() else given
    if given is None:
        return value_model_like(policy)
    if isinstance(given, str):
        remedy = "a value is one number: give a model with one output, or a language model to start from"
        given, missing = load_classifier(given, init_kwargs, f"the value model {given}", remedy)
        if missing:
            _start_at_zero(given)
    _head(given)
    check_value_vocabulary(policy, given, tokenizer)
    return given


def value_model_like(policy: PreTrainedModel) -> PreTrainedModel:
    """A value model for a policy that has none: a copy of its backbone under a head of zeros.

    Raises:
        ValueError: the architecture has no sequence classifier, or the policy cannot be copied.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 shards a policy in memory, so no value model can be copied from it: pass value_model, or the "
            "policy by its path."
        )
    if getattr(causal_lm(policy), "is_quantized", False):  # set on quantised models only
        raise ValueError(NO_VALUE_MODEL.format("value_model"))
    if isinstance(policy, PeftModel):
        policy = _merged(policy)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ValueError(
            f"{type(policy).__name__} has no sequence classifier to start a value model from: pass value_model."
        ) from error
    model.base_model.load_state_dict(policy.base_model.state_dict())
    _start_at_zero(model)
    return model


def _merged(policy: PeftModel) -> PreTrainedModel:
    """The policy as it is, adapter included; virtual tokens are left out, for they are not weights of the model."""
    if policy.active_peft_config.is_prompt_learning:
        return causal_lm(policy)
    try:
        return copy.deepcopy(policy).merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the policy's adapter cannot be merged for a value model to start from ({error}): pass value_model."
        ) from error


def _start_at_zero(value_model: PreTrainedModel) -> None:
    """Make a fresh head predict 0 everywhere, so that the first advantages are the rewards themselves."""
    weight, whole = _head(value_model).weight, nullcontext()
    if is_deepspeed_zero3_enabled():  # gather what is sharded, and share out again what is written into it
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    with torch.no_grad(), whole:
        weight.zero_()


def _head(value_model: PreTrainedModel) -> nn.Linear:
    """The value model's head; refuses a model without a linear one named `score`, with one output, as TRL's PPO."""
    head = dict(value_model.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"the value model is a {type(value_model).__name__}, which has no head 'score' with one output: pass a "
            "model loaded with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )
    return head
