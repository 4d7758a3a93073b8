"""What a machine with torch, transformers and accelerate alone lacks: gathered here as wheels, installed there."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from gpu_check import ROOT

# Of pure Python or with wheels for every platform; in the versions that are installed here.
PACKAGES = (
    *("trl", "datasets", "dill", "multiprocess", "xxhash", "shtab", "peft", "transformers", "accelerate"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("hjson", "msgpack", "py-cpuinfo", "einops", "hypothesis", "sortedcontainers", "pytest-xdist", "execnet"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
OTHER = "other_trl"  # the folder below, of another TRL


def prepare(folder: Path, *, python: str, platforms: list[str], extra: list[str], other_trl: str | None) -> None:
    """Fill `folder` with wheels for a Python version such as 3.12; our own and DeepSpeed's are built."""
    folder.mkdir(parents=True, exist_ok=True)
    for_it = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    for_it += [part for platform in platforms for part in ("--platform", platform)]
    pinned = [f"{name}=={version(name)}" for name in PACKAGES if _is_installed(name)]
    _pip("download", "--no-deps", *for_it, "-d", str(folder), *pinned, *extra)
    if other_trl is not None:
        _pip("download", "--no-deps", "-d", str(folder / OTHER), f"trl=={other_trl}")
    if _is_installed("deepspeed") and not list(folder.glob("deepspeed-*.whl")):
        built = ["--no-build-isolation", "-w", str(folder), f"deepspeed=={version('deepspeed')}"]
        _pip("wheel", "--no-deps", *built)  # published as source only; it compiles nothing until it is used
    for old in folder.glob("trl_klx-*.whl"):
        old.unlink()
    _pip("wheel", "--no-deps", "-w", str(folder), str(ROOT))
    size = sum(path.stat().st_size for path in folder.rglob("*.whl")) / 2**20
    print(f"{len(list(folder.rglob('*.whl')))} wheels, {size:.1f} MiB in {folder}")


def install(folder: Path, target: Path) -> tuple[Path, Path | None]:
    """Install the wheels below `target`, where nothing else is; the folders for the path, of all and of another TRL."""
    site, other = target / "site", target / OTHER
    _install(folder, site)
    if not list((folder / OTHER).glob("*.whl")):
        return site, None
    _install(folder / OTHER, other)
    return site, other


def _install(folder: Path, target: Path) -> None:
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target)]
    _pip("install", *options, *map(str, sorted(folder.glob("*.whl"))))


def _pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments], check=True)


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True
