"""GRPO and PPO on two processes, each with an engine of its own: what each logs, and a sum of its weights."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import vllm_engine

PROMPTS = [first + second for first in "abcd" for second in "abcd"]
BATCH = {"per_device_train_batch_size": 16, "max_steps": 3, "learning_rate": 1e-3}


def found(trainer: Any, policy: Any, answers: list) -> dict[str, Any]:
    total = sum(float(weight.detach().double().sum()) for weight in policy.parameters())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"processes": trainer.accelerator.num_processes, "weights": total, "logs": logs, "answers": answers}


def grpo(model: str, folder: Path) -> dict[str, Any]:
    trainer = vllm_engine.make_trainer(model, folder, PROMPTS, num_generations=4, **BATCH)
    trainer.train()
    answers = trainer._generate_and_score_completions([{"prompt": PROMPTS[0]}] * 16)["completion_ids"]
    return found(trainer, trainer.model, answers.tolist())


def ppo(model: str, folder: Path) -> dict[str, Any]:
    trainer = vllm_engine.make_ppo_trainer(model, folder, PROMPTS * 2, **BATCH)
    trainer.train()
    answers = trainer.sampler.answers([{"prompt": PROMPTS[0]}] * 16).completion_ids
    return found(trainer, trainer.policy, answers)


if __name__ == "__main__":
    out, policy = Path(sys.argv[1]), sys.argv[2]
    vllm_engine.drive_the_cpu_engine()
    runs = {"grpo": grpo(policy, out / "grpo"), "ppo": ppo(policy, out / "ppo")}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(runs))
    dist.barrier()
    os._exit(0)  # vLLM's own end and gloo's disturb each other
