"""Reward models: sequence classifiers with one output, which read texts with a tokenizer of their own."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import get_config_model_id

from ..checks.vocabulary import has_tokens, vocabulary_size, with_known_padding
from ..errors import RunError

_ONE = "a reward is one number per answer: give a model with one output, or a function that makes one number of them"


def loaded_rewards(rewards: Sequence[Any], init_kwargs: dict[str, Any]) -> list[Any]:
    """Rewards, those among them that are paths loaded and all models checked.

    Raises:
        ValueError: a model is not a reward model, with what it is.
    """
    loaded = [load_reward_model(reward, init_kwargs) if isinstance(reward, str) else reward for reward in rewards]
    for reward in loaded:
        if isinstance(reward, nn.Module):
            check_reward_model(reward)
    return loaded


def load_reward_model(path: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A sequence classifier with one output.

    Raises:
        ValueError: the checkpoint has another number of outputs, or no head, so that its rewards would be random.
    """
    model, missing = load_classifier(path, init_kwargs, f"the reward model {path}", _ONE)
    if missing:
        raise ValueError(
            f"{path} holds no weights for {', '.join(sorted(missing))}: its rewards would be random; give a "
            "reward model, trained with one output."
        )
    return model


def load_classifier(path: str, init_kwargs: dict[str, Any], name: str, remedy: str) -> tuple[PreTrainedModel, set[str]]:
    """A classifier with one output, and the parameters that its checkpoint does not hold.

    In float32 unless asked otherwise, as TRL.

    Raises:
        ValueError: the checkpoint is a classifier with several outputs; `name` and `remedy` are for the sentence.
    """
    known = ("revision", "trust_remote_code")
    config = AutoConfig.from_pretrained(path, **{key: init_kwargs[key] for key in known if key in init_kwargs})
    is_classifier = any("SequenceClassification" in architecture for architecture in config.architectures or [])
    if is_classifier and config.num_labels != 1:  # a language model's config has 2 by default, and no head
        raise ValueError(f"{name} has {config.num_labels} outputs: {remedy}.")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, output_loading_info=True, **{"dtype": "float32", **init_kwargs}
    )
    return model, set(info["missing_keys"])


def check_reward_model(model: nn.Module) -> None:
    """Refuse a model of transformers' that is not a sequence classifier with one output.

    What others have written is looked at when it scores.

    Raises:
        ValueError: with what it is.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not type(inner).__module__.startswith("transformers."):
        return
    name = type(inner).__name__
    if "SequenceClassification" not in name:
        raise ValueError(f"the reward model is a {name}, which gives no number per answer: {_ONE}.")
    if inner.config.num_labels != 1:
        raise ValueError(f"the reward model {name} has {inner.config.num_labels} outputs: {_ONE}.")


def with_padding_of_its_own(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token that the model knows; by it the model finds an answer's last token.

    Raises:
        ValueError: the model came without a tokenizer.
    """
    if not has_tokens(tokenizer):
        raise ValueError(
            f"the reward model {get_config_model_id(model.config)} comes without a tokenizer, so that it cannot "
            f"read any "
            "answer: save its tokenizer beside it, or give the model among reward_funcs and the tokenizer among "
            "reward_processing_classes."
        )
    tokenizer = with_known_padding(tokenizer, vocabulary_size(model), "the reward model")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


@torch.no_grad()
def model_rewards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    completions: list,
    chat_template_kwargs: dict[str, Any],
    device: Any,
) -> Tensor:
    """(B,) rewards of a reward model.

    Messages become text by the tokenizer's chat template, which writes special tokens itself. Plain text gets those
    that the tokenizer begins and ends a text with ([CLS], a BOS token), unless it begins with them already.

    Raises:
        RunError: the model gives several numbers per answer.
    """
    if is_conversational({"prompt": prompts[0]}):
        special = False
        texts = [
            apply_chat_template({"messages": p + c}, tokenizer, **chat_template_kwargs)["text"]
            for p, c in zip(prompts, completions, strict=True)
        ]
    else:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        firsts = tuple(token for token in (tokenizer.bos_token, tokenizer.cls_token) if token)
        special = not (firsts and texts[0].startswith(firsts))
    # Padded on the right: classifiers look for the last token that is not padding.
    batch = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=special)
    logits = model(**batch.to(device)).logits
    if logits.shape != (len(texts), 1):
        raise RunError(f"the reward model {type(model).__name__} gives outputs {tuple(logits.shape[1:])}: {_ONE}.")
    return logits[:, 0].float()


def loading_of(args: Any) -> dict[str, Any]:
    """Keyword arguments to load a reward model with: the policy's, without what is the policy's own."""
    loading = {"trust_remote_code": args.trust_remote_code, "dtype": "auto", **(args.model_init_kwargs or {})}
    loading.pop("revision", None)
    loading.pop("quantization_config", None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        loading["device_map"] = None
    return loading
