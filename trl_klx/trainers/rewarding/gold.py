"""A gold reward beside the one that is trained on: scored in evaluation only, on the answers that it samples anyway."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...config.choices import unknown
from ...monitor.overoptimisation.monitor import OveroptimisationMonitor
from ..checkpoints.resumed_run import ResumedRun
from ..errors import RunError
from ..session.prompts import prompt_numbers

if TYPE_CHECKING:
    from ...config.options import KLArguments
    from ..session.session import KLControl

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


class GoldWatch(ResumedRun):
    """The hooks of `transformers.Trainer` that follow a gold reward.

    Mix in between `KLControlledTrainer`, whose logs of the KL it reads, and the trainer class.

    Attributes:
        overoptimisation: the monitor of the run; None without a gold reward.
    """

    overoptimisation: OveroptimisationMonitor | None
    gold_reward_func: Callable[..., Any] | None = None
    reward_func_names: list[str]
    kl: "KLControl"
    _eval_prefix: str

    def _watch_gold(self, gold_reward_func: Callable[..., Any] | None) -> None:
        """Follow it. Call at the end of `__init__`; the function has passed `check_gold_reward`."""
        if gold_reward_func is None:
            return
        if isinstance(self.eval_dataset, dict):
            raise ValueError(
                f"eval_dataset holds {len(self.eval_dataset)} datasets and gold_reward_func is followed on one: give "
                "one dataset."
            )
        if GOLD in self.reward_func_names:
            raise ValueError(f"a reward function is called {GOLD!r}, as the gold reward is in the logs: rename it.")
        # transformers sets "loss" where nobody chose; the loss of reinforcement learning says nothing about a model.
        if self.args.metric_for_best_model in (None, "loss"):
            self.args.metric_for_best_model, self.args.greater_is_better = METRIC, True
        self.gold_reward_func = gold_reward_func
        self.overoptimisation = OveroptimisationMonitor(self.args.gold_action)
        self.add_callback(self.overoptimisation)

    def _measure_gold(self, prompts: list, proxy: Tensor, gold: Tensor) -> None:
        """Add the answers of an evaluation batch: this process's prompts, and the (B,) rewards of all processes."""
        if self.overoptimisation is not None:
            numbers = prompt_numbers(prompts, self.accelerator.device)
            self.overoptimisation.measure(self.accelerator.gather(numbers), proxy, gold)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.overoptimisation is not None:
            self.overoptimisation.restart()
        return super().train(*args, **kwargs)

    def _knows_its_start(self) -> bool:
        # A checkpoint of a run without a gold reward holds no evaluation: the curve begins where it is.
        return super()._knows_its_start() and (self.overoptimisation is None or bool(self.overoptimisation.evaluations))

    def _is_over(self) -> bool:
        return (self.overoptimisation is not None and self.overoptimisation.ends_run) or super()._is_over()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.overoptimisation is not None and self.overoptimisation.is_measuring:
            prefix = self._eval_prefix
            # Evaluation of another dataset, under another name, is no point of the run's curve.
            kl = logs.get("eval_kl/sequence") if "eval_runtime" in logs else None
            numbers = self.overoptimisation.end_evaluation(self.state.global_step, kl, logs.get("eval_kl/sequence_se"))
            if f"rewards/{GOLD}/mean" not in numbers:
                raise RunError(
                    f"at step {self.state.global_step} gold_reward_func gave no answer of the evaluation a finite "
                    "reward: look at what it returns, and resume from the last checkpoint."
                )
            self._set_budget()
            logs.update({f"{prefix}_{name}": value for name, value in numbers.items()})
        super().log(logs, *args, **kwargs)

    def _set_budget(self) -> None:
        """With `kl_budget: auto`, take the safe budget as soon as the evaluations show it, and follow its estimate."""
        budget = None if self.overoptimisation is None else self.overoptimisation.safe_budget
        if self.args.kl_budget == "auto" and budget is not None:
            self.kl.budget.set_limit(budget)

    def _checkpoint_state(self) -> dict[str, Any]:
        followed = {} if self.overoptimisation is None else {"overoptimisation": self.overoptimisation.state_dict()}
        return {**super()._checkpoint_state(), **followed}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        super()._load_checkpoint_state(state)
        if self.overoptimisation is not None and "overoptimisation" in state:
            self.overoptimisation.load_state_dict(state["overoptimisation"])
            self._set_budget()
