"""GRPO and DPO with tokenizers that have more tokens than the model, and with models that are no reward models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.device import PLAIN
from support.tiny import digit_reward, save_tiny, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import PROBE, make_trainer, preferences
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.trainers.errors import RunError

pytestmark = pytest.mark.trl

SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 0.1,
    "optim": "sgd",
    **PLAIN,
}


def grpo(folder: Path, *, model: Any = None, tokenizer: Any = None, reward: Any = digit_reward, **changes: Any) -> Any:
    named = ("train_dataset", "reward_processing_classes")
    arguments = {"train_dataset": tiny_dataset(), **{name: changes.pop(name) for name in named if name in changes}}
    config = KLXGRPOConfig(str(folder), **{**SETTINGS, **changes})
    model = tiny_model() if model is None else model
    tokenizer = tiny_tokenizer() if tokenizer is None and not isinstance(model, str) else tokenizer
    return KLXGRPOTrainer(model, reward, config, processing_class=tokenizer, **arguments)


def with_added_padding() -> PreTrainedTokenizerFast:
    """As TRL's PPO examples make it: a padding token, 23, that the model of 23 tokens has no entry for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def weights(trained: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trained.train()
    return {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}


def saved(folder: Path) -> str:
    """A model in a folder with a tokenizer that has one token more."""
    path = save_tiny(folder)
    with_added_padding().save_pretrained(path)
    return path


@pytest.mark.situation("GRPO: [PAD] added to the tokenizer, the model not resized", "right")
@pytest.mark.parametrize("way", ["memory", "path"])
def test_grpo_with_a_padding_token_without_an_embedding(tmp_path: Path, way: str) -> None:
    changes = {"kl_estimator": "exact", "kl_placement": "both", "beta": 0.2}
    if way == "memory":
        added = grpo(tmp_path, tokenizer=with_added_padding(), **changes)
    else:
        added = grpo(tmp_path, model=saved(tmp_path / "model"), **changes)
    expected = weights(grpo(tmp_path, **changes))
    for name, value in weights(added).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    added.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.pad_token_id < 23


@pytest.mark.situation("DPO: [PAD] added to the tokenizer, the model not resized", "right")
@pytest.mark.parametrize("changes", [PROBE, {"precompute_ref_log_probs": True}], ids=["probe", "precomputed"])
@pytest.mark.parametrize("way", ["memory", "path"])
def test_dpo_with_a_padding_token_without_an_embedding(tmp_path: Path, way: str, changes: dict) -> None:
    changes = {**changes, "max_steps": 1}
    if way == "memory":
        added = make_trainer(tiny_model(), tmp_path, processing_class=with_added_padding(), **changes)
    else:
        added = make_trainer(saved(tmp_path / "model"), tmp_path, processing_class=None, **changes)
    plain = make_trainer(tiny_model(), tmp_path, **changes)
    expected = weights(plain)
    for name, value in weights(added).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    name = "kl/sequence" if "kl_probe_steps" in changes else "rewards/margins"
    assert added.state.log_history[0][name] == pytest.approx(plain.state.log_history[0][name], abs=1e-6)
    added.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.pad_token_id < 23


def with_more_tokens() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyz"])
    return tokenizer


@pytest.mark.situation("GRPO: tokens added to the tokenizer, the model not resized, and prompts hold them", "refused")
def test_grpo_prompts_with_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["1xyz2="] * 8})
    with pytest.raises(RunError, match="a prompt holds the token 23 and the model's vocabulary has 23 entries"):
        grpo(tmp_path, tokenizer=with_more_tokens(), train_dataset=data).train()
    assert weights(grpo(tmp_path, tokenizer=with_more_tokens()))  # and where no prompt holds them, it trains


@pytest.mark.situation("DPO: tokens added to the tokenizer, the model not resized, and pairs hold them", "refused")
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_dpo_pairs_with_tokens_that_the_model_does_not_know(tmp_path: Path, column: str, streamed: bool) -> None:
    rows = preferences(8).to_list()
    rows[5][column] += "xyz"
    data: Any = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streamed else data
    with pytest.raises(ValueError, match=f"{column} of a pair holds the token 23"):
        make_trainer(tiny_model(), tmp_path, processing_class=with_more_tokens(), train_dataset=data).train()


