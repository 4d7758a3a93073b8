"""A real vLLM engine on CPU for the tests: a model that it takes, and what TRL needs to keep its weights up to date."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
with socket.socket() as free:  # accelerate's default on CPU is 29500 for every run
    free.bind(("", 0))
    os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))

import torch
import trl.generation.vllm_generation as generation
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from vllm.model_executor.layers import utils as layers

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig, KLXPPOTrainer

# Without an engine, which sets variables of distributed runs, and binds its process to some of the cores.
BEFORE = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
CORES = os.sched_getaffinity(0)
ENGINE = {"dtype": "bfloat16"}  # of the next trainer's
TOKENS = ("<pad>", "<eos>", "<unk>", "a", "b", "c", "d")


def drive_the_cpu_engine() -> Callable[[], None]:
    """Let TRL's colocated engines run on CPU, one for each `DTYPE` that is asked for; returns what undoes it.

    TRL passes no dtype, and vLLM turns a float32 checkpoint into bfloat16 by itself. TRL loads new weights into the
    live model; vLLM's CPU kernels keep packed copies of theirs and leave nothing to load into: torch's own product
    does. A trainer sends its weights before its first rollout, so that one engine serves one after the other.
    """
    stock_llm, stock_choice = generation.LLM, layers.dispatch_cpu_unquantized_gemm
    made: dict[tuple, Any] = {}

    def undo() -> None:
        for engine in made.values():  # with that of a recipe's run their process group has ended, too
            engine.llm_engine.engine_core._finalizer.detach()
        generation.LLM, layers.dispatch_cpu_unquantized_gemm = stock_llm, stock_choice

    def llm(**arguments: object) -> object:
        key = arguments["model"], ENGINE["dtype"]
        if key not in made or not made[key].llm_engine.engine_core._finalizer.alive:  # a recipe's run has ended it
            made[key] = stock_llm(**{**arguments, "dtype": ENGINE["dtype"], "enforce_eager": True})
        return made[key]

    generation.LLM, layers.dispatch_cpu_unquantized_gemm = llm, plain_products
    return undo


def plain_products(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def seven_tokens() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def save_model(folder: Path) -> str:
    """Heads of 32: the least that vLLM's attention on CPU takes (tests/tiny.py has 8)."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    seven_tokens().save_pretrained(folder)
    return str(folder)


# A float32 trainer with a colocated engine.
SETTINGS = {
    "kl_estimator": "exact",
    "kl_placement": "loss",
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def letters(completions: list[str], **_: Any) -> list[float]:
    """Answers are paid for their letters `a`."""
    return [text.count("a") / 3 for text in completions]


def make_trainer(model: str, folder: Path, prompts: list[str], **settings: object) -> KLXGRPOTrainer:
    own = {"max_completion_length": 3, "loss_type": "dr_grpo", "beta": 1.0}
    config = KLXGRPOConfig(str(folder), **(SETTINGS | own | settings))
    data = Dataset.from_dict({"prompt": prompts})
    return KLXGRPOTrainer(model, letters, config, train_dataset=data, processing_class=seven_tokens())


def make_ppo_trainer(
    model: str, folder: Path, prompts: list[str], *, peft_config: Any = None, **settings: object
) -> KLXPPOTrainer:
    config = KLXPPOConfig(str(folder), **(SETTINGS | {"response_length": 3, "temperature": 1.0} | settings))
    data = Dataset.from_dict({"prompt": prompts})
    models = {"model": model, "peft_config": peft_config, "processing_class": seven_tokens()}
    return KLXPPOTrainer(config, **models, reward_funcs=letters, train_dataset=data)


@torch.no_grad()
def move(model: torch.nn.Module, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(size * weight.std().clamp(min=1e-3) * torch.randn(weight.shape, generator=generator))
