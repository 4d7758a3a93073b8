"""A tiny language model, tokenizer and dataset: small enough to train in milliseconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.device import DEVICE
from trl_klx.config import KLArguments
from trl_klx.config.check import check
from trl_klx.config.rules import kl_rules

CHARACTERS = "0123456789=+abcdefgh"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{char: i + 3 for i, char in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_model(seed: int = 0, *, tied: bool = False, vocab: int = 23) -> Qwen3ForCausalLM:
    """About 6000 parameters, float32, weights large enough that distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).to(DEVICE)


def tiny_family(name: str) -> PreTrainedModel:
    """A tiny model of an architecture that transforms its logits: gemma2 (softcap) or cohere (scale)."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": 0.5,
    }
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0)).to(DEVICE)
    return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25)).to(DEVICE)


def save_tiny(folder: Path, seed: int = 0, **settings) -> str:
    tiny_model(seed, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def drift(model: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Move what is trained away from its reference, by the same numbers on any device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.device))


def tiny_dataset(rows: int = 16) -> Dataset:
    prompts = [f"{i % 10}+{(3 * i) % 10}=" if i % 3 else f"{i % 7}=" for i in range(rows)]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(i % 5) for i in range(rows)]})


def digit_reward(completions: list[str], **kwargs) -> list[float]:
    """Share of digits in the completion: varies within a group, needs no knowledge of the answer."""
    return [sum(char.isdigit() for char in text) / max(len(text), 1) for text in completions]


def message_reward(completions: list[list[dict]], **kwargs) -> list[float]:
    """The same of answers that are messages."""
    return digit_reward([messages[-1]["content"] for messages in completions])


@dataclass
class Arguments(KLArguments):
    """The KL arguments alone, without a trainer's config around them."""

    beta: float = 0.1

    @property
    def kl_coef_start(self) -> float:
        return self.beta

    @property
    def kl_coef_name(self) -> str:
        return "beta"

    def __post_init__(self) -> None:
        check(self)

    def rules(self) -> list[Callable[[], None]]:
        return kl_rules(self)
