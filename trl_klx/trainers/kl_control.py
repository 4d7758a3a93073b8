"""What all trainers share: measuring the KL, steering beta with it, logging it and saving the controller's state."""

import math
import os
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from ..config import KLArguments
from ..control import KINDS, Controller, make_controller
from ..kl import effective_sample_size
from ..monitor.moments import KLSummary, prompt_moments, sequence_count, sequence_rows, summarise
from .checkpoints import (
    STATE_FILE,
    WholeCheckpoints,
    read_state,
    unreadable,
    write_state,
)
from .step_guard import LOSS, GuardedSteps, drop_non_finite

logger = get_logger(__name__)

_BUDGET_DECAY = 0.8  # the budget is compared with a mean over about five batches


class KLControl:
    """Beta, its controller and the statistics of one run. The same on every process.

    One row per sequence is gathered from all processes once per optimizer step and summed in one order, so that beta is
    the same to the last bit everywhere.

    Args:
        args: the KL arguments of the trainer's config, already checked.
        accelerator: for gathering.
    """

    def __init__(self, args: KLArguments, accelerator: Accelerator) -> None:
        self._args, self._accelerator = args, accelerator
        self.names = args.kl_logged_estimators
        # Rows of this process: of this optimizer step, or of this evaluation.
        self._window: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._pool: Tensor | None = None  # all processes, since the last log
        self._controller: Controller | None = None
        self.restart()

    def start(self, total_steps: int) -> None:
        """Build the controller, once the length of the run is known: `total_steps`, the optimizer steps of a schedule.

        Does nothing when it was built before, by a resumed checkpoint say.
        """
        if self._controller is not None:
            return
        settings = dict(self._args.kl_controller_settings)
        if self._args.kl_controller in ("linear", "cosine"):
            settings["total"] = total_steps
        self._controller = make_controller(self._args.kl_controller, self.coef, **settings)

    def restart(self) -> None:
        """Begin a run: whatever an earlier call of `train` left, learning rate and beta start anew."""
        self.coef = self._args.kl_coef_start if self._args.kl_is_penalised else 0.0
        self.over_budget, self._controller = False, None
        self._budget_sum, self._budget_weight = 0.0, 0.0

    def measure(self, mode: str, values: dict[str, Tensor], mask: Tensor, prompts: Tensor) -> None:
        """Add a batch of per-token KL values, (B, T) by estimator name, to the statistics of `mode` (train or eval).

        `prompts`, (B,), are integers, equal for the answers to one prompt, on whatever process they are.
        """
        self._window[mode].append(sequence_rows({name: values[name] for name in self.names}, mask, prompts))

    def step(self) -> dict[str, float]:
        """End an optimizer step: gather its KL, move beta. Returns the step's metrics; call on every process.

        Without a measurement (DPO measures now and then) only a schedule moves: it counts steps, not readings.
        """
        moments = self._gather("train")
        if moments is None:
            return self._step_unmeasured()
        if moments.isfinite().all():  # one infinite KL would hide all others until the next log
            self._pool = moments if self._pool is None else self._pool + moments
        reading = summarise(moments, self.names)[self._args.kl_reading]
        metrics = {"kl/coef": self.coef}
        kl = reading.per_token if self._args.kl_target_unit == "token" else reading.per_sequence
        if self._args.kl_target is not None:
            metrics |= {"kl/target": self._args.kl_target, "kl/error": kl - self._args.kl_target}
        metrics = _numbers(metrics)
        if self._controller is not None:
            self.coef = self._controller.update(kl, n=sequence_count(moments))
        self._watch_budget(reading)
        return metrics

    def _step_unmeasured(self) -> dict[str, float]:
        if not self._args.kl_is_penalised:
            return {}
        metrics = {"kl/coef": self.coef}
        if self._controller is not None:
            self.coef = self._controller.update(math.nan)  # counts in a schedule; the others skip it
        return metrics

    def metrics(self, mode: str) -> dict[str, float]:
        """KL statistics since the last call, pooled over processes, steps and micro-batches; then start afresh.

        Call on every process. Keys: `kl` (the configured estimator, per token; the one of `kl/sequence` where that is
        not measured), `kl/<name>`, `kl/<name>_se` (`kl/exact`
        becomes `kl/exact_forward` where the direction is forward),
        `kl/sequence`, `kl/sequence_se`; a number that there is too little data for is left out.
        """
        if mode == "train":
            moments, self._pool = self._pool, None
        else:
            moments = self._gather(mode)
        if moments is None:
            return {}
        summary = summarise(moments, self.names)
        headline = self._args.kl_estimator if self._args.kl_estimator in summary else self._args.kl_reading
        out = {"kl": summary[headline].per_token}
        for estimator, numbers in summary.items():
            forward = estimator == "exact" and self._args.kl_direction == "forward"
            name = "exact_forward" if forward else estimator
            out |= {f"kl/{name}": numbers.per_token, f"kl/{name}_se": numbers.per_token_se}
        reading = summary[self._args.kl_reading]
        return _numbers(out | {"kl/sequence": reading.per_sequence, "kl/sequence_se": reading.per_sequence_se})

    def weight_metrics(self, weights: Tensor, mask: Tensor) -> dict[str, float]:
        """`kl/ess` (mean over processes) and `kl/weight_max` (largest anywhere) of untruncated importance weights."""
        largest = torch.where(mask.bool(), weights, 0.0).amax() if weights.numel() else weights.new_zeros(())
        both = torch.stack([effective_sample_size(weights, mask), largest])
        gathered = self._accelerator.gather(both.unsqueeze(0))
        return {"kl/ess": gathered[:, 0].mean().item(), "kl/weight_max": gathered[:, 1].max().item()}

    def _gather(self, mode: str) -> Tensor | None:
        rows, self._window[mode] = self._window[mode], []
        if not rows:
            return None
        return prompt_moments(self._accelerator.gather(torch.cat(rows)).cpu())

    def _watch_budget(self, reading: KLSummary) -> None:
        if self._args.kl_budget is None or not math.isfinite(reading.per_sequence):
            return
        self._budget_sum = _BUDGET_DECAY * self._budget_sum + (1 - _BUDGET_DECAY) * reading.per_sequence
        self._budget_weight = _BUDGET_DECAY * self._budget_weight + (1 - _BUDGET_DECAY)
        smoothed = self._budget_sum / self._budget_weight
        if smoothed > self._args.kl_budget and not self.over_budget:
            consequence = "training stops here" if self._args.kl_budget_action == "stop" else "training goes on"
            logger.warning(
                f"The KL to the reference has reached {smoothed:.3g} nats per sequence (smoothed), beyond "
                f"kl_budget={self._args.kl_budget:g}; {consequence}."
            )
        self.over_budget = smoothed > self._args.kl_budget

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable."""
        controller = None if self._controller is None else self._controller.state_dict()
        return {"controller": controller, "budget": [self._budget_sum, self._budget_weight]}

    def save(self, folder: str | os.PathLike) -> None:
        """Write the state into a checkpoint folder, whole or not at all."""
        write_state(folder, self.state())

    def load(self, folder: str | os.PathLike) -> None:
        """Continue from a checkpoint; where its file holds {}, start afresh. Call after `start`.

        Raises:
            CheckpointError: the file is unreadable.
        """
        state = read_state(folder)
        if not state:
            logger.warning(f"{STATE_FILE} in {folder} is empty: beta starts at {self.coef:g}.")
            return
        try:
            budget = [float(number) for number in state["budget"]]
            if len(budget) != 2 or not all(map(math.isfinite, budget)):
                raise ValueError(f"budget={state['budget']!r}")
            self._load_controller(state["controller"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(folder, str(error)) from error
        self._budget_sum, self._budget_weight = budget

    def _load_controller(self, saved: dict[str, Any] | None) -> None:
        """Take what the controller had learnt, and the settings (gains, target, start, length) from today's recipe."""
        if saved is not None and saved["kind"] not in KINDS:
            raise ValueError(f"kind={saved['kind']!r}")
        if saved is None or self._controller is None or self._controller.kind == "fixed":
            return  # a fixed beta is whatever the recipe says now
        if saved["kind"] != self._controller.kind:
            logger.warning(
                f"The checkpoint's beta was {saved['kind']} and the recipe's is {self._controller.kind}: it starts "
                f"afresh at {self.coef:g}."
            )
            return
        own = self._controller.state_dict()
        settings = {name: own[name] for name in ("coef", *self._controller.takes)}
        self._controller.load_state_dict({**saved, **settings})
        self.coef = self._controller.value


