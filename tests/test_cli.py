"""The command line: every command explains itself, at once where it can, and a shell completes it."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import shtab

from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXPPOConfig
from trl_klx.cli import commands as cli
from trl_klx.cli.commands import COMMANDS
from trl_klx.config import KLArguments
from trl_klx.run.recipe.help import help_parser


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = import_module(COMMANDS[name].module).command_parser(f"trl-klx {name}")
    try:
        status = cli.main([name, "--help"])
    except SystemExit as left:
        status = int(left.code or 0)
    shown = capsys.readouterr().out
    assert status == 0
    assert shown.startswith(f"usage: trl-klx {name} ")
    assert all(action.help for action in parser._actions if action.help != "==SUPPRESS==" and action.option_strings)


def test_help_of_training_begins_with_the_kl(capsys: pytest.CaptureFixture[str]) -> None:
    """The fields of a KL among transformers' two hundred would not be found."""
    assert cli.main(["grpo", "--help"]) == 0
    shown = capsys.readouterr().out
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        *("options", "KL (trl_klx)", "data, rewards and run", "model", "GRPO (TRL)", "training (transformers)")
    ]
    ours = shown.split("KL (trl_klx):")[1].split("data, rewards and run:")[0]
    assert all(f"--{name} " in ours for name in KLArguments.__dataclass_fields__)
    assert "--kl-target" not in shown  # one spelling is enough to read
    assert "--learning_rate" in shown.split("training (transformers):")[1]
    assert "--num_generations" in shown.split("GRPO (TRL):")[1].split("training (")[0]


@pytest.mark.parametrize(
    ("config", "heading"), [(KLXGRPOConfig, "GRPO (TRL)"), (KLXDPOConfig, "DPO (TRL)"), (KLXPPOConfig, "PPO")]
)
def test_help_shows_every_field_once(config: type, heading: str) -> None:
    parser = help_parser("trl-klx", config)
    shown = [action for group in parser._action_groups for action in group._group_actions]
    assert sorted(map(id, shown)) == sorted(map(id, parser._actions))
    known = config.__dataclass_fields__  # type: ignore[attr-defined]
    assert set(known) - {action.dest for action in shown} == {name for name, f in known.items() if not f.init}
    [own] = [group for group in parser._action_groups if group.title == heading]
    beta = "kl_coef" if heading == "PPO" else "beta"
    assert beta in {action.dest for action in own._group_actions}


@pytest.mark.parametrize("name", ["--help", "starter", "controllers"])
def test_help_that_needs_no_torch_loads_none(name: str) -> None:
    arguments = ["--help"] if name == "--help" else [name, "--help"]
    code = (
        "import sys, contextlib; from trl_klx import cli\n"
        f"with contextlib.suppress(SystemExit): cli.main({arguments})\n"
        "sys.exit(bool({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "trl-klx"
    with path.open("w") as script:
        subprocess.run([sys.executable, "-m", "trl_klx.cli", "completion", "bash"], stdout=script, check=True)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["con"], "controllers"),
        (["grpo", "--kl_est"], "--kl_estimator"),
        (["dpo", "--kl_probe_s"], "--kl_probe_steps"),
        (["controllers", "--kl_controller", "ad"], "adaptive"),
        (["measure", "--sampled"], "--sampled_from"),
        (["completion", "zs"], "zsh"),
    ],
)
def test_bash_completes_commands_options_and_choices(words: list[str], expected: str, bash_script: Path) -> None:
    """As bash does it: the function that the script registers, called with the words so far."""
    line = " ".join(["trl-klx", *words])
    commands = f"""
        source {bash_script}
        COMP_WORDS=({line}); COMP_CWORD={len(words)}
        $(complete -p trl-klx | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2>/dev/null
        echo "${{COMPREPLY[@]}}"
    """
    found = subprocess.run(["bash", "-c", commands], capture_output=True, text=True)
    assert expected in found.stdout.split()


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_every_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "kl_estimator" in shown


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "cmd"]) == 2
    assert "invalid choice: 'cmd'" in capsys.readouterr().err
