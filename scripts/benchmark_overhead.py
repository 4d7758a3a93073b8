"""Measures what a KL costs a GRPO step, in time and memory: stock `GRPOTrainer` (k3 loss) against `KLXGRPOTrainer`.

trl-klx starter --output_dir runs/starter
python scripts/benchmark_overhead.py --model runs/starter/model
python scripts/benchmark_overhead.py --model runs/sums/model --prompt "Write a sentence about the sea." \
    --batch_size 4 --completion_length 48

python scripts/benchmark_overhead.py --shape qwen2.5-0.5b --batch_size 8 --completion_length 256 --whole_rounds 0

`--model` is any causal language model that `from_pretrained` loads; recipes/smollm2-135m/prepare.py fetches a real one.
`--shape` takes random weights of a published shape instead, which needs no file at all. `--frozen` trains a LoRA
adapter: no gradient of the head. On CUDA the policy runs in bf16 autocast, as `bf16: true` has it.

All trainers share policy, reference and optimizer in one process (with `--frozen` the base model) and take turns; a
ratio is taken to stock within a round. `step` is loss, backward, clipping and optimizer on one fixed rollout, the same
answers for all; `whole` samples, scores and rewards a rollout first. Memory is the peak during a step, in a process of
its own, above what it held before.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from random_models import SHAPES, save
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import exact_kl
from trl_klx.trainers.seams import FUSED_LM_HEAD, TRL_VERSION, swapped

STOCK = "stock k3 loss"
# name: options of KLXGRPOConfig, or None for stock
VARIANTS: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "stock again": None,  # the noise of the comparison
    "k1 reward": {"kl_estimator": "k1", "kl_placement": "reward"},
    "k2 loss": {"kl_estimator": "k2"},
    "k3 loss": {"kl_estimator": "k3"},
    "exact loss": {"kl_estimator": "exact"},
    "exact both": {"kl_estimator": "exact", "kl_placement": "both"},
    "k1 reward, prefix": {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix"},
    "exact both, prefix": {"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix"},
}
if not FUSED_LM_HEAD:  # where the policy's forward returns logits
    VARIANTS |= {
        "exact loss, dense": {"kl_estimator": "exact"},  # for comparison: `exact_kl` on all logits at once
    }

Arguments = argparse.Namespace


def parse(arguments: list[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/starter/model", help="folder of a causal language model")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in place of --model")
    parser.add_argument("--frozen", action="store_true", help="train a LoRA adapter on all linear layers, rank 32")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--prompt", default="53331=")
    parser.add_argument("--batch_size", type=int, default=64, help="answers per step")
    parser.add_argument("--completion_length", type=int, default=8, help="tokens of every answer")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant")
    parser.add_argument("--whole_rounds", type=int, default=5, help="timed whole steps of each variant; 0 for none")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--no_memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, on a busy machine")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # measure this variant's memory in this process
    return parser.parse_args(arguments)


def reward(completions: list[str], **_: Any) -> list[float]:
    """Anything that differs between answers."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


def rows(args: Arguments) -> list[dict[str, str]]:
    return [{"prompt": args.prompt}] * args.batch_size


def make_trainer(name: str, model: Any, args: Arguments) -> GRPOTrainer:
    cpu = not torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "per_device_train_batch_size": args.batch_size,
        "num_generations": args.batch_size // 2,
        "max_completion_length": args.completion_length,
        "generation_kwargs": {"min_new_tokens": args.completion_length} if args.whole_rounds else None,
        "beta": 0.1,
        "use_cpu": cpu,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "report_to": [],
    }
    data: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows(args)),
        "processing_class": AutoTokenizer.from_pretrained(args.model),
    }
    if args.frozen:
        data["peft_config"] = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    options = VARIANTS[name]
    torch.manual_seed(0)  # for the adapter
    if options is None:
        trainer = GRPOTrainer(model, reward, GRPOConfig(**settings), **data)
    else:
        trainer = KLXGRPOTrainer(model, reward, KLXGRPOConfig(**settings, **options), **data)
        if name.endswith("dense"):
            take_dense(trainer)
    trainer.accelerator.prepare_model(trainer.model)  # autocast goes around its forward, as in `train`
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def take_dense(trainer: KLXGRPOTrainer) -> None:
    exact = trainer._exact

    def dense(part, logits):
        with torch.no_grad():
            ref_logits = exact._reference.get_output_embeddings()(part.ref_hidden)
        logits = part.tokens.select(logits) / trainer.temperature
        return part.tokens.spread(exact_kl(logits, ref_logits / trainer.temperature))

    exact._from_logits = dense


