"""What users give as recipes and data: documented snippets, mappings, rows that no model can read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PAGES, ROOT, fenced
from packaging.version import Version

from trl_klx import KLXDPOConfig, KLXGRPOConfig
from trl_klx.run.arguments import BadInput, parse_recipe
from trl_klx.trainers.trl_compat import TRL_VERSION

HAS_PPO = Version("1.13") > TRL_VERSION
needs_ppo = pytest.mark.skipif(not HAS_PPO, reason="TRL has PPO up to 1.12")
QUIET = {"output_dir": "runs/x", "use_cpu": True, "bf16": False, "report_to": []}
GROUPS = {"beta": 0.1, "kl_controller": "pid", "kl_group_column": "task", "kl_target": 1.0}


def parsed(tmp_path: Path, fields: dict[str, Any], *words: str, config: type = KLXGRPOConfig) -> Any:
    """The config of a recipe with these fields and these words on the command line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**QUIET, **fields}))
    return parse_recipe("grpo", config, ["--config", str(path), *words]).args


# Recipes

SNIPPETS = [(page, text) for page in PAGES for text in fenced(page, "yaml")]


@pytest.mark.situation("copies a recipe out of the documentation", "right")
@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[p.relative_to(ROOT).as_posix() for p, _ in SNIPPETS])
def test_snippets_of_the_docs_are_recipes(page: Path, text: str, tmp_path: Path) -> None:
    fields = yaml.safe_load(text)
    args = parsed(tmp_path, fields)
    for name, value in fields.items():
        assert getattr(args, name) == value, name


@pytest.mark.situation("gives the groups' targets as a mapping in YAML", "right")
def test_targets_by_group_as_a_mapping(tmp_path: Path) -> None:
    args = parsed(tmp_path, {**GROUPS, "kl_group_targets": {"math": 2, "chat": 0.5}})
    assert args.kl_group_targets == {"math": 2.0, "chat": 0.5}
    assert args.kl_target_of("chat") == 0.5


MAPPINGS = [
    ("kl_group_targets", {"math": 2.0}),
    ("model_init_kwargs", {"dtype": "float32"}),
    ("generation_kwargs", {"top_k": 5}),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("lr_scheduler_kwargs", {"num_cycles": 2}),
    ("liger_kernel_config", {"rope": True}),
    ("gradient_checkpointing_kwargs", {"use_reentrant": False}),
]


@pytest.mark.situation("gives an option that is a mapping, in YAML or as JSON", "right")
@pytest.mark.parametrize(("name", "value"), MAPPINGS, ids=[name for name, _ in MAPPINGS])
@pytest.mark.parametrize("on_command_line", [False, True], ids=["yaml", "json"])
def test_mappings(name: str, value: dict, on_command_line: bool, tmp_path: Path) -> None:
    words = [f"--{name}", " " + json.dumps(value)] if on_command_line else []
    args = parsed(tmp_path, GROUPS if words else {**GROUPS, name: value}, *words)
    assert getattr(args, name) == value


@pytest.mark.situation("gives an option that is a mapping as something else", "refused")
@pytest.mark.parametrize("config", [KLXGRPOConfig, KLXDPOConfig])
@pytest.mark.parametrize("given", ["dtype: float32", "[1]", '{"dtype": ', 3, ["dtype"]])
def test_no_mapping(given: Any, config: type, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model_init_kwargs=.* (is no JSON|must be a mapping)"):
        parsed(tmp_path, {"model_init_kwargs": given}, config=config)


@pytest.mark.situation("gives a mapping for an option that is a plain value", "refused")
@pytest.mark.parametrize("name", ["beta", "dataset_config", "accelerate_config"])
def test_mapping_for_a_plain_value(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{name} must be a plain value, not a mapping"):
        parsed(tmp_path, {name: {"start": 0.1}})
