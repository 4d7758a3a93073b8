"""Builds sdist and wheel, checks their description, and uses the wheel from an empty folder, on two TRLs.

    python scripts/release_check.py --trl 1.12.0 1.16.0

Needs Python and a package index, and a few minutes and gigabytes for each environment; nothing is uploaded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ["--max_steps", "2"]


def main() -> None:
    """Every step prints its seconds; the first that fails ends the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", nargs="+", default=["1.12.0", "1.16.0"], help="versions of TRL to use the wheel with")
    versions = parser.parse_args().trl
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = environment(folder / "tools", ["build", "twine"])
        timed("build", [tools / "python", "-m", "build", "--outdir", folder / "dist", ROOT], folder)
        [wheel], [sdist] = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
        timed("twine check", [tools / "python", "-m", "twine", "check", "--strict", wheel, sdist], folder)
        for version in versions:
            print(f"TRL {version}")
            use(folder / version, wheel, version)


def environment(folder: Path, packages: list) -> Path:
    """The bin folder of a new environment with these packages."""
    timed("environment", [sys.executable, "-m", "venv", folder], ROOT)
    timed("installation", [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], ROOT)
    return folder / "bin"


def use(folder: Path, wheel: Path, version: str) -> None:
    """The walk of docs/first-run.md, in a folder with nothing in it."""
    place = folder / "empty"
    place.mkdir(parents=True)
    command = environment(folder / "environment", [wheel, f"trl=={version}"]) / "trl-klx"
    timed("trl-klx --version", [command, "--version"], place)
    timed("trl-klx recipes", [command, "recipes"], place)
    timed("trl-klx starter", [command, "starter"], place)
    for algorithm in ("grpo", "ppo", "dpo"):
        model = ["--model_name_or_path", "runs/starter/model", "--to", algorithm]
        timed(f"trl-klx new {algorithm}", [command, "new", algorithm, *model], place)
        run = [command, algorithm, "--config", f"{algorithm}/{algorithm}.yaml", *SHORT]
        timed(f"dry run of {algorithm}", [*run, "--dry_run"], place)
        timed(f"two steps of {algorithm}", run, place)


def timed(what: str, command: list, folder: Path) -> None:
    """Run a command in a folder, without the checkout on its path."""
    start = time.monotonic()
    lent = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=lent, text=True, capture_output=True)
    print(f"  {what}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{what} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
