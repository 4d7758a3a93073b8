"""One process alone, DeepSpeed's ZeRO-1, 2 and 3 and FSDP2 train the starter recipe to the same numbers."""

import json
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_check import Report, Settings, last_words, run

ALONE = "one_gpu"
LAYOUTS = (ALONE, "zero1", "zero2", "zero3", "fsdp2")
FIELDS = ("loss", "grad_norm", "kl/exact", "kl/coef")
TOLERANCE, SMALL = 1e-3, 1e-5  # of the larger number; and what is no difference at all
STEPS = 4
SECONDS = 80  # that a launch may take


def check(settings: Settings, report: Report) -> None:
    folder = settings.folder("layouts")
    made = folder / "starter.log"
    if run(["-m", "trl_klx.cli", "starter", "--output_dir", str(folder / "starter")], made):
        raise RuntimeError(f"the starter was not made: {last_words(made)}")
    # accelerate gives a process on a CPU no FSDP2.
    names = [name for name in LAYOUTS if not (settings.is_try and name == "fsdp2")]
    with ThreadPoolExecutor(1 if settings.is_try else 3) as pool:
        statuses = dict(zip(names, pool.map(lambda name: launch(name, folder, settings), names), strict=True))
    if statuses[ALONE]:
        raise RuntimeError(f"{ALONE} ended with {statuses[ALONE]}: {last_words(folder / f'{ALONE}.log')}")
    alone = history(folder / ALONE)
    report.add(f"{ALONE}: {STEPS} steps", ", ".join(f"{name} {alone[-1][name]:.4g}" for name in FIELDS))
    for name in names[1:]:
        if statuses[name]:
            report.add(
                f"{name} trains", f"ended with {statuses[name]}: {last_words(folder / f'{name}.log')}", "0", False
            )
            continue
        off, what = furthest(history(folder / name), alone)
        report.at_most(f"{name}, furthest from one process: {what}", off, TOLERANCE)


def launch(name: str, folder: Path, settings: Settings) -> int:
    """Train the starter for a few steps; the exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_cpu = settings.is_try and name == ALONE
    accelerate = f"recipes/accelerate/{'cpu' if on_cpu else name}.yaml"
    launcher = ["--num_processes", "1", "--main_process_port", str(port), "--mixed_precision", "no"]
    command = ["-m", "accelerate.commands.launch", *launcher, "--config_file", accelerate, "scripts/grpo.py"]
    changes = {
        "model_name_or_path": folder / "starter" / "model",
        "dataset_name": folder / "starter" / "data",
        "output_dir": folder / name,
        "use_cpu": str(on_cpu).lower(),
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_on_start": "false",
        "eval_strategy": "no",
        "report_to": "none",
    }
    if settings.is_try:
        changes |= {"per_device_train_batch_size": 16, **({} if on_cpu else {"ddp_backend": "gloo"})}
    command += ["--config", "recipes/starter/grpo_exact_both_pid.yaml"]
    command += [str(part) for option, value in changes.items() for part in (f"--{option}", value)]
    # DeepSpeed compiles a kernel for CPUs: in a folder of its own, it waits for nobody's lock.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return run(command, folder / f"{name}.log", seconds=SECONDS * (3 if settings.is_try else 1), **variables)


def history(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "grad_norm" in row]


def furthest(mine: list[dict[str, float]], alone: list[dict[str, float]]) -> tuple[float, str]:
    """The largest relative difference, and where it is; inf where steps are missing."""
    if len(mine) != len(alone) or len(alone) != STEPS:
        return math.inf, f"{len(mine)} logged steps against {len(alone)}"
    worst = (-1.0, "")
    for step, (a, b) in enumerate(zip(mine, alone, strict=True), 1):
        for name in FIELDS:
            gap = abs(a[name] - b[name])
            off = 0.0 if gap <= SMALL else gap / max(abs(a[name]), abs(b[name]))
            off = math.inf if math.isnan(off) else off
            if off > worst[0]:
                worst = (off, f"{name} at step {step}")
    return worst
