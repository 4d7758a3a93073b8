"""A resumed run does nothing a second time: no step beyond its end, and no evaluation of a start that is long past."""

from typing import Any

from accelerate.logging import get_logger

from .whole import WholeCheckpoints

logger = get_logger(__name__)


class ResumedRun(WholeCheckpoints):
    """The hooks of `transformers.Trainer` that leave out what a run did before its checkpoint."""

    def _is_over(self) -> bool:
        """Whether the run ends where it is now."""
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks for the end of a run after each step only: resumed there, it would take one more.
        if self._is_over():
            logger.warning(f"The run had ended at step {self.state.global_step}: nothing is left to train.")
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _knows_its_start(self) -> bool:
        """Whether `eval_on_start` has nothing to measure any more."""
        return self.state.global_step > 0

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Only `eval_on_start` skips the scheduler. Its answers would be others, and those of the checkpoint's policy.
        if skip_scheduler and self._knows_its_start():
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
