"""PPO trainers on the tiny model, with answers that are given instead of sampled."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForSequenceClassification

from support.device import DEVICE, PLAIN
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer
from trl_klx.trainers.ppo.config import KLXPPOConfig
from trl_klx.trainers.ppo.trainer import KLXPPOTrainer

ANSWERS = [[7, 8, 9, 1], [5, 6, 1], [9, 9, 12, 4, 1], [1], [7, 3, 1], [4, 4, 4, 4, 4, 4], [8, 1], [10, 11, 12, 13, 1]]


def settings(output: Path | str, **changes: Any) -> KLXPPOConfig:
    """One rollout of eight answers, one optimizer step, plain SGD-like numbers: change what a test is about."""
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "temperature": 1.0,
        "train_sampling_strategy": "sequential",  # a rollout made by hand sees the prompts of the first step
        **PLAIN,
    }
    return KLXPPOConfig(str(output), **{**fields, **changes})


def given_answers(prompts: list, trainer: Any) -> dict[str, list]:
    """Rollout function: the same answers whatever the policy, of uneven lengths; the one of full length has no end."""
    ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": [ANSWERS[row % len(ANSWERS)] for row in range(len(prompts))]}


def trainer(output: Path | str, *, model: Any = None, given: bool = True, **changes: Any) -> KLXPPOTrainer:
    """A trainer; fields of the config and arguments of the trainer may both be changed."""
    names = (
        "reward_funcs",
        "reward_model",
        "ref_model",
        "value_model",
        "train_dataset",
        "eval_dataset",
        "rollout_func",
    )
    names += ("peft_config", "reward_processing_classes", "processing_class", "callbacks")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    if "reward_model" not in arguments:
        arguments.setdefault("reward_funcs", digit_reward)
    arguments.setdefault("train_dataset", tiny_dataset(16))
    arguments.setdefault("processing_class", tiny_tokenizer())
    if given:
        arguments.setdefault("rollout_func", given_answers)
    policy = tiny_model() if model is None else model
    return KLXPPOTrainer(settings(output, **changes), model=policy, **arguments)


def classifier(seed: int = 0, labels: int = 1) -> PreTrainedModel:
    """A tiny model with a `score` head, as value or reward model."""
    torch.manual_seed(seed)
    config = Qwen3Config(**{**tiny_model().config.to_dict(), "pad_token_id": 0})
    config.num_labels = labels
    return Qwen3ForSequenceClassification(config).to(DEVICE)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - before[name] for name in before}


def first_rollout(made: KLXPPOTrainer) -> Any:
    """The rollout that the first step would make; its metrics are in `made.metrics`."""
    rollout = made._make_rollout(next(iter(made.get_train_dataloader())))
    made.metrics.settle(made.mode)
    return rollout


def messages(rows: int = 16) -> Dataset:
    prompts = [[{"role": "user", "content": f"{i}+{i}="}] for i in range(rows)]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(i) for i in range(rows)]})
