"""The hooks of `transformers.Trainer` that all our trainers share: beta moves after each step, the KL is logged."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy

from ..checkpoints.own_folders import discard
from ..checkpoints.pushes import HubPushes
from ..checkpoints.resumed_run import ResumedRun
from ..checkpoints.whole import read_state, unreadable
from ..checks.noise import settle_noise
from ..checks.trainable import check_trainable
from ..reference.resumed import ResumedReference
from ..session.applied import KL_IN_LOSS, KL_IN_REWARD, KL_MEASURED, STEP_ENDED, AppliedKLCheck
from ..session.session import KLControl
from .health import health_callback
from .step_guard import LOSS, GuardedSteps, drop_non_finite


class KLControlledTrainer(GuardedSteps, ResumedRun, ResumedReference, HubPushes):
    """The hooks of `transformers.Trainer` that carry a `KLControl`. Mix in before the trainer class.

    The trainer sets `self.kl` and `self.guard`, and its loss reads beta from a `KLCoefficient`.
    """

    kl: KLControl
    args: Any
    _eval_prefix = "eval"  # of the evaluation that runs
    _saves_for_budget = False  # whether the budget asks for a checkpoint of this step
    overoptimisation: Any = None  # the monitor of a gold reward, in trainers that take one
    _metrics: dict[str, defaultdict[str, list[float]]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.kl.check_args(self.args if self.given_args is None else self.given_args)
        check_trainable(self._saved_model, self.optimizer)
        settle_noise(self._saved_model, self.args)
        self.kl.restart()
        self.guard.restart()
        self.remove_callback(AppliedKLCheck)
        self.add_callback(AppliedKLCheck(self, self._wanted_kl()))
        result = super().train(*args, **kwargs)
        self._check_weights(f"after step {self.state.global_step}")  # the last step's, which no step looks at
        return result

    def _is_over(self) -> bool:
        return self.kl.budget.ends_run or super()._is_over()

    def _wanted_kl(self) -> set[str]:
        """Which parts of the KL every step has to come by."""
        wanted = {STEP_ENDED} | ({KL_MEASURED} if self.args.kl_is_measured else set())
        if not self.args.kl_is_penalised:
            return wanted
        term = self.args.kl_term()
        return wanted | ({KL_IN_LOSS} if term.in_loss else set()) | ({KL_IN_REWARD} if term.in_reward else set())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kl.start(self.state.max_steps)
        loss = super().training_step(*args, **kwargs)
        self.guard.watch(LOSS, loss)
        if self.accelerator.sync_gradients:
            self._end_kl_step()
        return loss

    def _end_kl_step(self) -> None:
        """Move beta by the KL that the step measured, and end the run where the budget says so."""
        self.kl.reached.add(STEP_ENDED)
        for name, value in self.kl.step().items():
            self._metrics["train"][name].append(value)
        drop_non_finite(self._metrics["train"])
        for folder in self.kl.budget.superseded:
            if self.args.should_save:
                discard(Path(folder), Path(self.args.output_dir))
        self.kl.budget.superseded.clear()
        self._saves_for_budget = self.kl.budget.ends_run or self.kl.budget.checkpoint_is_due()
        self.control.should_save |= self._saves_for_budget
        self.control.should_training_stop |= self.kl.budget.ends_run

    def _wrote_checkpoint(self, folder: Path) -> None:
        super()._wrote_checkpoint(folder)
        every = self.state.save_steps if self.args.save_strategy == SaveStrategy.STEPS else 0
        is_regular = every > 0 and self.state.global_step % every == 0
        self.kl.budget.wrote(folder, extra=self._saves_for_budget and not is_regular)

    def _kept_checkpoints(self) -> set[Path]:
        kept = self.kl.budget.checkpoint
        return super()._kept_checkpoints() | ({Path(kept)} if kept else set())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        # Of several datasets, transformers evaluates each under a prefix of its own.
        self._eval_prefix = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        if prefix not in ("", "eval_"):  # TRL knows eval_ alone: one dataset's numbers would replace another's
            drop_non_finite(self._metrics[mode])
            logs.update({f"{prefix}{name}": sum(values) / len(values) for name, values in self._metrics[mode].items()})
            self._metrics[mode].clear()
        metrics = self.kl.metrics(mode)
        logs.update({f"{prefix}{name}": value for name, value in metrics.items()})
        if mode == "train" and self.args.kl_health:
            logs.update(self._health_metrics())
        super().log(logs, *args, **kwargs)

    def _health_metrics(self) -> dict[str, float]:
        """What health alarms need and nothing else logs, since the last call. Called on every process."""
        return {}

    def _watch_health(self, policy: nn.Module, **sources: Any) -> None:
        """Add the health alarms, once the trainer is set up; see `health_callback`."""
        if self.args.kl_health:
            # The first of the callbacks, so that those that write metrics get its own.
            self.callback_handler.callbacks.insert(0, health_callback(self, self.args, policy, **sources))

    def _checkpoint_state(self) -> dict[str, Any]:
        return {**super()._checkpoint_state(), **self.kl.state(), "skipped_steps": self.guard.skipped}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        super()._load_checkpoint_state(state)
        self.guard.restart(int(state.get("skipped_steps", 0)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()  # the last good checkpoint must stay the last
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.kl.start(self.state.max_steps)
            self.kl.load(checkpoint, self._run_of(checkpoint))
            try:
                self._load_checkpoint_state(read_state(checkpoint))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise unreadable(checkpoint, str(error)) from error
            self._take_reference(checkpoint)
            self.kl.budget.judge()
