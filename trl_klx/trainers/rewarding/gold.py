"""A gold reward beside the one that is trained on: scored in evaluation only, on the answers that it samples anyway."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...config.choices import unknown
from ...monitor.overoptimisation.monitor import OveroptimisationMonitor
from ..errors import RunError
from ..parts import Part
from ..session.prompts import prompt_numbers

if TYPE_CHECKING:
    from ...config.options import KLArguments

GOLD = "gold"  # of the gold reward among the metrics
METRIC = f"eval_rewards/{GOLD}/mean"
ACTIONS = ("warn", "stop")


@dataclass
class GoldArguments:
    """What a run does when its gold reward has turned. Mixed into the configs of the trainers that sample answers."""

    gold_action: str = field(
        default="warn",
        metadata={
            "help": "When the gold reward (gold_reward_func) is below its best by more than chance: warn or stop."
        },
    )

    def check_gold(self) -> None:
        """Raises ValueError with one sentence."""
        if self.gold_action not in ACTIONS:
            raise ValueError(unknown("gold_action", self.gold_action, ACTIONS))


def check_gold_reward(args: Any, gold_reward_func: Any) -> None:
    """Refuse a gold reward that could not be followed, before a model is loaded. Raises ValueError."""
    config: KLArguments = args
    if gold_reward_func is None:
        if config.kl_budget == "auto":
            raise ValueError(
                "kl_budget='auto' is half the KL at which a gold reward peaks and there is none: set gold_reward_func, "
                "or give kl_budget in nats per sequence."
            )
        if args.gold_action != "warn":
            raise ValueError(
                f"gold_action={args.gold_action!r} has no effect without a gold reward: set gold_reward_func, or "
                "remove it."
            )
        return
    is_function = callable(gold_reward_func) and not isinstance(gold_reward_func, nn.Module)
    if not is_function or inspect.iscoroutinefunction(gold_reward_func):
        raise ValueError(
            f"gold_reward_func={gold_reward_func!r} must be one plain function, called as a reward function: wrap a "
            "model, a coroutine or several functions in one."
        )
    if config.kl_origin is False:
        raise ValueError(
            "gold_reward_func is followed against the KL to the start, which kl_origin=false does not measure: remove "
            "kl_origin."
        )
    if not config.kl_is_measured:
        raise ValueError(
            f"gold_reward_func is followed against the KL, which is not measured at {config.kl_coef_name}=0: measure "
            f"it by kl_placement='none', or give {config.kl_coef_name} a positive value."
        )
    if args.eval_strategy == "no":
        raise ValueError(
            "gold_reward_func is read in evaluation only and eval_strategy='no': set eval_strategy='steps' with "
            "eval_steps, and eval_on_start=true for the start."
        )


class GoldWatch(Part):
    """Follows a gold reward: `monitor` knows where it is best, and may set the budget of the KL.

    Args:
        trainer: the trainer, with its `kl`.
        reward: the gold reward, which has passed `check_gold_reward`.

    Raises:
        ValueError: it cannot be followed in this trainer's evaluations.
    """

    def __init__(self, trainer: Any, reward: Callable[..., Any]) -> None:
        args, datasets = trainer.args, trainer.eval_dataset
        if isinstance(datasets, dict):
            raise ValueError(
                f"eval_dataset holds {len(datasets)} datasets and gold_reward_func is followed on one: give one "
                "dataset."
            )
        if GOLD in trainer.reward_func_names:
            raise ValueError(f"a reward function is called {GOLD!r}, as the gold reward is in the logs: rename it.")
        # transformers sets "loss" where nobody chose; the loss of reinforcement learning does not rank models.
        if args.metric_for_best_model in (None, "loss"):
            args.metric_for_best_model, args.greater_is_better = METRIC, True
        self._trainer, self.reward = trainer, reward
        self.monitor = OveroptimisationMonitor(args.gold_action)
        trainer.add_callback(self.monitor)

    def measure(self, prompts: list, proxy: Tensor, gold: Tensor) -> None:
        """Add the answers of an evaluation batch: this process's prompts, and the (B,) rewards of all processes."""
        accelerator = self._trainer.accelerator
        self.monitor.measure(accelerator.gather(prompt_numbers(prompts, accelerator.device)), proxy, gold)

    def begin(self) -> None:
        self.monitor.restart()

    def is_over(self) -> bool:
        return self.monitor.ends_run

    def log(self, mode: str, found: dict[str, float], evaluation: str | None) -> dict[str, float]:
        if not self.monitor.is_measuring:
            return {}
        # Evaluation of another dataset, under another name, is not a point of the run's curve.
        name = "kl/origin" if "kl/origin" in found else "kl/sequence"
        kl = found.get(name) if evaluation == "eval" else None
        step = self._trainer.state.global_step
        numbers = self.monitor.end_evaluation(step, kl, found.get(f"{name}_se"))
        if f"rewards/{GOLD}/mean" not in numbers:
            raise RunError(
                f"at step {step} gold_reward_func gave no answer of the evaluation a finite reward: look at what it "
                "returns, and resume from the last checkpoint."
            )
        self._set_budget()
        return numbers

    def _set_budget(self) -> None:
        """With `kl_budget: auto`, take the safe budget as soon as the evaluations show it, and follow its estimate."""
        if self._trainer.args.kl_budget == "auto" and self.monitor.safe_budget is not None:
            self._trainer.kl.budget.set_limit(self.monitor.safe_budget)

    def state(self) -> dict[str, Any]:
        return {"overoptimisation": self.monitor.state_dict()}

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        if "overoptimisation" in state:
            self.monitor.load_state_dict(state["overoptimisation"])
            self._set_budget()
