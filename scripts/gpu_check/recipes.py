"""The recipes for one GPU at their true size, with random weights and made-up data, for a few steps.

Micro-batches, lengths and models are the recipe's own, because the peak of the memory depends on them; what is
changed makes runs shorter, and says so below.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from gpu_check import ROOT, Report, Settings, last_words, run

FOLDER = "recipes/qwen2.5-1.5b-lora"
RECIPES = {"ppo": "ppo_k1_reward_pid", "dpo": "dpo_exact_loss", "grpo": "grpo_exact_both_pid"}
MODELS = {
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "qwen3-0.6b-reward",
}
OFF = 0.2  # the most that the dry run's estimate may be off by
PROMPT, ANSWER = 256, 752  # tokens: as many as a dry run assumes; DPO's pairs fill 1024 with their template
SHORTER: dict[str, dict[str, Any]] = {
    "all": {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0},
    "grpo": {  # two optimizer steps, the second beside the optimizer's state, on one rollout: sampling takes longest
        "use_vllm": "false", "max_steps": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "eval_on_start": "false", "eval_strategy": "no",
    },
    "dpo": {
        "max_steps": 2, "gradient_accumulation_steps": 4, "eval_strategy": "no",
        "kl_probe_steps": 2, "kl_probe_prompts": 8, "kl_probe_max_new_tokens": 32,
    },
    "ppo": {"gradient_accumulation_steps": 2, "num_mini_batches": 2, "total_episodes": 16},
}  # fmt: skip
# To try the check itself on a CPU.
TINY: dict[str, dict[str, Any]] = {
    "all": {"use_cpu": "true", "bf16": "false", "dtype": "float32", "gradient_checkpointing": "false"},
    "grpo": {"per_device_train_batch_size": 8, "max_completion_length": 6},
    "dpo": {"gradient_accumulation_steps": 1, "kl_probe_prompts": 4, "kl_probe_max_new_tokens": 4},
    "ppo": {"per_device_train_batch_size": 2, "response_length": 6, "total_episodes": 16},
}


def check(settings: Settings, report: Report) -> None:
    here = make_inputs(settings)
    with ThreadPoolExecutor(1 if settings.is_try else len(RECIPES)) as pool:
        for name, status in zip(RECIPES, pool.map(lambda name: train(name, here, settings), RECIPES), strict=True):
            _report(name, status, here, settings, report)


def make_inputs(settings: Settings) -> dict[str, str]:
    """Folders by the names on the Hub that the recipes have."""
    from random_models import save, save_rows

    folder = settings.folder("recipes")
    here = {}
    for name, shape in MODELS.items():
        tiny = "tiny-reward" if shape.endswith("reward") else "tiny"
        here[name] = save(tiny if settings.is_try else shape, folder / shape, device=settings.device)
    prompt, answer = (20, 8) if settings.is_try else (PROMPT, ANSWER)
    for name in ("openai/gsm8k", "trl-lib/ultrafeedback-prompt", "trl-lib/ultrafeedback_binarized"):
        here[name] = save_rows(name, folder / name.replace("/", "_"), prompt=prompt, answer=answer)
    return here


def words(name: str, here: dict[str, str], settings: Settings) -> list[str]:
    """The recipe's command line."""
    path = f"{FOLDER}/{RECIPES[name]}.yaml"
    fields = yaml.safe_load((ROOT / path).read_text())
    changes: dict[str, Any] = {key: here[str(value)] for key, value in fields.items() if str(value) in here}
    if "dataset_config" in fields:
        changes["dataset_config"] = "default"
    changes |= {**SHORTER["all"], **SHORTER[name], "output_dir": Path(settings.output) / "recipes" / f"run_{name}"}
    if settings.is_try:
        changes |= {**TINY["all"], **TINY[name]}
    return ["--config", path, *(str(part) for option, value in changes.items() for part in (f"--{option}", value))]


def train(name: str, here: dict[str, str], settings: Settings) -> int:
    folder = settings.folder("recipes")
    peak = folder / f"{name}_peak.json"
    command = ["scripts/gpu_check/train_one.py", str(peak), name, *words(name, here, settings)]
    return run(command, folder / f"{name}.log")


def _report(name: str, status: int, here: dict[str, str], settings: Settings, report: Report) -> None:
    from trl_klx.run.check.dry_run import make_plan
    from trl_klx.run.check.memory import CONTEXT

    folder, title = settings.folder("recipes"), f"{FOLDER}/{RECIPES[name]}.yaml"
    if status:
        report.add(title, f"ended with {status}: {last_words(folder / f'{name}.log')}", "ends with 0", False)
        return
    rows = [json.loads(line) for line in (folder / f"run_{name}" / "metrics.jsonl").read_text().splitlines()]
    losses = [row[key] for row in rows for key in ("loss", "loss/policy_avg") if key in row]
    report.add(
        f"{title}: losses of its steps", f"{len(losses)}", "finite", bool(losses) and all(map(math.isfinite, losses))
    )
    measured = json.loads((folder / f"{name}_peak.json").read_text())
    report.add(f"{title}: seconds", f"{measured['seconds']:.0f}")
    plan = make_plan(name, words(name, here, settings))
    if plan.memory is None or measured["peak"] is None:
        return
    # What the process itself allocates: the context of the device and fragmentation are not in it.
    estimate = plan.memory.peak - sum(part.bytes for part in plan.memory.parts if part.name == CONTEXT)
    report.add(
        f"{title}: GiB allocated, reserved", f"{measured['peak'] / 2**30:.2f}, {measured['reserved'] / 2**30:.2f}"
    )
    report.at_most(f"{title}: dry run's {estimate / 2**30:.2f} GiB, off by", abs(estimate / measured["peak"] - 1), OFF)