def _numbers(metrics: dict[str, float]) -> dict[str, float]:
    """Without NaN (no sequence had a token that counts, or an error bar of one sequence) and infinity: JSON loggers
    choke on them."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


class KLControlledTrainer(GuardedSteps, WholeCheckpoints):
    """The hooks of `transformers.Trainer` that carry a `KLControl`. Mix in before the trainer class.

    The trainer sets `self.kl` and `self.guard`, and implements `_apply_kl_coef` to put beta where its loss reads it.
    """

    kl: KLControl
    args: Any
    _eval_prefix = "eval"  # of the evaluation that runs
    overoptimisation: Any = None  # the monitor of a gold reward, in trainers that take one
    _metrics: dict[str, defaultdict[str, list[float]]]

    def _apply_kl_coef(self, coef: float) -> None:
        raise TypeError(f"{type(self).__name__} must say where its loss reads beta.")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.kl.restart()
        self.guard.restart()
        self._apply_kl_coef(self.kl.coef)
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kl.start(self.state.max_steps)
        loss = super().training_step(*args, **kwargs)
        self.guard.watch(LOSS, loss)
        if self.accelerator.sync_gradients:
            self._end_kl_step()
        return loss

    def _end_kl_step(self) -> None:
        """Move beta by the KL that the step measured, and end the run where the budget says so."""
        for name, value in self.kl.step().items():
            self._metrics["train"][name].append(value)
        drop_non_finite(self._metrics["train"])
        self._apply_kl_coef(self.kl.coef)
        if self.kl.over_budget and self.args.kl_budget_action == "stop":
            self.control.should_save = True
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        logs.update({f"{prefix}{name}": value for name, value in self.kl.metrics(mode).items()})
        super().log(logs, *args, **kwargs)

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
            self.kl.load(checkpoint)
            try:
                self._load_checkpoint_state(read_state(checkpoint))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise unreadable(checkpoint, str(error)) from error
            self._apply_kl_coef(self.kl.coef)