def make_step(trainer: GRPOTrainer, optimizer: torch.optim.Optimizer, batch: Any, *, whole: bool) -> Callable[[], None]:
    """One optimizer step as `Trainer.train` takes it, on the fixed rollout `batch`, or from the prompts `batch` on."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    prepare = type(trainer)._prepare_inputs.__get__(trainer)

    def step() -> None:
        trainer._prepare_inputs = prepare if whole else lambda _: batch  # type: ignore[method-assign]
        trainer.training_step(trainer.model, batch, None)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def rollout(trainer: GRPOTrainer, args: Arguments) -> dict[str, Any]:
    """The same answers for all; random ones where no sampling is timed, which would take longer than what is."""
    torch.manual_seed(0)
    if args.whole_rounds:
        return trainer._generate_and_score_completions(rows(args))
    tokenizer = trainer.processing_class
    tokens = sorted({*range(min(len(tokenizer), trainer.model.config.vocab_size))} - {*tokenizer.all_special_ids})
    places = torch.randint(len(tokens), (args.batch_size, args.completion_length)).tolist()
    answers = [[tokens[place] for place in row] for row in places]
    with swapped(trainer, _generate_single_turn=lambda *_, **__: (answers, None)):
        return trainer._generate_and_score_completions(rows(args))


def load_model(args: Arguments) -> Any:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_optimizer(trainer: GRPOTrainer) -> torch.optim.Optimizer:
    """With a learning rate so small that the policy, and with it every rollout, stays the same for all."""
    return torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-12)


def with_the_weights_of(model: Any) -> Any:
    """A model of its own, whose forward a trainer can wrap, with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def take_turns(steps: dict[str, Callable[[], None]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each, by round; each round starts with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, now = list(steps), time.perf_counter if clock == "wall" else time.process_time
    for number in range(rounds + 2):  # two to warm up
        first = number % len(names)
        gc.collect()
        gc.disable()  # a collection takes longer than what variants differ by
        for name in names[first:] + names[:first]:
            torch.manual_seed(number)
            start = now()
            steps[name]()
            if number >= 2:
                seconds[name].append(now() - start)
        gc.enable()
    return seconds


def share_weights(model: Any, other: Any) -> None:
    for mine, first in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = first.data


def make_trainers(args: Arguments) -> tuple[dict[str, GRPOTrainer], dict[str, torch.optim.Optimizer]]:
    """All variants on one set of weights, of the policy and of the reference, so that those of a large model fit."""
    model, trainers = load_model(args), {}
    for name in args.variants:
        trainers[name] = make_trainer(name, with_the_weights_of(model), args)
        reference = trainers[name].ref_model
        if reference is not None:  # with an adapter, the policy without it
            share_weights(reference, next(iter(trainers.values())).ref_model)
    if args.frozen:
        return trainers, {name: make_optimizer(trainer) for name, trainer in trainers.items()}
    return trainers, dict.fromkeys(trainers, make_optimizer(next(iter(trainers.values()))))


def measure_times(args: Arguments) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of step ("step", "whole"), variant and round."""
    trainers, optimizers = make_trainers(args)
    batches = {name: rollout(trainer, args) for name, trainer in trainers.items()}
    answers = [batch["completion_ids"] for batch in batches.values()]
    assert all(torch.equal(answers[0], other) for other in answers)
    steps = {name: make_step(trainers[name], optimizers[name], batches[name], whole=False) for name in trainers}
    out = {"step": take_turns(steps, args.rounds, args.clock)}
    if args.whole_rounds:
        whole = {name: make_step(trainers[name], optimizers[name], rows(args), whole=True) for name in trainers}
        out["whole"] = take_turns(whole, args.whole_rounds, args.clock)
    return out


# --- memory ----------------------------------------------------------------------------------------------------------


def held_and_peak(kind: str) -> int:
    """Bytes of this process now ("VmRSS") or at its peak ("VmHWM"); on CUDA the allocator's."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if kind == "VmRSS" else torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(kind))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_memory(name: str, args: Arguments) -> int:
    """Bytes that a step takes at its peak on top of the weights, references, optimizer and rollout."""
    trainer = make_trainer(name, load_model(args), args)
    optimizer, batch = make_optimizer(trainer), rollout(trainer, args)
    for parameter in optimizer.param_groups[0][
        "params"
    ]:  # the optimizer's moments, without a step whose memory the system may keep
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    reset_peak()
    held = held_and_peak("VmRSS")
    make_step(trainer, optimizer, batch, whole=False)()
    return held_and_peak("VmHWM") - held


def memory_of(name: str, args: Arguments) -> int:
    settings = {key: value for key, value in vars(args).items() if key not in ("worker", "output")}
    command = [sys.executable, __file__, "--worker", json.dumps({"name": name, "settings": settings})]
    # Freed blocks go back to the system at once: what the process holds is then what it uses.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


# --- the table -------------------------------------------------------------------------------------------------------


def ratios(seconds: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median and quartiles, over rounds, of a variant's time over stock's."""
    values = [mine / stock for mine, stock in zip(seconds[name], seconds[STOCK], strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table_of(times: dict[str, dict[str, list[float]]], memory: dict[str, int]) -> Table:
    table = Table(title="Time of one optimizer step over stock's: median (quartiles over rounds)")
    table.add_column("variant")
    for column in [f"{kind} {unit}" for kind in times for unit in ("ms", "over stock")]:
        table.add_column(column, justify="right")
    if memory:
        table.add_column("peak MiB", justify="right")
        table.add_column("over stock MiB", justify="right")
    for name in times["step"]:
        cells = []
        for seconds in times.values():
            middle, low, high = ratios(seconds, name)
            cells += [f"{1000 * statistics.median(seconds[name]):.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        if memory:
            cells += [f"{memory[name] / 2**20:.0f}", f"{(memory[name] - memory[STOCK]) / 2**20:+.0f}"]
        table.add_row(name, *cells)
    return table


def figures(
    times: dict[str, dict[str, list[float]]], memory: dict[str, int], args: Arguments
) -> dict[str, dict[str, Any]]:
    """Median seconds and the ratio to stock with its quartiles, by variant and kind of step; bytes at the peak."""
    out: dict[str, dict[str, Any]] = {}
    for name in args.variants:
        out[name] = {
            kind: {"seconds": statistics.median(seconds[name]), "over stock": ratios(seconds, name)}
            for kind, seconds in times.items()
        }
        if memory:
            out[name]["peak bytes"] = memory[name]
    return out


def measure(args: Arguments) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    without_memory = args.no_memory or not (torch.cuda.is_available() or os.path.exists("/proc/self/clear_refs"))
    memory = {} if without_memory else {name: memory_of(name, args) for name in args.variants}
    return measure_times(args), memory


def main(arguments: list[str] | None = None) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    args = parse(arguments)
    if STOCK not in args.variants:
        args.variants.insert(0, STOCK)
    if args.worker:
        task = json.loads(args.worker)
        print(measure_memory(task["name"], Arguments(**task["settings"])))
        return {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            args.model = save(args.shape, Path(folder), device="cuda" if torch.cuda.is_available() else "cpu")
        times, memory = measure(args)
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(times, memory))
    if args.output is not None:
        found = {"trl": str(TRL_VERSION), "torch": torch.__version__, "variants": figures(times, memory, args)}
        settings = {key: value for key, value in vars(args).items() if key not in ("worker", "output")}
        args.output.write_text(json.dumps({"settings": settings, **found}, indent=1))
    return times, memory


if __name__ == "__main__":
    main()
