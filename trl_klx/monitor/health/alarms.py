"""Health alarms: what a trainer logs is watched, and what is wrong is reported once, with its cause and remedy.

Only logged numbers are read, which are reduced over all processes, so that the alarms are the same on each; and all
that is remembered follows from the log history, so that a resumed run continues from where its checkpoint stood.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..history import append_entries, write_entries
from ..metrics import is_number, is_training
from . import course as detect_course
from . import setup as detect_setup
from .readings import SEVERAL, Finding, Reading

HEALTH_FILE = "health.jsonl"
_KEPT = 64  # readings of a metric: more than LEARNING_STEPS of them, where every step is logged
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HealthSources:
    """What the alarms of one trainer read.

    Args:
        per_token: metric of the KL per token.
        gain: metric of what the run is to raise.
        entropy: metric of the entropy per token of the policy's own answers.
        target_unit: of KL targets, "token" or "sequence".
        coef_name: what the config calls beta.
        noise: the largest KL per token before the first update that scoring noise explains, nats.
        precision: whose noise that is.
        mismatches: differences between policy and reference that were found before training, in words.
        reward_scale: standard deviation of the rewards as the loss sees them; None: that of the metric `reward_std`.
        coef_max: gives the largest beta that the controller may set, None where there is none.
    """

    per_token: str
    target_unit: str
    gain: str
    entropy: str
    coef_name: str
    noise: float
    precision: str
    mismatches: tuple[str, ...] = ()
    reward_scale: float | None = None
    coef_max: Callable[[], float | None] = lambda: None


class HealthMonitor:
    """The state of the alarms of one run; no input but log entries, no output but events.

    Args:
        sources: which metrics are what.
        warmup_steps: of the learning rate; nothing has to be learnt before their end.
    """

    def __init__(self, sources: HealthSources, warmup_steps: int = 0) -> None:
        self._sources, self._warmup_steps = sources, warmup_steps
        self._series: dict[str, deque[Reading]] = {}
        self._first: dict[str, Reading] = {}
        self._first_gain: list[Reading] = []
        self._paid: deque[Reading] = deque(maxlen=SEVERAL)
        self._targets: dict[str, deque[detect_course.Target]] = {}  # by group; "" is the run as a whole
        self._quiet: dict[str, int] = {}  # by alarm that has begun and not ended: entries since it was last found
        self._raised: list[str] = []  # all alarms of the run so far, in order

    def read(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a log entry with its `step`; returns the alarms that begin or end with it, as JSON-serialisable events.

        An alarm ends when `SEVERAL` entries in a row give no reason for it. Evaluations change nothing.
        """
        if not is_training(entry):
            return []
        step = int(entry["step"])
        self._take(step, {name: float(value) for name, value in entry.items() if is_number(value)})
        events: list[dict[str, Any]] = []
        for name, finding in self._verdicts().items():
            if finding is not None and name not in self._quiet:
                events.append({"step": step, "alarm": name, **finding._asdict()})
                self._raised += [name] if name not in self._raised else []
            if finding is not None:
                self._quiet[name] = 0
            elif name in self._quiet:
                self._quiet[name] += 1
                if self._quiet[name] == SEVERAL:
                    del self._quiet[name]
                    events.append({"step": step, "alarm": name, "ends": True})
        return events

    def metrics(self) -> dict[str, float]:
        """`health/<alarm>`, 1 while it lasts and 0 afterwards; nothing for an alarm that never began."""
        return {f"health/{name}": float(name in self._quiet) for name in self._raised}

    def _verdicts(self) -> dict[str, Finding | None]:
        read = self._readings
        return {
            "runaway": self._runaway(),
            "collapse": self._collapse(),
            "mode_collapse": self._mode_collapse(),
            "wrong_reference": self._wrong_reference(),
            **self._of_sampler(),
            "length_bias": self._length_bias(),
            "hidden_kl": detect_setup.hidden_kl(read("kl/masked_share"), read("kl/masked")),
        }

    def _take(self, step: int, numbers: dict[str, float]) -> None:
        if "kl/sequence" not in numbers:  # without a token that counts, TRL logs an entropy of 0
            numbers = {name: value for name, value in numbers.items() if name != self._sources.entropy}
        for name, value in numbers.items():
            self._first.setdefault(name, Reading(step, value))
            self._series.setdefault(name, deque(maxlen=_KEPT)).append(Reading(step, value))
        gain = numbers.get(self._sources.gain)
        if gain is not None and len(self._first_gain) < detect_course.LEARNING_READINGS:
            self._first_gain.append(Reading(step, gain))
        if {"kl/coef", "kl/sequence"} <= set(numbers):
            self._paid.append(Reading(step, numbers["kl/coef"] * numbers["kl/sequence"]))
        if {"kl/target", "kl/error", "kl/coef"} <= set(numbers):
            kl, target = numbers["kl/target"] + numbers["kl/error"], numbers["kl/target"]
            self._take_target("", detect_course.Target(step, kl, target, numbers["kl/coef"]))
        for name, target in numbers.items():
            group = name.removesuffix("/target")
            if name.startswith("kl_groups/") and group != name:
                own, coef = numbers.get(f"{group}/{self._sources.target_unit}"), numbers.get(f"{group}/coef")
                if own is not None and coef is not None:
                    self._take_target(group, detect_course.Target(step, own, target, coef))

    def _take_target(self, group: str, reading: detect_course.Target) -> None:
        self._targets.setdefault(group, deque(maxlen=SEVERAL)).append(reading)

    def _readings(self, name: str) -> list[Reading]:
        return list(self._series.get(name, ()))

    def _last(self, name: str) -> float | None:
        readings = self._series.get(name)
        return readings[-1].value if readings else None

    def _runaway(self) -> Finding | None:
        kl = self._readings(self._sources.per_token), self._readings("kl/sequence")
        coef_max, coef_name = self._sources.coef_max(), self._sources.coef_name
        ongoing = "runaway" in self._quiet
        for group, targets in (self._targets or {"": deque()}).items():
            found = detect_course.runaway(list(targets), *kl, coef_max=coef_max, coef_name=coef_name, ongoing=ongoing)
            if found is not None:
                return found if not group else found._replace(evidence=f"{group}: {found.evidence}")
        return None

    def _collapse(self) -> Finding | None:
        kl = [reading for reading in self._readings("kl/sequence") if reading.step > self._warmup_steps]
        enough = [n for n in range(len(kl)) if kl[-1].step - kl[-1 - n].step >= detect_course.LEARNING_STEPS]
        # The latest readings over so many steps, and at least so many readings.
        kl = kl[-max(enough[0] + 1, detect_course.LEARNING_READINGS) :] if enough else []
        first = self._first.get("kl/start_sequence")
        coef, rate = self._last("kl/coef"), self._last("learning_rate")
        weight = [f"{self._sources.coef_name} {coef:.3g}"] if coef is not None else []
        weight += [f"learning_rate {rate:.3g}"] if rate is not None else []
        scale = self._sources.reward_scale
        return detect_course.collapse(
            kl,
            self._first_gain,
            self._readings(self._sources.gain)[-detect_course.LEARNING_READINGS :],
            list(self._paid),
            first_kl=0.0 if first is None else first.value,
            spread=self._last("reward_std") if scale is None else scale,
            same_reward=self._same_reward(),
            entropy=self._last(self._sources.entropy),
            weight=", ".join(weight),
            coef_name=self._sources.coef_name,
        )

    def _same_reward(self) -> float | None:
        """Share of prompts whose answers all get one reward, in the latest readings; without groups, of batches."""
        shares = self._readings("frac_reward_zero_std")
        if not shares:
            shares = [Reading(step, float(spread == 0)) for step, spread in self._readings("reward_std")]
        return min((reading.value for reading in shares[-SEVERAL:]), default=None)

    def _mode_collapse(self) -> Finding | None:
        entropy = self._readings(self._sources.entropy)
        if not entropy:
            return None
        first = self._first[self._sources.entropy].value
        return detect_course.mode_collapse(
            entropy, self._readings("kl/sequence"), first_entropy=first, coef_name=self._sources.coef_name
        )

    def _wrong_reference(self) -> Finding | None:
        first, noise = self._first.get("kl/start"), self._sources.noise
        if first is None:  # DPO without a probe: the log-ratio itself, and KL = log-ratio^2 / 2
            first, noise = self._first.get("log_ratio/start"), math.sqrt(2 * noise)
        return detect_setup.wrong_reference(
            first, noise=noise, precision=self._sources.precision, mismatches=self._sources.mismatches
        )

    def _of_sampler(self) -> dict[str, Finding | None]:
        read, first, own = self._readings, self._first.get("kl/sampler"), self._sources
        apart, ess, mean = read("kl/sampler"), read("kl/ess"), (read("kl/weight_mean"), read("kl/weight_mean_se"))
        return {
            "stale_sampler": detect_setup.stale_sampler(ess, apart, first, *mean),
            "coarse_sampler": detect_setup.coarse_sampler(apart, first, noise=own.noise, precision=own.precision),
            "wrong_weights": detect_setup.wrong_weights(*mean, ess),
            "cut_ratios": detect_setup.cut_ratios(read("kl/ratio_cut")),
        }

    def _length_bias(self) -> Finding | None:
        read = self._readings
        answers = read("probe/mean_length")
        if answers and answers[0] != self._first["probe/mean_length"]:
            answers = [self._first["probe/mean_length"], *answers]
        correlation, slope = read("length/margin_correlation"), read("length/margin_slope")
        return detect_setup.length_bias(correlation, slope, read("length/chosen"), read("length/rejected"), answers)


