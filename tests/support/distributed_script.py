"""Training runs whose data and completions do not depend on how many processes share them; see launching.py.

Usage: distributed_script.py MODEL RUNS, under `accelerate launch` with two processes; RUNS is a JSON file, a list of
{"output": folder, "options": ...}. Of each run, every process writes `rank<i>.json`, what `train` returns. A run that
fails leaves `failed<i>` with its traceback, and ends all, because another process may wait for this one.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support import fake_vllm
from support.quick import make_quick
from support.tiny import digit_reward, tiny_dataset, tiny_tokenizer
from support.tiny_dpo import preferences
from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig, KLXPPOTrainer
from trl_klx.trainers.reference.shards import whole

GLOBAL_BATCH, GROUP = 12, 4  # three prompts; on two processes, the answers to the second lie on both


def completions(trainer: Any, prompt_ids: list, empty: list[int]) -> list[list[int]]:
    """A function of the prompt, the step and the position in the global batch, of uneven lengths."""
    out = []
    for row, ids in enumerate(prompt_ids):
        place = row + trainer.accelerator.process_index * len(prompt_ids)
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + 10 * place + len(ids))
        length = 1 + place % 6 if place < GLOBAL_BATCH // 2 else 1 + place % 2  # the second process: short ones
        completion = torch.randint(3, 23, (length,), generator=generator).tolist()
        out.append(empty if place == GLOBAL_BATCH - 1 else [*completion[:-1], 1])
    return out


class FixedGRPO(KLXGRPOTrainer):
    def _generate_single_turn(self, prompt_ids: list, *args: object, **kwargs: object) -> tuple:
        # TRL fails on an answer without any token; one that is cut off, and masked for it, has none that counts.
        return completions(self, prompt_ids, [5]), None


def gold(prompts: list[str], trainer_state: Any, **kwargs: object) -> list[float]:
    """A gold reward of prompt and step alone, which falls after the second step."""
    level = trainer_state.global_step if trainer_state.global_step <= 2 else -1.0
    return [level + 0.01 * int(prompt[0]) for prompt in prompts]


def unscored(completions: list, **kwargs: object) -> list[None]:
    """A reward that applies to no answer."""
    return [None for _ in completions]


def followed(trainer: Any) -> list | None:
    """What each process's monitor of the gold reward holds."""
    if trainer.overoptimisation is None:
        return None
    return [[e.step, e.kl, e.gold, sorted(e.by_prompt.items())] for e in trainer.overoptimisation.evaluations]


def grpo(model: str, output: str, settings: dict, shared: dict) -> Any:
    config = KLXGRPOConfig(
        output,
        **{
            "num_generations": GROUP,
            "mask_truncated_completions": True,
            "max_completion_length": 8,
            "beta": 0.2,
            **settings,
        },
    )
    return FixedGRPO(model, shared.pop("reward"), config, **shared)


def digits_in_part(completions: list[str], **kwargs: object) -> list[float | None]:
    """As `digit_reward`, which does not apply to empty answers and those that begin with one of a few letters."""
    rewards = digit_reward(completions, **kwargs)
    return [None if text[:1] in "abc" else reward for text, reward in zip(completions, rewards, strict=True)]


def ppo(model: str, output: str, settings: dict, shared: dict) -> Any:
    class FixedPPO(KLXPPOTrainer):
        def generate(self, prompt_ids: list) -> list:
            return completions(self, prompt_ids, [])

    config = KLXPPOConfig(output, **{"response_length": 8, "num_ppo_epochs": 2, "kl_coef": 0.2, **settings})
    # By its path on every launch: what is drawn for its head comes before the adapter's random weights.
    made = FixedPPO(config, model=model, value_model=model, reward_funcs=shared.pop("reward"), **shared)
    if config.use_vllm:
        fake_vllm.FakeLLM.made.given = lambda prompt_ids: completions(made, prompt_ids, [])
    return made


def dpo(model: str, output: str, settings: dict, shared: dict) -> Any:
    """Answers of uneven length; five prompts for the probe, which two processes cannot share evenly."""
    probe = {"kl_probe_steps": 1, "kl_probe_prompts": 5, "kl_probe_max_new_tokens": 8}
    config = KLXDPOConfig(output, **{"kl_coef": 0.2, **probe, **settings})
    data = {"train_dataset": preferences(24), "eval_dataset": preferences(10)}
    del shared["reward"]
    return KLXDPOTrainer(model, args=config, **{**shared, **data})


