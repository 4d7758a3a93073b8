"""Policy and value model as one module, so that one `prepare`, one optimizer and one checkpoint hold both."""

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from trl.trainer.utils import create_model_from_path

from ..checks.vocabulary import check_value_vocabulary
from ..reference.adapters import active_adapter, check_fresh_adapter, keep_reference
from ..reference.build import causal_lm
from ..rewarding.models import load_classifier

VALUE_FOLDER = "value_model"  # inside a checkpoint; the policy is the checkpoint itself


@dataclass
class PolicyAndValueOutput(ModelOutput):
    """What the last C + 1 positions say about the last C tokens: logits (B, C, V), values and exact KL (B, C).

    (A field named `values` would hide the dict's method, which DeepSpeed calls.)
    """

    logits: Tensor | None = None
    state_values: Tensor | None = None
    exact_kl: Tensor | None = None


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
        self, input_ids: Tensor, attention_mask: Tensor, completion_length: int, with_values: bool = True
    ) -> PolicyAndValueOutput:
        """Score the last `completion_length` tokens of (B, L) `input_ids`; prompts may be padded on the left."""
        output = self.run(self.policy, input_ids, attention_mask, completion_length)
        values = None
        if with_values:
            hidden = self.value_model.base_model(
                **_inputs(input_ids, attention_mask), use_cache=False
            ).last_hidden_state
            values = self.value_model.score(hidden[:, -completion_length - 1 : -1]).squeeze(-1)  # type: ignore[operator]
        return PolicyAndValueOutput(output.logits, values, output.get("exact_kl"))

    def run(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Any:
        """Run the policy, or a reference of its architecture; `logits` are (B, C, V), those that predict the answer."""
        keep = {"logits_to_keep": completion_length + 1} if self._can_keep_logits else {}
        output = model(**_inputs(input_ids, attention_mask), **keep, use_cache=False)
        output["logits"] = output.logits[:, -completion_length - 1 : -1]
        return output

    def generate(self, **kwargs: Any) -> Tensor:
        """The policy's `generate`. Called here and not on the policy, so that FSDP gathers what it has sharded."""
        return self.policy.generate(**kwargs)  # type: ignore[operator]

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

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: object
    ) -> None:
        for model in (self.policy, self.value_model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: object
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
        parts = {"policy": folder} | ({"value_model": folder / VALUE_FOLDER} if with_value_model else {})
        for name, target in parts.items():
            own = None if state_dict is None else _without_prefix(state_dict, f"{name}.")
            self.get_submodule(name).save_pretrained(target, state_dict=own)  # type: ignore[operator]


def _inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    # Absolute position embeddings must not count the padding.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def _without_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


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
        raise ValueError("the policy is quantised, and no value model can be copied from it: pass value_model.")
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
    return check_value_model(start_at_zero(model))


def _merged(policy: PeftModel) -> PreTrainedModel:
    """The policy as it is, adapter included; virtual tokens are no weights of a model and stay out."""
    if policy.active_peft_config.is_prompt_learning:
        return causal_lm(policy)
    try:
        return copy.deepcopy(policy).merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the policy's adapter cannot be merged for a value model to start from ({error}): pass value_model."
        ) from error


def start_at_zero(model: PreTrainedModel) -> PreTrainedModel:
    """Make a fresh head predict 0 everywhere, so that the first advantages are the rewards themselves."""
    weight = check_value_model(model).score.weight  # type: ignore[union-attr]
    with torch.no_grad(), _writable(weight):  # type: ignore[arg-type]
        weight.zero_()  # type: ignore[operator]
    return model


def _writable(parameter: nn.Parameter) -> Any:
    """Gather a parameter that ZeRO-3 has sharded, and share out again what is written into it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def check_value_model(model: PreTrainedModel) -> PreTrainedModel:
    """Refuse a model that is no classifier with one output named `score`, as TRL's PPO needs it too."""
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"the value model is a {type(model).__name__}, which has no head 'score' with one output: pass a model "
            "loaded with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )
    return model


def load_policy(model: str | PreTrainedModel, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The policy by its path, or as it was given."""
    return create_model_from_path(model, **init_kwargs) if isinstance(model, str) else model


def load_value_model(path: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A sequence classifier with one output; a head that the checkpoint does not have starts at zero."""
    remedy = "a value is one number: give a model with one output, or a language model to start from"
    model, missing = load_classifier(path, init_kwargs, f"the value model {path}", remedy)
    return start_at_zero(model) if missing else model


def value_model_of(
    policy: PreTrainedModel,
    given: PreTrainedModel | str | None,
    path: str | None,
    init_kwargs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The value model that was given, by itself or by its path, or one made from the policy.

    Args:
        policy: with its adapter, if it came with one.
        given: None: one like the policy.
        path: of the policy, from which ZeRO-3 loads one like it; None where it was given in memory.
        init_kwargs: for loading.
        tokenizer: the policy's.

    Raises:
        ValueError: there is none, it has another head than PPO needs, or another vocabulary than the policy.
    """
    given = path if given is None and is_deepspeed_zero3_enabled() else given
    if given is None:
        return value_model_like(policy)
    model = check_value_model(load_value_model(given, init_kwargs) if isinstance(given, str) else given)
    check_value_vocabulary(policy, model, tokenizer)
    return model


def with_adapter(
    policy: PreTrainedModel, peft_config: PeftConfig | None, trained: str | None, reference: str | None, *, copied: bool
) -> PreTrainedModel:
    """Put a fresh adapter on the policy, or prepare those that it came with.

    Args:
        policy: with or without adapters.
        peft_config: of the fresh adapter.
        trained: name of the adapter to train (`model_adapter_name`); None: the active one.
        reference: name of the adapter that is the reference (`ref_adapter_name`); None: a copy of the trained one, made
            here under the name "ref".
        copied: False where no reference is needed, or another model is.
    """
    if peft_config is not None:
        if isinstance(policy, PeftModel):
            raise ValueError(
                "the policy is a PeftModel already and peft_config was given too: merge its adapter first, or leave "
                "peft_config out to train the adapter it has."
            )
        if copied:
            check_fresh_adapter(peft_config)
        return get_peft_model(policy, peft_config)  # type: ignore[return-value]
    if not isinstance(policy, PeftModel):
        return policy
    for option, name in (("model_adapter_name", trained), ("ref_adapter_name", reference)):
        if name is not None and name not in policy.peft_config:
            raise ValueError(f"{option}={name!r} is none of the policy's adapters, {', '.join(policy.peft_config)}.")
    if trained is not None:
        policy.set_adapter(trained)
    if reference == active_adapter(policy):
        raise ValueError(
            f"ref_adapter_name={reference!r} is the adapter that is trained: load it once more by another name."
        )
    if reference is None and copied:
        keep_reference(policy)
    return policy


def reference_of(policy: PreTrainedModel, path: str | None, init_kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """A frozen copy of the policy as it is now; None where the policy without its adapter serves.

    ZeRO-3 shards the policy, so that it cannot be copied: there it is loaded a second time from its `path`.

    Raises:
        ValueError: under ZeRO-3, where the policy was given in memory.
    """
    if isinstance(policy, PeftModel):
        return None
    if is_deepspeed_zero3_enabled():
        if path is None:
            raise ValueError("ZeRO-3 shards a policy in memory, so it cannot be copied: pass ref_model, or a path.")
        return load_policy(path, init_kwargs).requires_grad_(False).eval()
    return copy.deepcopy(policy).requires_grad_(False).eval()
