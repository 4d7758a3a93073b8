"""Tiny runs of all three trainers, and ways in which they die.

`main(algorithm, output, options)` is for processes that `test_faults.py` starts and kills: one, or several with RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Options: `resume`, what `train` is to resume from; `kill`, a moment (see
`Killer`), and `at`, its step; `rank`, the process that dies (default 0); `bad_loss`, a step whose loss the last process
sees as not finite; all others are fields of the config. `unbroken`: a folder for a run before it, to its end, that
nothing kills.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from support.device import PLAIN
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import preferences
from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig, KLXPPOTrainer

ALGORITHMS = ("grpo", "ppo", "dpo")
COMMON = {
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "kl_controller": "pid",
    "kl_target": 0.02,
    **PLAIN,
}
OWN: dict[str, dict[str, Any]] = {
    "grpo": {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "beta": 0.2,
        "kl_estimator": "exact",
        "kl_placement": "both",
    },
    "ppo": {"per_device_train_batch_size": 4, "response_length": 6, "num_ppo_epochs": 2, "kl_coef": 0.2},
    "dpo": {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "kl_coef": 0.2,
        "kl_probe_steps": 1,
        "kl_probe_prompts": 4,
        "kl_probe_max_new_tokens": 6,
    },
}


def make(algorithm: str, folder: Path | str, **changes: Any) -> Any:
    """A trainer; `reward`, the models, `peft_config`, `quantization_config`, `callbacks` and the datasets are its
    arguments, the rest fields of its config."""
    model, ref_model, value_model = (changes.pop(name, None) for name in ("model", "ref_model", "value_model"))
    reward, callbacks = changes.pop("reward", digit_reward), changes.pop("callbacks", None)
    data = (preferences(), preferences(12)) if algorithm == "dpo" else (tiny_dataset(), None)
    shared = {"model": tiny_model() if model is None else model, "callbacks": callbacks}
    shared |= {name: changes.pop(name, None) for name in ("peft_config", "quantization_config")}
    shared["processing_class"] = changes.pop("processing_class", tiny_tokenizer())
    shared |= {
        name: changes.pop(name, rows) for name, rows in zip(("train_dataset", "eval_dataset"), data, strict=True)
    }
    fields = {**COMMON, **OWN[algorithm], **changes}
    if algorithm == "grpo":
        config = KLXGRPOConfig(str(folder), **fields)
        made = KLXGRPOTrainer(args=config, reward_funcs=reward, **shared)
        if ref_model is not None:
            made.ref_model.load_state_dict(ref_model.state_dict())
        return made
    if algorithm == "dpo":
        config = KLXDPOConfig(str(folder), **fields)
        return KLXDPOTrainer(args=config, ref_model=ref_model, **shared)
    config = KLXPPOConfig(str(folder), **fields)
    return KLXPPOTrainer(config, reward_funcs=reward, ref_model=ref_model, value_model=value_model, **shared)


class Killer(TrainerCallback):
    """Kills its process (SIGKILL) at a moment of a step: "step", between backward and optimizer, or "save", between two
    files of a checkpoint."""

    def __init__(self, moment: str, at: int) -> None:
        self.moment, self.at = moment, at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.moment == "step" and state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, trainer: Any) -> None:
        """In the middle of a checkpoint: model and optimizer are written, random state and trainer state are not."""

        def save_scaler(folder: str) -> None:
            if self.moment == "save" and trainer.state.global_step == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_scaler = save_scaler


class BadLoss(TrainerCallback):
    """Lets one process see a loss that is not finite at one step; its gradients are."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.trainer.guard.watch("the loss", float("inf"))


def main(algorithm: str, output: str, options: dict) -> None:
    from trl_klx.monitor.history import HistoryCallback

    torch.set_num_threads(1)
    resume, moment, unbroken = (options.pop(name, None) for name in ("resume", "kill", "unbroken"))
    at, rank = options.pop("at", 0), options.pop("rank", 0)
    if unbroken is not None:
        main(algorithm, unbroken, dict(options))
    bad_loss = options.pop("bad_loss", None)
    options.setdefault("kl_report", False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        options["ddp_backend"] = "gloo"
    trainer = make(algorithm, output, callbacks=[HistoryCallback()], **options)
    if moment is not None and trainer.accelerator.process_index == rank:
        killer = Killer(moment, at)
        trainer.add_callback(killer)
        killer.watch(trainer)
    if bad_loss is not None and trainer.accelerator.is_last_process:
        trainer.add_callback(BadLoss(trainer, bad_loss))
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "skipped": trainer.guard.skipped,
        "coef": trainer.kl.coef,
        "controller": trainer.kl.controller.state_dict(),
        "weights": [parameter.detach().double().flatten().tolist() for parameter in trainer.model.parameters()],
    }
    (Path(output) / f"result{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