@pytest.mark.situation("DPO: pad_token names a token that the model does not know", "refused")
def test_dpo_with_a_named_padding_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pad_token='\[PAD\]' holds the token 23"):
        make_trainer(tiny_model(), tmp_path, processing_class=with_added_padding(), pad_token="[PAD]")


@pytest.mark.situation("DPO: the reference has a smaller vocabulary", "refused")
def test_dpo_with_a_reference_of_a_smaller_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reference has a vocabulary of 15 entries and the policy one of 23"):
        make_trainer(tiny_model(), tmp_path, ref_model=tiny_model(vocab=15))


# Reward models in GRPO


def classifier(seed: int = 0, labels: int = 1) -> Qwen3ForSequenceClassification:
    torch.manual_seed(seed)
    config = Qwen3Config(**{**tiny_model().config.to_dict(), "pad_token_id": 0})
    config.num_labels = labels
    return Qwen3ForSequenceClassification(config)


@pytest.mark.situation("GRPO: a reward model with several labels", "refused")
@pytest.mark.parametrize("way", ["memory", "path", "list"])
def test_grpo_with_a_reward_model_of_several_labels(tmp_path: Path, way: str) -> None:
    model: Any = classifier(labels=3)
    if way == "path":
        model.save_pretrained(tmp_path / "reward")
        tiny_tokenizer().save_pretrained(tmp_path / "reward")
        model = str(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"the reward model .* has 3 outputs: a reward is one number per answer"):
        grpo(tmp_path, reward=[digit_reward, model] if way == "list" else model)


@pytest.mark.situation("GRPO: a language model given as reward model", "refused")
@pytest.mark.parametrize("way", ["memory", "path"])
def test_grpo_with_a_language_model_as_reward(tmp_path: Path, way: str) -> None:
    model: Any = tiny_model() if way == "memory" else save_tiny(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM|its rewards would be random"):
        grpo(tmp_path, reward=model)


def first_rewards(made: Any, prompts: list, completions: list) -> torch.Tensor:
    return made._calculate_rewards([{} for _ in prompts], prompts, completions, [[1]] * len(prompts))


def bert() -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A classifier that reads the first token, [CLS], and a tokenizer that puts it there."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=25,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 23), ("[SEP]", 24)]
    )
    return BertForSequenceClassification(config).eval(), tokenizer


@pytest.mark.situation("GRPO: a reward model whose tokenizer begins a text with [CLS]", "right")
def test_grpo_with_a_reward_model_that_needs_cls(tmp_path: Path) -> None:
    model, tokenizer = bert()
    made = grpo(tmp_path, reward=[model], reward_processing_classes=[tokenizer])
    rewards = first_rewards(made, ["1+1=", "2="], ["2", "2a"])
    for text, reward in zip(["1+1=2", "2=2a"], rewards[:, 0], strict=True):
        ids = tokenizer(text=text, return_tensors="pt")
        assert ids["input_ids"][0, 0] == 23
        assert float(reward) == pytest.approx(float(model(**ids).logits), abs=1e-5)


@pytest.mark.situation("GRPO: a reward model's tokenizer has a [PAD] that the model does not know", "right")
def test_grpo_with_a_reward_model_whose_padding_has_no_embedding(tmp_path: Path) -> None:
    prompts, completions = ["1+1=", "2="], ["2", "2a"]
    added, known = (
        first_rewards(
            grpo(tmp_path, reward=[classifier(7)], reward_processing_classes=[tokenizer]), prompts, completions
        )
        for tokenizer in (with_added_padding(), tiny_tokenizer())
    )
    torch.testing.assert_close(added, known)


@pytest.mark.situation("GRPO: a reward model's folder without a tokenizer", "refused")
def test_grpo_with_a_reward_model_without_a_tokenizer(tmp_path: Path) -> None:
    classifier(7).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"the reward model .*reward comes without a tokenizer"):
        grpo(tmp_path, reward=str(tmp_path / "reward"))
