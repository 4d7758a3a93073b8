"""Preference data and a DPO trainer as tiny as the models of `tiny.py`."""

from pathlib import Path

from datasets import Dataset
from torch import Tensor

from support.device import DEVICE, PLAIN
from support.tiny import tiny_tokenizer
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.dpo.trainer import KLXDPOTrainer

SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    **PLAIN,
}
PROBE = {"kl_probe_steps": 2, "kl_probe_prompts": 6, "kl_probe_max_new_tokens": 8}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def preferences(rows: int = 16) -> Dataset:
    """Answers of uneven lengths; prompts repeat after ten rows."""
    numbers = [i % 10 for i in range(rows)]
    prompts = [f"{i}+{3 * i % 10}=" if i % 3 else f"{i}=" for i in numbers]
    chosen = [f"{i % 7}" * (1 + i % 3) for i in range(rows)]
    rejected = ["abcd"[: 1 + i % 4] for i in range(rows)]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def make_trainer(
    model,
    folder: Path,
    *,
    peft_config=None,
    trainer=KLXDPOTrainer,
    config=KLXDPOConfig,
    **settings,
):
    """A trainer of either class, stock TRL's or ours, on the same data."""
    data = {"train_dataset": preferences(), "eval_dataset": preferences(12)}
    data |= {name: settings.pop(name) for name in list(settings) if name in (*data, "ref_model", "processing_class")}
    return trainer(
        model,
        args=config(str(folder), **{**SETTINGS, **settings}),
        peft_config=peft_config,
        **{"processing_class": tiny_tokenizer(), **data},
    )


def batch(trainer, rows: int = 4, dataset: Dataset | None = None) -> dict[str, Tensor]:
    """Rows as TRL's collator gives them: chosen first, padded on the right."""
    dataset = trainer.train_dataset if dataset is None else dataset
    collated = trainer.data_collator([dataset[i] for i in range(rows)])
    # No counts: rows are cut.
    return {name: value.to(DEVICE) for name, value in collated.items() if isinstance(value, Tensor)}


def loss_and_gradients(trainer, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients
