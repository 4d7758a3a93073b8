"""Checks a GPU machine from this checkout in under eight minutes, without a network.

python scripts/check_gpu.py --prepare runs/wheels
python scripts/check_gpu.py --wheels runs/wheels --output_dir runs/gpu

The first command, on a machine with a network, gathers what a machine with Python 3.12, torch and transformers lacks.
The second, on the GPU machine, installs that in a folder of its own and runs the stages; without --wheels it uses what
is installed.

- exact_kl: time of the exact KL over that of its matrix products, peak memory, errors, at 8192 tokens;
- steps: one optimizer step over stock TRL's, in bf16;
- kernels: values and gradients against float64, with every option;
- layouts: one process, ZeRO-1, 2, 3 and FSDP2 train to the same numbers;
- recipes: those for one GPU at their true size, with the peak of the memory beside the dry run's estimate;
- tests: those of the maths and the trainers, on the device.

The first two run alone, because they are timed; then the others together. Each has a time limit, and one that fails or
takes too long stops no other. What is found is printed as a table at the end and written to check.json, with every
log beside it. The exit status is 1 if anything failed. `--device cpu` tries the check itself, at sizes that measure
nothing.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_check import ROOT, Finding, Report, Settings, last_words, read, run, to_json

ALONE = {"exact_kl": 90, "steps": 150}  # seconds that each may take
TOGETHER = {"kernels": 120, "layouts": 200, "recipes": 200, "tests": 200}
LIMITS = {**ALONE, **TOGETHER}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), help="for logs, figures and check.json")
    parser.add_argument("--wheels", type=Path, help="a folder that --prepare filled: install it, below the output")
    parser.add_argument("--other_trl_at", type=Path, help="another TRL, for `steps` (default: that of --wheels)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the stages' time limits")
    gather = parser.add_argument_group("gathering wheels, and nothing else")
    gather.add_argument("--prepare", type=Path, metavar="FOLDER")
    gather.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    gather.add_argument("--platforms", nargs="+", help="its platforms, as pip names them (default: Linux on x86-64)")
    gather.add_argument("--packages", nargs="+", default=[], help="further ones that it lacks")
    gather.add_argument("--other_trl", default="1.12.0", help="another TRL for `steps`; '' for none")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # a stage and its settings, run in this process
    return parser.parse_args(arguments)


def run_stage(name: str, settings: Settings) -> None:
    """In a process of its own."""
    report = Report(Path(settings.output) / f"{name}.jsonl", is_try=settings.is_try)
    if name in ("exact_kl", "steps"):
        from gpu_check import benches

        return (benches.exact_kl if name == "exact_kl" else benches.steps)(settings, report)
    from gpu_check import kernels, layouts, recipes, suite

    return {"kernels": kernels, "layouts": layouts, "recipes": recipes, "tests": suite}[name].check(settings, report)


def watch(name: str, settings: Settings, patience: float) -> tuple[float, list[Finding]]:
    """Run a stage; its seconds, and what it found, a failure to end well included."""
    file, log = Path(settings.output) / f"{name}.jsonl", Path(settings.output) / f"{name}.log"
    file.unlink(missing_ok=True)
    start, limit = time.perf_counter(), LIMITS[name] * patience
    status = run(["scripts/check_gpu.py", "--worker", name, to_json(settings)], log, seconds=limit)
    taken = time.perf_counter() - start
    found = read(file)
    if status:
        why = f"not done in {limit:.0f} s" if status == 124 else last_words(log)
        found.append(Finding("the stage", why, "runs to its end", False))
    elif not found:
        found.append(Finding("the stage", "found nothing", "a finding", False))
    print(f"{name}: {taken:.0f} s, {sum(row.ok is False for row in found)} failed", flush=True)
    return taken, found


def show(found: dict[str, list[Finding]]) -> None:
    for name, rows in found.items():
        print(f"\n{name}")
        width = min(96, max(len(row.what) for row in rows))
        for row in rows:
            verdict = {True: "ok", False: "FAILED", None: ""}[row.ok]
            print(f"  {row.what:{width}}  {row.measured:>12}  {row.bar:16}  {verdict}".rstrip())


def machine(device: str) -> dict[str, Any]:
    """What was checked, by a process with the same packages as the stages."""
    code = (
        "import json, torch, transformers, trl, accelerate; cuda = torch.cuda.is_available();"
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, 'trl': trl.__version__,"
        "'transformers': transformers.__version__, 'accelerate': accelerate.__version__,"
        "'device': torch.cuda.get_device_name() if cuda else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"this machine lacks a package: {done.stderr.strip().splitlines()[-1]} (see --prepare and --wheels)")
    found = {**json.loads(done.stdout.splitlines()[-1]), "python": platform.python_version()}
    if device == "cuda" and found["device"] is None:
        sys.exit("no CUDA device is here; --device cpu tries the check itself.")
    return found


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.worker is not None:
        name, given = args.worker
        run_stage(name, Settings(**json.loads(given)))
        return 0
    if args.prepare is not None:
        from gpu_check.wheels import PLATFORMS, prepare

        platforms = args.platforms or list(PLATFORMS)
        other = args.other_trl or None
        prepare(args.prepare, python=args.python, platforms=platforms, extra=args.packages, other_trl=other)
        return 0
    start, output = time.perf_counter(), args.output_dir.absolute()
    output.mkdir(parents=True, exist_ok=True)
    site, other = None, args.other_trl_at
    if args.wheels is not None:
        from gpu_check.wheels import install

        site, found_trl = install(args.wheels, output / "installed")
        other = other or found_trl
    # The checkout comes first: of a wheel of ours, only its record is used.
    paths = [ROOT, ROOT / "scripts", *([site] if site else []), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    facts = machine(args.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    settings = Settings(args.device, str(output), None if other is None else str(Path(other).absolute()))
    taken: dict[str, float] = {}
    found: dict[str, list[Finding]] = {}
    together = [name for name in TOGETHER if name in args.stages]
    groups = [*([name] for name in ALONE if name in args.stages), *([together] if together else [])]
    for group in groups:
        with ThreadPoolExecutor(1 if args.device == "cpu" else len(group)) as pool:
            results = pool.map(lambda name: watch(name, settings, args.patience), group)
            for name, (seconds, rows) in zip(group, results, strict=True):
                taken[name], found[name] = seconds, rows
    shutil.rmtree(output / "installed", ignore_errors=True)
    show(found)
    failed = sum(row.ok is False for rows in found.values() for row in rows)
    total = time.perf_counter() - start
    print(f"\n{failed} failed, {total:.0f} s; logs and check.json in {output}")
    stages = {name: {"seconds": taken[name], "findings": [row._asdict() for row in found[name]]} for name in found}
    (output / "check.json").write_text(json.dumps({"machine": facts, "seconds": total, "stages": stages}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
