"""The parts of a recipe: dataset and rewards, the config of the trainer, and how the model is loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl import ModelConfig, ScriptArguments


class BadInput(ValueError):
    """Something the user gave cannot work. The message is one sentence that names the field, value and remedy."""


@dataclass
class RunArguments(ScriptArguments):
    """What TRL's scripts take, with rewards by name."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, as module.function or path/to/file.py:function, for example "
            "trl_klx.rewards.exact_match; or TRL's own by name: accuracy_reward, reasoning_accuracy_reward, "
            "think_format_reward, get_soft_overlong_punishment (of 1280 tokens, from 1024 on)."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model with one output, before reward_funcs. PPO: reward_model_path."}
    )
    datasets: list[dict] | None = field(
        default=None,
        metadata={
            "help": "A mixture in place of dataset_name, as in TRL (YAML only): a list of path (a file, a folder or a "
            "dataset on the Hub), name, data_dir, data_files, split, columns and fraction."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Whether the datasets of a mixture are read as streams."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of a mixture's rows, between 0 and 1, that makes the split test."}
    )
    gold_reward_func: str | None = field(
        default=None,
        metadata={
            "help": "A better measure of what the reward stands for: a function that scores evaluations and is never "
            "trained on. GRPO and PPO follow it against the KL; gold_action decides what happens when it has turned."
        },
    )
    dataset_prepare: str | None = field(
        default=None,
        metadata={
            "help": "Function of a dataset's row, named like a reward, whose result takes the row's place, for example "
            "trl_klx.tasks.gsm8k.gsm8k_prompts."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: print the resolved configuration, parameter counts, a memory estimate, the "
            "gradient and every problem found. Exit status 1 where there are problems."
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Accelerate file, or the name of a shipped one, by which `trl-klx` starts processes and a dry run "
            "plans."
        },
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "How many processes `trl-klx` starts. Default: those of accelerate_config."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # YAML with one name and no brackets
            self.reward_funcs = [self.reward_funcs]

    @property
    def dataset_names(self) -> list[str]:
        """The datasets that are named, alone or in a mixture."""
        if self.datasets is not None:
            return [str(entry.get("path")) for entry in self.datasets]
        return [] if self.dataset_name is None else [self.dataset_name]

    @property
    def data_is_local(self) -> bool:
        """Whether all data that is named lies on this machine."""
        return all(Path(name).exists() for name in self.dataset_names)


class Recipe(NamedTuple):
    """A parsed recipe: dataset and rewards, the config of the trainer, and how the model is loaded."""

    run: RunArguments
    args: Any  # KLXGRPOConfig, KLXPPOConfig or KLXDPOConfig
    model: ModelConfig


def check_processes(run: RunArguments, *, launched: bool) -> None:
    """Compare what the recipe says about processes with those that there are; `launched` by `trl-klx`.

    Raises:
        BadInput: they differ, or an accelerate file has no effect.
    """
    if run.accelerate_config is not None and not launched:
        raise BadInput(
            f"accelerate_config={run.accelerate_config!r} starts processes only by the command `trl-klx`, or as "
            "`accelerate launch --config_file`: give it there, or plan for it by --dry_run."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if run.num_processes not in (None, started):
        raise BadInput(other_number(run.num_processes, started))


def other_number(wanted: int | None, started: int) -> str:
    """The sentence about a number of processes that is not that of the recipe."""
    return (
        f"num_processes={wanted}, and there would be {started}: start them by the command `trl-klx`, on as many GPUs; "
        "on a CPU by an accelerate_config with distributed_type: MULTI_GPU and use_cpu: true."
    )


class Findings:
    """What becomes of a problem: it is raised, or kept among the `sentences`."""

    def __init__(self, *, stops: bool) -> None:
        self.stops = stops
        self.sentences: list[str] = []

    def ask(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a check that raises ValueError; None where it complained and the reading continues."""
        try:
            return check(*args, **kwargs)
        except ValueError as error:
            if self.stops:
                raise
            self.add(str(error))
            return None

    def add(self, sentence: str) -> None:
        if self.stops:
            raise BadInput(sentence)
        if sentence not in self.sentences:
            self.sentences.append(sentence)
