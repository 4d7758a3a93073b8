"""Sampling from the policy's own distribution, whatever its generation config contains, and where an answer ends."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..reference.build import causal_lm
from ..seams import swapped


@contextmanager
def generating_with(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """While active, `config` is the model's own, inside PEFT too.

    `generate` fills what a given config leaves open from the model's (penalties, top_k, suppressed tokens): then it
    would sample from something else than what is scored.
    """
    with swapped(model, generation_config=config), swapped(causal_lm(model), generation_config=config):
        yield


def end_tokens(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's end token and those of the policy's generation config, sorted.

    A chat model has several, of its turns and of its texts (Llama 3: <|eot_id|> and <|end_of_text|>).
    """
    config = causal_lm(policy).generation_config
    own = None if config is None else config.eos_token_id  # an int, a list or None
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def until_stop(completion: list[int], stop_tokens: Collection[int]) -> list[int]:
    """The answer up to and with its first stop token. What a batch pads finished answers with comes after it."""
    for place, token in enumerate(completion):
        if token in stop_tokens:
            return completion[: place + 1]
    return completion
