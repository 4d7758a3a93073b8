"""The parts of a recipe: dataset and rewards, the config of the trainer, and how the model is loaded."""

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
        default=None, metadata={"help": "Accelerate file whose layout a dry run plans for (`trl-klx` starts it)."}
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


def starts_no_process(accelerate_config: str) -> str:
    """The sentence about an accelerate file that is given where it has no effect."""
    return (
        f"accelerate_config={accelerate_config!r} starts processes only on the command line of `trl-klx`, or as "
        "`accelerate launch --config_file`: give it there, or plan for it by --dry_run."
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
