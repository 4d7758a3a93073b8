"""The command `trl-klx`. Thin: every subcommand is a function elsewhere."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

USAGE = """\
usage: trl-klx COMMAND [options]

  starter   make a small, really trained model, its data and its reward (about 20 s on two cores)
  stories   fetch a 15-million-parameter model of children's stories, and make prompts for it (about two minutes)
  grpo      train with GRPO, on prompts and reward functions
  ppo       train with PPO, on prompts and reward functions or a reward model (TRL 1.12 only)
  dpo       train with DPO, on pairs of chosen and rejected answers
  measure   compare checkpoints with a reference on given responses, token by token

Training: trl-klx grpo --config RECIPE.yaml [--accelerate_config cpu] [--field value ...], and ppo and dpo alike.
`trl-klx COMMAND --help` says what a command takes.
"""
_ALGORITHMS = ("grpo", "ppo", "dpo")
_LAUNCHED = {**{name: f"trl_klx.run.{name}" for name in _ALGORITHMS}, "measure": "trl_klx.analysis.command"}
_ACCELERATE_CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command == "starter":
        from .starter import main as starter

        return starter(rest)
    if command == "stories":
        from .stories import main as stories

        return stories(rest)
    if command in _LAUNCHED:
        return _launch(command, rest)
    known = ", ".join(("starter", "stories", *_LAUNCHED))
    print(f"error: the command {command!r} does not exist: use {known}.", file=sys.stderr)
    return 2


def _launch(command: str, argv: list[str]) -> int:
    """Train or measure in this process, or under `accelerate launch` where --accelerate_config asks for it."""
    if "--accelerate_config" not in argv:
        return import_module(_LAUNCHED[command]).main(argv, program=f"trl-klx {command}")
    position = argv.index("--accelerate_config")
    name = (argv[position + 1 : position + 2] or [""])[0]
    config = _accelerate_config(name)
    if config is None:
        known = ", ".join(sorted(path.stem for path in _ACCELERATE_CONFIGS.glob("*.yaml")))
        print(f"error: --accelerate_config {name} is neither a file nor one of {known}.", file=sys.stderr)
        return 2
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    rest = argv[:position] + argv[position + 2 :]
    return subprocess.call([*launch, "-m", _LAUNCHED[command], *rest])


def _accelerate_config(name: str) -> Path | None:
    for path in (Path(name), _ACCELERATE_CONFIGS / f"{name}.yaml"):
        if name and path.is_file():
            return path
    return None


if __name__ == "__main__":
    sys.exit(main())
