"""A training run whose completions do not depend on how many processes share it; launched by test_distributed.py.

Usage: distributed_script.py MODEL OUTPUT JSON_OPTIONS, under `accelerate launch` with one process or two. Every process
writes `rank<i>.json`: its metrics, the betas it used and a checksum of its final weights.
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from tiny import digit_reward, tiny_dataset, tiny_tokenizer
from transformers import set_seed

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer

GLOBAL_BATCH, GROUP = 12, 4  # three prompts; on two processes, the answers to the second lie on both


class FixedRollouts(KLXGRPOTrainer):
    """Completions are a function of the prompt, the step and the position in the global batch, of uneven lengths."""

    betas: list[float]

    def _generate_single_turn(self, prompt_ids: list, *args: object, **kwargs: object) -> tuple:
        completions = []
        for row, ids in enumerate(prompt_ids):
            place = row + self.accelerator.process_index * len(prompt_ids)
            generator = torch.Generator().manual_seed(1000 * self.state.global_step + 10 * place + len(ids))
            length = 1 + place % 6 if place < GLOBAL_BATCH // 2 else 1 + place % 2  # the second process: short ones
            completion = torch.randint(3, 23, (length,), generator=generator).tolist()
            completions.append([*completion[:-1], 1])
        return completions, None

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.betas = [*getattr(self, "betas", []), self.beta]
        return super().training_step(*args, **kwargs)


def main(model: str, output: str, options: dict) -> None:
    processes = int(options.pop("processes"))
    lora = options.pop("lora", False)
    set_seed(0)
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "beta": 0.2,
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    trainer = FixedRollouts(
        model,
        digit_reward,
        KLXGRPOConfig(output, **settings),
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    if trainer.accelerator.num_processes != processes:
        raise RuntimeError(f"{trainer.accelerator.num_processes} processes run, {processes} were asked for")
    trainer.train()
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    result = {
        "logs": trainer.state.log_history,
        "betas": [*trainer.betas, trainer.beta],
        "weights": [float(parameter.detach().double().square().sum()) for parameter in trainable],
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
