"""Compares fixed, adaptive and PID beta in real training: GRPO and PPO on the starter task, exact KL in both places.

trl-klx starter --output_dir runs/starter
OMP_NUM_THREADS=1 python scripts/benchmark_control_training.py --picture docs/images/controllers.png

Every run is the starter recipe of its algorithm with another controller: the same starting beta, the same target, a KL
of 0.4 nats per sequence, and default settings. `plain pid` has constant, weak gains; `plain pid, tuned` has the gains
and the floor of beta that were found by hand for this task.

Runs follow one another in one process. A complete run adds a line to `<output_dir>/runs.jsonl` and is not repeated
while the line is there, so an interrupted benchmark continues. Delete the file after a change of code.

The shares *within 25 %* are of logged batches (5 steps each), whose KL is noisy. A run has *settled* at the first step
from which on the mean KL of the last 25 steps stays within 25 % of the target for `--window` steps. *Overshoot* is the
largest of these means divided by the target, minus 1, from the first one at or above the target on.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib
import torch
import yaml
from benchmark_controllers import ImpatientPID, PlainPID
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_klx.config.choices import CONTROLLER_SETTINGS
from trl_klx.control import KINDS
from trl_klx.monitor.history import HISTORY_FILE, read_history
from trl_klx.run import grpo, ppo
from trl_klx.tasks.answers import accuracy

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RECIPES = Path(__file__).parent.parent / "recipes" / "starter"
MAINS = {"grpo": grpo.main, "ppo": ppo.main}
TARGET = 0.4  # nats per sequence
BAND = 0.25
LOGGING_STEPS = 5
SMOOTHED = 5  # logged batches behind the mean that decides whether a run has settled
# name: KL controller and its settings
CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {"kl_controller": "fixed"},
    "adaptive": {"kl_controller": "adaptive", "kl_target": TARGET},
    "pid": {"kl_controller": "pid", "kl_target": TARGET},
    "plain pid": {"kl_controller": "pid", "kl_target": TARGET},
    "plain pid, tuned": {"kl_controller": "pid", "kl_target": TARGET, "kl_coef_min": 0.1},
    "pid, no patience": {"kl_controller": "pid", "kl_target": TARGET},
}
LAWS = {"plain pid": PlainPID, "plain pid, tuned": PlainPID, "pid, no patience": ImpatientPID}
USUAL = list(CONTROLLERS)[:5]
TUNED_GAINS = {"grpo": {"kl_kp": 4.0, "kl_ki": 0.04}, "ppo": {"kl_kp": 8.0, "kl_ki": 0.1}}
COLORS = {name: f"C{place}" for place, name in enumerate(CONTROLLERS)}

Run = dict[str, Any]
Arguments = argparse.Namespace


def parse(arguments: list[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starter", default="runs/starter", help="folder that `trl-klx starter` made")
    parser.add_argument("--output_dir", default="runs/controllers", help="where runs.jsonl is kept")
    parser.add_argument("--picture", default=None, help="where to draw KL and beta over time")
    parser.add_argument("--algorithms", nargs="+", choices=list(MAINS), default=list(MAINS))
    parser.add_argument("--controllers", nargs="+", choices=list(CONTROLLERS), default=USUAL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--grpo_steps", type=int, default=600)
    parser.add_argument("--ppo_steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=50, help="steps within the band that count as settled")
    return parser.parse_args(arguments)


# --- the runs --------------------------------------------------------------------------------------------------------


def recipe_of(algorithm: str, controller: str, seed: int, args: Arguments) -> dict[str, Any]:
    """The starter recipe with another controller, without evaluation in between."""
    recipe = yaml.safe_load((RECIPES / f"{algorithm}_exact_both_pid.yaml").read_text())
    recipe = {name: value for name, value in recipe.items() if name not in CONTROLLER_SETTINGS}
    if controller == "plain pid, tuned":
        recipe |= TUNED_GAINS[algorithm]
    return recipe | {
        **CONTROLLERS[controller],
        "model_name_or_path": str(Path(args.starter) / "model"),
        "dataset_name": str(Path(args.starter) / "data"),
        "seed": seed,
        "max_steps": args.grpo_steps if algorithm == "grpo" else args.ppo_steps,
        "logging_steps": min(LOGGING_STEPS, args.grpo_steps, args.ppo_steps),
        "eval_on_start": False,
        "eval_strategy": "no",
        "disable_tqdm": True,
    }


def run(algorithm: str, controller: str, seed: int, recipe: dict[str, Any]) -> Run:
    """Train the recipe; returns its KL and beta over time and the accuracy on held-out prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | {"output_dir": folder}))
        law = {"pid": LAWS[controller]} if controller in LAWS else {}
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(KINDS, law):
            status = MAINS[algorithm](["--config", str(path)])
        if status:
            raise RuntimeError(f"{algorithm} with {controller} and seed {seed} ended with status {status}.")
        history = read_history(Path(folder) / HISTORY_FILE)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = load_dataset(recipe["dataset_name"], split="test")
    result = accuracy(model, tokenizer, list(problems), sample=True, samples_per_problem=4)
    logged = [entry for entry in history if "kl/sequence" in entry]
    return {
        "algorithm": algorithm,
        "controller": controller,
        "seed": seed,
        "recipe": recipe,
        "accuracy": result.mean,
        "accuracy_se": result.standard_error,
        "seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry),
        "step": [entry["step"] for entry in logged],
        "kl": [entry["kl/sequence"] for entry in logged],
        "coef": [entry["kl/coef"] for entry in logged],
    }