class HealthCallback(TrainerCallback):
    """Health alarms as warnings, as metrics (`health/<alarm>`) and in `<output_dir>/health.jsonl`.

    Has to come before the callbacks that write metrics: it adds its own to what they get.
    """

    def __init__(self, sources: HealthSources) -> None:
        self._sources = sources
        self._monitor = HealthMonitor(sources)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._monitor = HealthMonitor(self._sources, args.get_warmup_steps(state.max_steps))
        entries: list[dict] = [{"step": 0}, *state.log_history]  # more than the first only on resume
        events = [event for entry in entries for event in self._monitor.read(entry)]
        if not state.is_world_process_zero:
            return
        path = _path(args)
        if events:
            write_entries(path, events)
        else:
            path.unlink(missing_ok=True)
        if state.global_step == 0:
            _warn(events)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not logs or not is_training(logs):
            return
        events = self._monitor.read({**logs, "step": state.global_step})
        metrics = self._monitor.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)
        if state.is_world_process_zero and events:
            _warn(events)
            append_entries(_path(args), events)


def _path(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / HEALTH_FILE


def _warn(events: Sequence[dict]) -> None:
    for event in events:
        if "ends" in event:
            logger.info("Health: %s is over at step %d.", event["alarm"], event["step"])
        else:
            logger.warning(
                "Health alarm at step %d: %s. %s. Likely cause: %s. What to change: %s.",
                *(event[name] for name in ("step", "alarm", "evidence", "cause", "remedy")),
            )
