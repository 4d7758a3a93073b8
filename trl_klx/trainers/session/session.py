"""What all trainers share: measuring the KL, steering beta with it, logging it and saving the controller's state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from ...config.choices import CONTROLLER_SETTINGS
from ...config.options import KLArguments
from ...control.controllers import KINDS, Controller, make_controller
from ...monitor.metrics import finite
from ...monitor.moments import KLSummary, prompt_sums, sequence_count, sequence_rows, summarise
from ..checkpoints.own_folders import STATE_FILE
from ..errors import RunError
from ..parts import Part
from .applied import KL_MEASURED, KL_ON_DATA, STEP_ENDED
from .budget import KLBudget
from .coefficient import coefficient
from .groups import group_numbers
from .metrics import PromptMean, add_sums, named

logger = get_logger(__name__)

_ALL = ""  # the name of the one group where there are none
ORIGIN = "origin"  # among the values by estimator: k3 of the KL to the start, where the reference moves


class KLSession(Part):
    """Beta, its controller and the statistics of one run. The same on every process.

    One row per sequence is gathered from all processes once per optimizer step and summed in one order, so that beta is
    the same to the last bit everywhere.

    Args:
        args: the KL arguments of the trainer's config, already checked.
        accelerator: for gathering.
        groups: the groups of `kl_group_column`; with an adaptive or pid controller each has its own target and beta.
    """

    def __init__(self, args: KLArguments, accelerator: Accelerator, groups: tuple[str, ...] = ()) -> None:
        self._args, self._accelerator = args, accelerator
        self.names, self.groups = args.kl_logged_estimators, groups
        self._columns = (*self.names, *((ORIGIN,) if args.kl_has_origin else ()))
        has_target = args.kl_controller in CONTROLLER_SETTINGS["kl_target"]
        self._steered = groups if groups and has_target else (_ALL,)
        self._configured = _coef_in(args)
        self._start, self._is_set = self._configured, False  # beta of the next run; whether it was set from outside
        # Rows of this process: of this optimizer step, or of this evaluation.
        self._window: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._pools: dict[str, Tensor] = {}  # sums per prompt of all processes, since the last log, by group
        self.weight_mean = PromptMean(accelerator)  # of answers that another policy sampled
        self.sampler_kl = PromptMean(accelerator)  # of that policy, where it is an inference engine, to the trainer's
        self._data_mean = PromptMean(accelerator)  # the exact KL on DPO's data
        self.begin()

    def start(self, total_steps: int) -> None:
        """Build the controllers, once the length of the run is known: `total_steps`, the optimizer steps of a schedule.

        Does nothing when they were built before, for example by a resumed checkpoint.
        """
        if self.controllers:
            return
        settings = dict(self._args.kl_controller_settings)
        if self._args.kl_controller in ("linear", "cosine"):
            settings["total"] = total_steps
        for name in self._steered:
            own = settings if name == _ALL else {**settings, "target": self._args.kl_target_of(name)}
            self.controllers[name] = make_controller(self._args.kl_controller, self._coefs[name], **own)

    def begin(self) -> None:
        """Begin a run, with the beta of the config, or the one set from outside."""
        self._coefs = dict.fromkeys(self._steered, self._start)
        self.controllers: dict[str, Controller] = {}
        limit = None if isinstance(self._args.kl_budget, str) else self._args.kl_budget  # auto: not known yet
        to = "the start" if self._args.kl_has_origin else "the reference"
        self.budget = KLBudget(limit, ends_run=self._args.kl_budget_action == "stop", to=to)
        self.reached: set[str] = set()  # what of the KL this run's code has computed: see `applied.py`
        self._is_first = True  # whether the next reading is of the policy before its first update

    def set_coef(self, value: float) -> None:
        """Set a fixed beta, from now on and for later runs: what a callback of the user does by `trainer.beta = ...`.

        Call on every process, with the same value.

        Raises:
            ValueError: it is not a coefficient, no KL is in loss or reward, or a controller sets beta.
        """
        name, value = self._args.kl_coef_name, coefficient(self._args.kl_coef_name, value)
        if value == self.coef:
            return
        if not self._args.kl_is_penalised:
            raise ValueError(
                f"trainer.{name}={value:g} was set, and the trainer was built without a KL in loss or reward: give the "
                f"config a positive {name}, and a kl_placement other than 'none'."
            )
        if self._args.kl_controller != "fixed":
            raise ValueError(
                f"trainer.{name}={value:g} was set, and kl_controller={self._args.kl_controller!r} sets it too: set "
                f"where it starts in the config, or leave it to the callback by kl_controller='fixed' (the controllers "
                "'linear' and 'cosine' anneal it without one)."
            )
        if not self._is_set:
            logger.warning(
                f"trainer.{name} was set to {value:g} from outside (the config has {self._configured:g}): loss, "
                "kl/coef and checkpoints take it from here on. The controllers 'linear' and 'cosine' anneal it, too."
            )
        self._start, self._is_set = value, True
        self._coefs = dict.fromkeys(self._steered, value)
        for controller in self.controllers.values():
            controller.coef = value

    def check_args(self, args: KLArguments) -> None:
        """Refuse a beta in the config that is another than when the trainer was built: nothing reads it there.

        Raises:
            ValueError: it is.
        """
        name, found = args.kl_coef_name, _coef_in(args)
        if found != self._configured:
            raise ValueError(
                f"args.{name} was changed to {getattr(args, name)!r} after the trainer was built with "
                f"{self._configured:g}, and nothing reads it there: set trainer.{name}, or let a kl_controller "
                "('linear', 'cosine') move it."
            )

    @property
    def coef_max(self) -> float | None:
        """The largest beta that a controller may set, the same for all groups; None without a bound."""
        bounds = [controller.state_dict().get("coef_max") for controller in self.controllers.values()]
        return bounds[0] if bounds else None

    @property
    def coef(self) -> float:
        """Beta; the mean over the groups where each has its own."""
        return sum(self._coefs.values()) / len(self._coefs)

    def coef_of(self, groups: Tensor | None) -> Tensor | float:
        """Beta of rows whose group has these numbers, (B,) -> (B, 1); one number where all groups have one beta."""
        if groups is None or len(self._coefs) == 1:
            return self.coef
        # Written on the device one by one: the host would wait for a copy of all.
        coefs = [torch.full((), self._coefs[name], device=groups.device) for name in self.groups]
        return torch.stack(coefs)[groups].unsqueeze(1)

    @property
    def controller(self) -> Controller | None:
        """The controller of a run whose groups have none of their own; None before the first step."""
        return self.controllers.get(_ALL)

    def group_numbers(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """(B,) places of the rows' groups in `self.groups`, for `measure` and `coef_of`; None without groups."""
        if not self.groups:
            return None
        return group_numbers(rows, str(self._args.kl_group_column), self.groups, self._accelerator.device)

    def measure(
        self, mode: str, values: dict[str, Tensor], mask: Tensor, prompts: Tensor, groups: Tensor | None = None
    ) -> None:
        """Add a batch of per-token KL values, (B, T) by estimator name, to the statistics of `mode` (train or eval).

        Where the reference moves, `ORIGIN` is one more name.
        `prompts`, (B,), are integers, equal for the answers to one prompt, on whatever process they are; `groups`,
        (B,), are the places of the rows' groups in `self.groups`.
        """
        if mode == "train":
            self.reached.add(KL_MEASURED)
        rows = sequence_rows({name: values[name] for name in self._columns}, mask, prompts)
        group = torch.zeros_like(prompts) if groups is None else groups
        self._window[mode].append(torch.cat([group.to(rows).unsqueeze(1), rows], dim=1))

    def measure_data(self, mode: str, exact: Tensor, mask: Tensor, prompts: Tensor) -> None:
        """Add the exact KL of a batch of DPO's data, (B, T), which no controller reads."""
        self.reached.add(KL_ON_DATA)
        self._data_mean.add(mode, exact, mask, prompts)

    def end_step(self) -> dict[str, float]:
        """Gather the step's KL and move beta. Returns the step's metrics; call on every process.

        Without a measurement (DPO measures now and then) only a schedule moves: it counts steps, not readings.
        """
        self.reached.add(STEP_ENDED)
        self.check_args(self._args)
        metrics = self._end_step()
        self.budget.end_step()
        return metrics

    def _end_step(self) -> dict[str, float]:
        sums = self._gather("train")
        if not sums:
            return self._step_unmeasured()
        for name, part in sums.items():
            add_sums(self._pools, name, part)
        whole = summarise(sums[_ALL], self._columns)
        metrics = {"kl/coef": self.coef, **self._first_metrics(whole)}
        if not self.groups and self._args.kl_target is not None:
            error = self._reading(sums[_ALL]) - self._args.kl_target
            metrics |= {"kl/target": self._args.kl_target, "kl/error": error}
        for name in self.groups:
            steered = name if name in self._coefs else _ALL
            metrics[f"kl_groups/{name}/coef"] = self._coefs[steered]
            target = self._args.kl_target_of(name)
            if target is not None:
                metrics[f"kl_groups/{name}/target"] = target
        for name, controller in self.controllers.items():
            if name in sums:  # a group that no answer of the step belongs to waits
                self._coefs[name] = controller.update(self._reading(sums[name]), n=sequence_count(sums[name]))
        far = whole[ORIGIN if ORIGIN in whole else self._args.kl_reading]
        if self.budget.read(far.per_sequence):
            logger.warning(self.budget.message())
        return finite(metrics)

    def _reading(self, sums: Tensor) -> float:
        """The KL in the target's unit."""
        summary = summarise(sums, self._columns)[self._args.kl_reading]
        return summary.per_token if self._args.kl_target_unit == "token" else summary.per_sequence

    def _first_metrics(self, summary: dict[str, KLSummary]) -> dict[str, float]:
        """The KL before the first update, once in a run: what the reference differs from the policy by.

        By the estimator with the least noise there; k1 may have any sign.
        """
        if not (self._is_first and self._args.kl_health):
            return {}
        self._is_first = False
        first = summary[next(name for name in ("k3", "exact", "k2", "k1") if name in summary)]
        return {"kl/start": abs(first.per_token), "kl/start_sequence": abs(first.per_sequence)}

    def _step_unmeasured(self) -> dict[str, float]:
        if not self._args.kl_is_penalised:
            return {}
        metrics = {"kl/coef": self.coef}
        for name, controller in self.controllers.items():
            self._coefs[name] = controller.update(math.nan)  # counts in a schedule; the others skip it
        return metrics

    def log(self, mode: str, found: dict[str, float], evaluation: str | None) -> dict[str, float]:
        return self.metrics(mode)

    def metrics(self, mode: str) -> dict[str, float]:
        """KL statistics since the last call, over processes and steps. Call on every process.

        In nats per token: `kl` (of the configured estimator, or of `kl_reading` where that is not measured) and
        `kl/<estimator>`; per sequence: `kl/sequence`; of each group both, `kl_groups/<group>/token` and `/sequence`.
        Of the KL to the start, where the reference moves: `kl/origin`, per sequence, and `kl/origin_token`.
        Each with its standard error (`_se`), for which all answers to one prompt are one. `kl/sequences` and
        `kl_groups/<group>/sequences` count answers. What there is too little data for is left out.
        """
        if mode == "train":
            sums, self._pools = self._pools, {}
        else:
            sums = self._gather(mode)
        data = "kl/data_exact" if self._args.kl_direction == "reverse" else "kl/data_exact_forward"
        of_sampler = named("kl/weight_mean", self.weight_mean.take(mode)) | named(
            "kl/sampler", self.sampler_kl.take(mode)
        )
        means = of_sampler | named(data, self._data_mean.take(mode))
        if not sums:
            return means
        summary = summarise(sums[_ALL], self._columns)
        origin = summary.pop(ORIGIN, None)
        headline = self._args.kl_estimator if self._args.kl_estimator in summary else self._args.kl_reading
        out = {"kl": summary[headline].per_token, "kl_se": summary[headline].per_token_se}
        for estimator, numbers in summary.items():
            forward = estimator == "exact" and self._args.kl_direction == "forward"
            name = "exact_forward" if forward else estimator
            out |= {f"kl/{name}": numbers.per_token, f"kl/{name}_se": numbers.per_token_se}
        if origin is not None:
            out |= {"kl/origin": origin.per_sequence, "kl/origin_se": origin.per_sequence_se}
            out |= {"kl/origin_token": origin.per_token, "kl/origin_token_se": origin.per_token_se}
        for group, part in sums.items():
            reading = summarise(part, self._columns)[self._args.kl_reading]
            place = "kl" if group == _ALL else f"kl_groups/{group}"
            out |= {f"{place}/sequence": reading.per_sequence, f"{place}/sequence_se": reading.per_sequence_se}
            out[f"{place}/sequences"] = sequence_count(part)
            if group != _ALL:
                out |= {f"{place}/token": reading.per_token, f"{place}/token_se": reading.per_token_se}
        return finite(out) | means

    def _gather(self, mode: str) -> dict[str, Tensor]:
        """Sums per prompt of all processes, and of the groups among them; empty where nothing was measured."""
        window, self._window[mode] = self._window[mode], []
        if not window:
            return {}
        local = torch.cat(window)
        rows = self._accelerator.gather(torch.cat([local, torch.full_like(local[:, :1], self.coef)], dim=1)).cpu()
        coefs, rows = rows[:, -1], rows[:, :-1]
        if (coefs != coefs[0]).any():
            raise RunError(
                f"{self._args.kl_coef_name} is {coefs.min():g} on one process and {coefs.max():g} on another: a "
                "callback that sets it must do so on every process."
            )
        parts = {name: rows[rows[:, 0] == place] for place, name in enumerate(self.groups)}
        return {name: prompt_sums(part[:, 1:]) for name, part in {_ALL: rows, **parts}.items() if len(part)}

    def state(self) -> dict[str, Any]:
        states = {name: controller.state_dict() for name, controller in self.controllers.items()}
        kept = {"controller": states.pop(_ALL, None), "groups": states, "budget": self.budget.state()}
        if self._is_set:
            kept["set_coef"] = {"coef": self.coef, "configured": self._configured}
        return kept

    def wrote(self, folder: Path, *, regular: bool) -> None:
        self.budget.wrote(folder, extra=self.budget.wants_checkpoint and not regular)

    def keeps(self) -> set[Path]:
        return {Path(self.budget.checkpoint)} if self.budget.checkpoint else set()

    def is_over(self) -> bool:
        return self.budget.ends_run

    def load(self, state: dict[str, Any], checkpoint: Path, run: Path | None) -> None:
        """Continue from a checkpoint; where its file holds {}, beta starts from the beginning. Call after `start`."""
        self._is_first = False
        if not state:
            logger.warning(f"{STATE_FILE} in {checkpoint} is empty: beta starts at {self.coef:g}.")
            return
        self.budget.load(state["budget"], run)
        saved = {_ALL: state["controller"], **state.get("groups", {})}
        for name, controller in self.controllers.items():
            self._load_controller(name, controller, saved.get(name))
        outside = state.get("set_coef")
        # A beta that the recipe or the user has changed since is the one that is meant.
        is_meant = not self._is_set and self._args.kl_controller == "fixed"
        if outside is not None and is_meant and outside["configured"] == self._configured:
            self.set_coef(outside["coef"])
        if run is not None:
            self.budget.wrote(checkpoint, extra=False)

    def _load_controller(self, name: str, controller: Controller, saved: dict[str, Any] | None) -> None:
        """Take what the controller had learnt, and the settings (gains, target, start, length) from today's recipe."""
        if saved is not None and saved["kind"] not in KINDS:
            raise ValueError(f"kind={saved['kind']!r}")
        if controller.kind == "fixed":
            return  # a fixed beta is whatever the recipe has now
        of_group = f" of group {name!r}" if name != _ALL else ""
        if saved is None or saved["kind"] != controller.kind:
            earlier = "not steered" if saved is None else saved["kind"]
            logger.warning(
                f"The checkpoint's beta{of_group} was {earlier} and the recipe's is {controller.kind}: it starts "
                f"again at {self._coefs[name]:g}."
            )
            return
        own = controller.state_dict()
        settings = {setting: own[setting] for setting in ("coef", *controller.takes)}
        controller.load_state_dict({**saved, **settings})
        self._coefs[name] = controller.value


def _coef_in(args: KLArguments) -> float:
    """Beta as the config has it; 0 where no KL reaches the policy."""
    return args.kl_coef_start if args.kl_is_penalised else 0.0