def all_runs(args: Arguments) -> list[Run]:
    """The runs that the arguments ask for, made now where `runs.jsonl` does not hold them."""
    file = Path(args.output_dir) / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    wanted = [(a, c, s) for s in args.seeds for a in args.algorithms for c in args.controllers]
    for number, (algorithm, controller, seed) in enumerate(wanted, start=1):
        recipe = recipe_of(algorithm, controller, seed, args)
        done = [made for made in read_history(file) if (made["controller"], made["recipe"]) == (controller, recipe)]
        if not done:
            done = [run(algorithm, controller, seed, recipe)]
            with file.open("a") as lines:  # a line of its own, also after one that an interruption cut short
                lines.write(f"\n{json.dumps(done[0])}\n")
            gc.collect()
        runs.append(done[0])
        print(
            f"{number} of {len(wanted)}: {algorithm}, {controller}, seed {seed}: {done[0]['seconds']:.0f} s", flush=True
        )
    return runs


# --- the figures -----------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """How a run held its target. `settled` is a step, None where it did not; KLs are relative to the target."""

    settled: int | None
    share_settled: float | None  # of the logged batches from `settled` on, within the band
    share_last_half: float  # of the logged batches of the second half
    overshoot: float | None  # None where the KL never reached the target
    mean_last_half: float


def figures(run: Run, window: int) -> Figures:
    relative = [kl / TARGET for kl in run["kl"]]
    smooth = [statistics.fmean(relative[max(0, end - SMOOTHED) : end]) for end in range(1, len(relative) + 1)]
    inside, held = ([abs(value - 1) <= BAND for value in values] for values in (relative, smooth))
    last_half = [place for place, step in enumerate(run["step"]) if 2 * step > run["step"][-1]]
    length = max(1, window // LOGGING_STEPS)
    start = next((i for i in range(len(held) - length + 1) if all(held[i : i + length])), None)
    above = [place for place, value in enumerate(smooth) if value >= 1]
    return Figures(
        settled=None if start is None else run["step"][start],
        share_settled=None if start is None else statistics.fmean(inside[start:]),
        share_last_half=statistics.fmean(inside[place] for place in last_half),
        overshoot=max(smooth[above[0] :]) - 1 if above else None,
        mean_last_half=statistics.fmean(relative[place] for place in last_half),
    )


def spread(values: list[float | None], digits: int = 2) -> str:
    """Mean and range of what there is."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.fmean(known):.{digits}f} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def table_of(runs: list[Run], args: Arguments) -> Table:
    caption = f"Mean over {len(args.seeds)} seeds (range); accuracy ± its standard error over the problems."
    table = Table(title=f"KL held at {TARGET} nats per sequence", caption=caption)
    table.add_column("run")
    names = ("settled", "at step", "within 25 % since", "within 25 %, last half", "overshoot", "KL/target, last half")
    for column in (*names, "last beta", "held-out accuracy"):
        table.add_column(column, justify="right")
    for algorithm in args.algorithms:
        for controller in args.controllers:
            mine = [r for r in runs if (r["algorithm"], r["controller"]) == (algorithm, controller)]
            found = [figures(one, args.window) for one in mine]
            error = statistics.fmean(one["accuracy_se"] for one in mine)
            table.add_row(
                f"{algorithm}, {controller}",
                f"{sum(one.settled is not None for one in found)} of {len(found)}",
                spread([one.settled for one in found], 0),
                spread([one.share_settled for one in found]),
                spread([one.share_last_half for one in found]),
                spread([one.overshoot for one in found]),
                spread([one.mean_last_half for one in found]),
                spread([one["coef"][-1] for one in mine], 3),
                f"{spread([one['accuracy'] for one in mine], 3)} ± {error:.3f}",
            )
        table.add_section()
    return table


def draw(runs: list[Run], args: Arguments) -> None:
    """KL above, beta below, one column per algorithm: median over the seeds, and their range."""
    size = (4.8 * len(args.algorithms), 5.5)
    figure, axes = plt.subplots(
        2, len(args.algorithms), figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for (upper, lower), algorithm in zip(axes.T, args.algorithms, strict=True):
        for controller in args.controllers:
            mine = [r for r in runs if (r["algorithm"], r["controller"]) == (algorithm, controller)]
            for panel, name in ((upper, "kl"), (lower, "coef")):
                columns = list(zip(*(one[name] for one in mine), strict=True))
                steps, color = mine[0]["step"], COLORS[controller]
                panel.plot(steps, [statistics.median(values) for values in columns], color=color, label=controller)
                panel.fill_between(
                    steps,
                    [min(values) for values in columns],
                    [max(values) for values in columns],
                    color=color,
                    alpha=0.2,
                )
        upper.axhline(TARGET, color="black", linestyle="--", linewidth=1)
        upper.axhspan(TARGET * (1 - BAND), TARGET * (1 + BAND), color="black", alpha=0.07)
        upper.set_title(algorithm.upper())
        lower.set_yscale("log")
        lower.set_xlabel("step")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("KL, nats per sequence")
    axes[1][0].set_ylabel("beta")
    axes[0][0].legend(loc="upper left", fontsize="small")
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Run]:
    args = parse(arguments)
    torch.set_num_threads(1)
    runs = all_runs(args)
    Console(width=None if sys.stdout.isatty() else 180).print(table_of(runs, args))
    if args.picture:
        draw(runs, args)
    return runs


if __name__ == "__main__":
    main()
