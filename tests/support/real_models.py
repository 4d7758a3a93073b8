"""The models and datasets that the real recipes name: published shapes, and tiny stand-ins of the same classes."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_QWEN2 = {"max_position_embeddings": 32768, "rope_theta": 1e6}
_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "head_dim": 128, "num_key_value_heads": 8}
# From the models' config.json on the Hub: what decides the number of parameters.
SHAPES: dict[str, PreTrainedConfig] = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, **_QWEN2,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, **_QWEN2,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, **_QWEN2,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        tie_word_embeddings=True, **{**_LLAMA, "head_dim": 64},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False, **_LLAMA,
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        tie_word_embeddings=True, **{**_LLAMA, "head_dim": 64},
    ),
}  # fmt: skip
# As the model cards print them.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def is_classifier(name: str) -> bool:
    return "Reward" in name


def save_shape(name: str, folder: Path) -> str:
    """A folder with the model's config only: all that counting parameters reads."""
    config = SHAPES[name]
    kind = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{kind}For{'SequenceClassification' if is_classifier(name) else 'CausalLM'}"]
    config.save_pretrained(folder)
    return str(folder)


def tiny_chat_tokenizer(*, with_pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: what transformers reads alike as Qwen's tokenizer and as any other."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*_SPECIAL, *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    pad = {"pad_token": "<|endoftext|>"} if with_pad else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", padding_side="left", **pad)
    fast.chat_template = _TEMPLATE
    return fast


def save_tiny(name: str, folder: Path) -> str:
    """A random model of the same class, two layers of width 16, with a tokenizer; Llama's has no padding token."""
    torch.manual_seed(0)
    tokenizer = tiny_chat_tokenizer(with_pad="lama" not in name)
    real = SHAPES[name]
    config = type(real)(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=real.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    if is_classifier(name):
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# The columns of the real datasets, with content of our own.
_ROWS = {
    "openai/gsm8k": lambda i: {"question": f"{i}+{i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}"},
    "trl-lib/ultrafeedback-prompt": lambda i: {"prompt": [_user(f"Say {i}.")]},
    "trl-lib/ultrafeedback_binarized": lambda i: {
        "chosen": [_user(f"Say {i}."), _assistant(f"{i}.")],
        "rejected": [_user(f"Say {i}."), _assistant("No, I will not.")],
        "score_chosen": 8.0,
        "score_rejected": 3.0 + i % 2,
    },
}


def save_dataset(name: str, folder: Path, rows: int = 32) -> str:
    """Train and test splits with the columns of a dataset on the Hub, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(_ROWS[name](number)) for number in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)
