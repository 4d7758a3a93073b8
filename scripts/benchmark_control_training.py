"""Compares controllers of beta in real training: does each hold the KL at its target, and what does the reward say?

trl-klx starter --output_dir runs/starter
python recipes/tinystories-15m/prepare.py
OMP_NUM_THREADS=1 python scripts/benchmark_control_training.py --tasks grpo ppo stories

Tasks are recipes, each at several targets (`scripts/control_bench/tasks.py`); a run starts from the recipe's beta and
differs from it in controller, target and seed. "pid, steps limited" has a `kl_step_limit` of 1.5 % of the target. Runs
of fixed betas give the frontier: the reward that each KL buys. `sums` (`python recipes/smollm2-135m/prepare.py`)
takes two minutes a run on a GPU, and three quarters of an hour on a CPU whose cores have AMX.

Every run leaves a trace, step by step, in `--traces` (`scripts/control_bench/traces` holds those behind
docs/controllers.md) and is not repeated while it is there, so the benchmark can be made task by task and interrupted.
After a change of a controller delete its lines. `--show` only tells what the traces say.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from control_bench.picture import draw, draw_frontier
from control_bench.table import control_table
from control_bench.tasks import LIMITED, TASKS, Task, recipe_of, trained
from control_bench.traces import Key, Trace, add_trace, read_traces, trace_of
from rich.console import Console

CONTROLLERS = ("fixed", "adaptive", "pid", LIMITED)
DEFAULT = ("fixed", "pid")
TRACES = Path(__file__).parent / "control_bench" / "traces"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(TASKS)}; with --show of the traces. Default: all")
    parser.add_argument(
        "--controllers",
        nargs="+",
        help=f"of {', '.join(map(repr, CONTROLLERS))}; with --show of the traces. Default: fixed pid, all",
    )
    parser.add_argument(
        "--levels",
        nargs="+",
        type=float,
        help="targets (of fixed: betas) in place of the task's own; with --show of the traces",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of fixed betas only the first")
    parser.add_argument("--steps", type=int, help="in place of the task's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with the tasks' models and data")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces, read and added to")
    parser.add_argument("--picture", type=Path, help="where to draw KL and beta over the steps")
    parser.add_argument("--frontier", type=Path, help="where to draw reward over KL at the end")
    parser.add_argument("--show", action="store_true", help="train nothing")
    args = parser.parse_args(arguments)
    for name, given, known in (("tasks", args.tasks, TASKS), ("controllers", args.controllers, CONTROLLERS)):
        unknown = set(given or ()) - set(known)
        if unknown and not args.show:
            parser.error(f"--{name} {' '.join(sorted(unknown))}: give some of {', '.join(known)}")
    return args


def wanted(args: argparse.Namespace) -> list[Key]:
    """The runs that the arguments ask for, seed by seed."""
    keys = []
    for seed in args.seeds:
        for name in args.tasks or TASKS:
            task = TASKS[name]
            for controller in args.controllers or DEFAULT:
                if controller == "fixed" and seed != args.seeds[0]:
                    continue
                levels = args.levels or (task.betas if controller == "fixed" else task.targets)
                keys += [Key(name, controller, level, seed, args.steps or task.steps) for level in levels]
    return keys


def run(key: Key, task: Task, runs: Path) -> Trace:
    recipe = recipe_of(task, key.controller, key.level, key.seed, key.steps, runs)
    trace = trace_of(key, recipe[task.coef], trained(task, recipe))
    gc.collect()
    return trace


def _is_shown(key: Key, args: argparse.Namespace) -> bool:
    if key.task not in (args.tasks or [key.task]):
        return False
    asked = key.controller in (args.controllers or [key.controller]) and key.level in (args.levels or [key.level])
    return asked or not args.show


def main(arguments: list[str] | None = None) -> dict[Key, Trace]:
    args = parse(arguments)
    torch.set_num_threads(1)
    traces = read_traces(args.traces)
    keys = [] if args.show else wanted(args)
    for number, key in enumerate(keys, start=1):
        if key not in traces:
            traces[key] = run(key, TASKS[key.task], args.runs)
            add_trace(args.traces, traces[key])
        print(f"{number} of {len(keys)}: {' '.join(map(str, key))}: {traces[key]['seconds']} s", flush=True)
    shown = {key: trace for key, trace in traces.items() if _is_shown(key, args)}
    Console(width=None if sys.stdout.isatty() else 180).print(control_table(shown))
    if args.picture:
        draw(shown, args.picture)
    if args.frontier:
        draw_frontier(shown, args.frontier)
    return shown


if __name__ == "__main__":
    main()
