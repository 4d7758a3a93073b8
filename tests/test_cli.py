"""The command line: every command explains itself, at once where it can, and a shell completes it."""

import platform
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import shtab
import trl

import trl_klx
from trl_klx import KLXDPOConfig, KLXGRPOConfig, KLXPPOConfig
from trl_klx.cli import commands as cli
from trl_klx.cli.commands import COMMANDS
from trl_klx.config import KLArguments
from trl_klx.recipe_files import RECIPES
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


@pytest.mark.situation("asks for the version", "right")
def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"trl_klx {trl_klx.__version__} (Python {platform.python_version()}, trl {trl.__version__}, "
    )
    assert f"torch {metadata.version('torch')}" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("module", ["trl_klx", "trl_klx.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['x', '--version']\ntry: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or bool({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.situation("gives a training command nothing", "refused")
@pytest.mark.parametrize(("name", "wanted"), [("grpo", "--reward_funcs"), ("ppo", "--reward_funcs"), ("dpo", "")])
def test_a_training_command_says_what_to_give(
    name: str, wanted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "import_module", lambda module: pytest.fail(f"{module} was imported"))
    assert cli.main([name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: trl-klx {name} needs a recipe, --config RECIPE.yaml")
    assert wanted in line
    assert ("--reward_funcs" in line) == (name != "dpo")


@pytest.mark.situation("looks for a recipe to start from", "right")
def test_shipped_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out.splitlines()
    for path in RECIPES.glob("*/[gpd]*o_*.yaml"):
        where = shown.index(f"recipes/{path.parent.name}/{path.name}")
        assert shown[where + 1].startswith("    ")
        assert shown[where + 1].endswith("?")
        assert "# " not in shown[where + 1]
    assert not any("accelerate" in line for line in shown)


@pytest.mark.situation("copies a recipe of the package to change it", "right")
@pytest.mark.parametrize("name", ["starter/grpo_k2_loss", "recipes/starter/grpo_k2_loss.yaml", "grpo_k2_loss"])
@pytest.mark.parametrize("to", [None, "mine.yaml", "folder"])
def test_a_recipe_is_copied(
    name: str, to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    words = ["recipes", name, *([] if to is None else ["--to", to])]
    assert cli.main(words) == 0
    copy = Path("folder/grpo_k2_loss.yaml") if to == "folder" else Path(to or "grpo_k2_loss.yaml")
    assert copy.read_text() == (RECIPES / "starter" / "grpo_k2_loss.yaml").read_text()
    assert f"`trl-klx grpo --config {copy}`" in capsys.readouterr().out
    assert cli.main(words) == 2
    assert f"error: {copy} exists: name another file by --to" in capsys.readouterr().err


@pytest.mark.situation("asks for a recipe that is not there, or that is there twice", "refused")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["starter/none"], "the recipe starter/none does not exist: `trl-klx recipes` lists those that do."),
        (["accelerate/cpu"], "the recipe accelerate/cpu does not exist"),
        (["dpo_exact_loss"], "is one of several, "),
        (["--to", "x"], "name the recipe to copy, too"),
        (
            ["grpo_k2_loss", "--to", "no/folder/x.yaml"],
            "no/folder/x.yaml cannot be written (No such file or directory)",
        ),
    ],
)
def test_recipes_that_cannot_be_copied(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", *words]) == 2
    assert sentence in capsys.readouterr().err


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