def train(model: str, output: str, options: dict, checkpoint: str | None = None) -> dict:
    """Make a run; returns its metrics, the betas it used and a checksum of its final weights."""
    with pytest.MonkeyPatch.context() as patch:
        if options.get("use_vllm"):
            fake_vllm.install(patch)
        return _train(model, output, dict(options), checkpoint)


def _train(model: str, output: str, options: dict, checkpoint: str | None) -> dict:
    processes = options.pop("processes", 1)
    algorithm, lora = options.pop("algorithm", "grpo"), options.pop("lora", False)
    sharding, with_gold = options.pop("sharding", None), options.pop("gold", False)
    scored = digits_in_part if algorithm == "ppo" else digit_reward
    reward = unscored if options.pop("unscored", False) else scored
    rows = GLOBAL_BATCH // processes // options.get("gradient_accumulation_steps", 1)
    set_seed(0)
    settings = {
        "per_device_train_batch_size": rows,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,  # DeepSpeed too runs on one process without it
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "kl_report": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    shared = {
        "reward": reward,
        "train_dataset": tiny_dataset(24),
        "processing_class": tiny_tokenizer(),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    }
    if with_gold:
        prompts = [f"{a}+{b}=" for a in range(5) for b in range(5)]  # which two processes cannot share evenly
        shared |= {"gold_reward_func": gold, "eval_dataset": Dataset.from_dict({"prompt": prompts})}
    trainer = {"grpo": grpo, "ppo": ppo, "dpo": dpo}[algorithm](model, output, settings, shared)
    if trainer.accelerator.num_processes != processes:
        raise RuntimeError(f"{trainer.accelerator.num_processes} processes run, {processes} were asked for")
    if sharding and trainer.accelerator.distributed_type != sharding:
        raise RuntimeError(f"{trainer.accelerator.distributed_type} runs, {sharding} was asked for")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "logs": trainer.state.log_history,
        "betas": [*(entry["kl/coef"] for entry in trainer.state.log_history if "kl/coef" in entry), trainer.kl.coef],
        "gold": followed(trainer),
        "steps": trainer.state.global_step,
        "weights": sums(trainable),
        "reference": sums(trainer.reference._parameters().values()),
    }


def sums(parameters: Iterable[Any]) -> list[float]:
    """The squares of each weight, summed up; of whole weights."""
    return [float(whole(parameter).double().square().sum()) for parameter in parameters]


def train_and_resume(model: str, output: str, options: dict) -> dict:
    """A run and, with the option `resumed_after`, as "again" what follows the checkpoint of that step once more."""
    step = options.pop("resumed_after", None)
    result = train(model, output, options)
    if step is not None:
        forget()
        again = {**options, "save_strategy": "no"}
        result["again"] = train(model, f"{output}/again", again, f"{output}/checkpoint-{step}")
    return result


def forget() -> None:
    """Nothing of a run is left for the next in this process."""
    gc.collect()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(model: str, runs: str) -> None:
    if "ACCELERATE_USE_FSDP" in os.environ:
        # accelerate gives processes on the CPU DDP in place of FSDP2; told that they are an accelerator's, it does not.
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        # For inference only, and compiling it takes a minute. (`deepspeed.comm.torch` as a name is torch itself.)
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    make_quick()
    variables, rank = dict(os.environ), os.environ["RANK"]
    for run in json.loads(Path(runs).read_text()):
        output = Path(run["output"])
        output.mkdir(parents=True, exist_ok=True)
        try:
            result = train_and_resume(model, run["output"], run["options"])
        except BaseException:
            (output / f"failed{rank}").write_text(traceback.format_exc())
            os._exit(1)
        (output / f"rank{rank}.json").write_text(json.dumps(result))
        forget()
        os.environ.clear()
        os.environ.update(variables)
    torch.distributed.barrier()
    time.sleep(0.5)  # gloo aborts now and then when one leaves while another still talks
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
