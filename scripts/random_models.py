"""Models of published shapes with random weights, their tokenizer, and made-up data: what needs no network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_QWEN2 = {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768}
# By what decides the number of parameters, from the models' config.json on the Hub; "tiny" for a try on a CPU.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5-0.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        **_QWEN2,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        **_QWEN2,
    ),
    "qwen3-0.6b-reward": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, num_labels=1,
    ),
    "tiny": lambda: Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **_QWEN2
    ),
    "tiny-reward": lambda: Qwen3Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, num_labels=1,
    ),
}  # fmt: skip
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token per byte, and further ones up to `size`, so that every token that a random model samples has a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIAL, *letters]
    tokens += [f"t{number}" for number in range(len(tokens), size)]
    inner = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    made.chat_template = _TEMPLATE
    return made


def random_model(shape: str, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights whenever it is called; a classifier where the shape is one."""
    config = SHAPES[shape]()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, None
    auto: Any = AutoModelForSequenceClassification if shape.endswith("reward") else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


def save(shape: str, folder: Path, *, device: str) -> str:
    """A folder that `from_pretrained` reads, in bfloat16 as such models are published."""
    model = random_model(shape, device=device, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer(model.config.vocab_size).save_pretrained(folder)
    return str(folder)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _text(number: int, length: int) -> str:
    """So many bytes, and thus tokens."""
    return (f"{number} " * length)[:length]


def rows(name: str, prompt: int, answer: int) -> Iterator[dict[str, Any]]:
    """64 rows with the columns of a dataset on the Hub; texts of so many tokens, without a chat template's few."""
    for number in range(64):
        question = _text(number, prompt)
        if name == "openai/gsm8k":
            yield {"question": question, "answer": f"#### {number}"}
        elif name == "trl-lib/ultrafeedback-prompt":
            yield {"prompt": [_user(question)]}
        else:
            chosen, rejected = _text(number, answer), _text(number + 1, answer)
            scores = {"score_chosen": 8.0, "score_rejected": 3.0 + number % 2}
            pair = {
                "chosen": [_user(question), _assistant(chosen)],
                "rejected": [_user(question), _assistant(rejected)],
            }
            yield {**pair, **scores}


def save_rows(name: str, folder: Path, *, prompt: int, answer: int) -> str:
    """Train and test splits as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row) for row in rows(name, prompt, answer)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)
