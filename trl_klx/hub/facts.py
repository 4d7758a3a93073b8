"""The facts of a run, as a card states them: from its settings and its metrics file, and from nothing else."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from ..config.options import KLArguments
from ..kl.gradients import gradient_sentence
from ..monitor.metrics import EVAL_PREFIX, evaluated_sets, is_number, set_name, when
from .settings import Settings

# A field that only one algorithm's config has.
_TELLING = {"grpo": "num_generations", "ppo": "num_ppo_epochs", "dpo": "kl_probe_steps"}
_ESTIMATORS = {
    "k1": "k1, the log-ratio of the sampled token",
    "k2": "k2, half the squared log-ratio of the sampled token",
    "k3": "k3, r - 1 - log r with r = reference / policy at the sampled token",
    "exact": "exact, the sum over the whole vocabulary",
}
_PLACEMENTS = {
    "none": "none: measured, without a penalty",
    "loss": "in the loss",
    "reward": "in the reward",
    "both": "in both, loss and reward",
}
_TOKEN_NAMES = {
    "kl/k1": "k1",
    "kl/k2": "k2",
    "kl/k3": "k3",
    "kl/exact": "exact",
    "kl/exact_forward": "exact, forward: KL(reference \\|\\| policy)",
    "kl/data_exact": "exact, at the prefixes of the training data (teacher-forced)",
}


@dataclass
class RecordedKL(KLArguments):
    """The KL arguments that a run had. They were checked when it began, and are not checked again."""

    algorithm: str = "grpo"
    coef: float = 0.0
    dpo_beta: float = 0.0
    steers_beta: bool = False  # whether the controller drives DPO's own beta

    @property
    def kl_coef_start(self) -> float:
        return self.coef

    @property
    def kl_coef_name(self) -> str:
        return "beta" if self.algorithm == "grpo" else "kl_coef"


def recorded_kl(settings: Settings) -> RecordedKL:
    """The KL arguments among the settings of a run, and whose they are: grpo, ppo or dpo.

    Raises:
        ValueError: no trainer of ours wrote the settings.
    """
    algorithm = next((name for name, field in _TELLING.items() if field in settings), None)
    if algorithm is None:
        raise ValueError(
            f"the settings have none of the fields {', '.join(_TELLING.values())}, so no trainer of trl_klx wrote "
            "them: give the output_dir of a run."
        )
    found = RecordedKL(
        **{field.name: settings[field.name] for field in fields(KLArguments) if field.name in settings},
        algorithm=algorithm,
        dpo_beta=float(settings.get("beta") or 0.0),
        steers_beta=settings.get("kl_controls") == "beta",
    )
    found.coef = float(settings.get(found.kl_coef_name) or 0.0)
    return found


def gradient_text(kl: RecordedKL) -> str:
    """One sentence: the gradient that the run's KL had, from the table."""
    if kl.algorithm != "dpo":
        if not kl.kl_is_penalised:
            return f"At {kl.kl_coef_name} {kl.coef:g} with placement {kl.kl_placement} no KL reached the policy."
        weight = kl.kl_importance_sampling or "token"
        return gradient_sentence(kl.kl_estimator, kl.kl_placement, kl.kl_credit, weight, direction=kl.kl_direction)
    own = f"DPO's own loss holds the policy by its beta of {kl.dpo_beta:g}"
    if not kl.kl_is_penalised:
        return f"{own}, and no KL was added to it."
    directions = {"reverse": "reverse KL(policy || reference)", "forward": "forward KL(reference || policy)"}
    return (
        f"The added KL has the gradient of the {directions[kl.kl_direction]} at the prefixes of the training data, "
        f"which the policy did not sample; beside it, {own}."
    )


def kl_rows(kl: RecordedKL, history: list[dict], reference: str) -> list[tuple[str, str]]:
    """(what, value) of every choice about the KL, for a table."""
    direction = f", {kl.kl_direction}" if kl.kl_estimator == "exact" else ""
    rows = [
        ("Estimator", _ESTIMATORS[kl.kl_estimator] + direction),
        ("Placement", _PLACEMENTS[kl.kl_placement]),
        ("Credit", kl.kl_credit if kl.kl_placement in ("reward", "both") else "none: no KL in the reward"),
        ("Importance weight", _weight(kl)),
        ("Coefficient", _coefficient(kl, history)),
        ("Controller", f"{kl.kl_controller}, of DPO's beta" if kl.steers_beta else kl.kl_controller),
        ("Target", _target(kl)),
    ]
    if kl.kl_budget is not None:
        unit = "" if isinstance(kl.kl_budget, str) else " nats per sequence"
        to = " from the start" if kl.kl_has_origin else ""
        rows.append(("Budget", f"{kl.kl_budget}{unit}{to}; beyond it: {kl.kl_budget_action}"))
    if kl.kl_term().leaves_answers_out:
        rows.append(("Answers left out of the KL", _left_out(kl)))
    if kl.kl_value_cap is not None:
        rows.append(("Bound on a token's KL loss", f"{kl.kl_value_cap:g} nats"))
    return [*rows, ("Reference model", reference)]


def _weight(kl: RecordedKL) -> str:
    level = kl.kl_importance_sampling or "none"
    if level != "none" and not kl.kl_term().takes_weights:
        return f"{level}: none is applied, because an exact KL averages over the policy's tokens itself"
    if level == "none" or kl.kl_is_cap is None:
        return level
    return f"{level}, {kl.kl_is_mode} a token's above {kl.kl_is_cap:g}"


def _left_out(kl: RecordedKL) -> str:
    cap, veto = kl.kl_is_answer_cap, kl.kl_is_veto
    parts = [] if cap is None else [f"with a geometric mean of the tokens' weights above {cap:g} or below 1/{cap:g}"]
    parts += [] if veto is None else [f"with a token whose weight is below {veto:g}"]
    return ", or ".join(parts)


def _coefficient(kl: RecordedKL, history: list[dict]) -> str:
    name, start = ("beta", kl.dpo_beta) if kl.steers_beta else (kl.kl_coef_name, kl.coef)
    last = [entry["kl/coef"] for entry in history if "kl/coef" in entry][-1:]
    if not last or (kl.kl_controller == "fixed" and math.isclose(last[0], start, rel_tol=1e-3)):
        return f"{name} {start:g}"
    by = ", set by a callback" if kl.kl_controller == "fixed" else ""
    return f"{name} {start:g} at the start, {last[0]:.3g} at the end{by}"


def _target(kl: RecordedKL) -> str:
    unit = f"nats per {kl.kl_target_unit}"
    parts = [] if kl.kl_target is None else [f"{kl.kl_target:g} {unit}"]
    if isinstance(kl.kl_group_targets, dict):
        parts += [f"{group}: {target:g} {unit}" for group, target in kl.kl_group_targets.items()]
    read = f", read by {kl.kl_reading}" if parts else ""
    return ("; ".join(parts) or "none") + read


@dataclass(frozen=True)
class Measured:
    """Where a KL was measured, and (estimator, nats per token, nats per sequence) as text, with standard errors."""

    source: str
    rows: list[tuple[str, str, str]]


def measured_kl(kl: RecordedKL, history: list[dict]) -> Measured | None:
    """The KL of the last evaluation, else of the last log that has one; None where none was measured."""
    entry, prefix = _last(history)

    def number(name: str) -> str:
        return _with_error(entry.get(f"{prefix}{name}"), entry.get(f"{prefix}{name}_se"))

    # The estimator of kl/sequence is the reading; DPO falls back to k3 where its probe leaves the exact KL out.
    reading = kl.kl_reading if f"{prefix}kl/{kl.kl_reading}" in entry else "k3"
    rows = [
        (label, number(name), number("kl/sequence") if name == f"kl/{reading}" else "")
        for name, label in _TOKEN_NAMES.items()
        if entry.get(f"{prefix}{name}") is not None
    ]
    if f"{prefix}kl/origin" in entry:
        rows.append(("k3, to the start of the run", number("kl/origin_token"), number("kl/origin")))
    for name in entry:
        if group := re.fullmatch(rf"{prefix}kl_groups/(.+)/sequence", name):
            of_group = f"kl_groups/{group[1]}"
            rows.append(
                (f"{reading}, of group {group[1]}", number(f"{of_group}/token"), number(f"{of_group}/sequence"))
            )
    if not rows:
        return None
    steps = max(int(logged.get("step", 0)) for logged in history)
    return Measured(f"{_source(kl, entry, prefix)}, logged at step {entry.get('step', '?')} of {steps}", rows)


def _last(history: list[dict]) -> tuple[dict, str]:
    """The log entry to read, and the prefix of its names."""
    for entry in reversed(history):
        if sets := evaluated_sets([entry], "kl/sequence"):
            return entry, sets[0]
    for wanted in ("kl/sequence", "kl", "kl/data_exact"):
        for entry in reversed(history):
            if wanted in entry:
                return entry, ""
    return {}, ""


def _source(kl: RecordedKL, entry: dict, prefix: str) -> str:
    count = entry.get(f"{prefix}kl/sequences")
    answers = "answers that the policy sampled" if count is None else f"{count:g} answers that the policy sampled"
    if prefix:
        split = set_name(prefix)
        return f"{answers} to held-out prompts{f' of {split}' if split else ''}"
    return f"{answers} to {'held-out prompts (the probe)' if kl.algorithm == 'dpo' else 'training prompts'}"


@dataclass(frozen=True)
class Results:
    """What the run raised: of which steps the first and the last value are, and (name, first, last) as text."""

    first: str
    last: str
    rows: list[tuple[str, str, str]]


def results(history: list[dict]) -> Results | None:
    """Every reward function's mean, or DPO's accuracy: held out where the run evaluated; None where none was logged.

    And the KL, unless it was measured at other steps: DPO's probe measures it now and then.
    """
    for pattern, where in ((f"({EVAL_PREFIX})", "held-out prompts"), ("()", "training batches")):
        gains = _logged(history, rf"{pattern}rewards/(?:(.+)/mean|accuracies)", "pairs ranked right", where)
        kls = _logged(history, f"{pattern}kl/sequence()", "KL to the reference, nats per sequence", where)
        if gains:
            ends = [next(iter(gains.values()))[place][0] for place in (0, -1)]
            steps = [end.get("step") for end in ends]
            rows = [(label, f"{found[0][1]:.3f}", f"{found[-1][1]:.3f}") for label, found in gains.items()]
            for label, found in kls.items():
                if [found[place][0].get("step") for place in (0, -1)] == steps:
                    first, last = (
                        _with_error(kl, entry.get(f"{name}_se")) for entry, kl, name in (found[0], found[-1])
                    )
                    rows.append((label, first, last))
            return Results(when(history, ends[0]), when(history, ends[1]), rows)
    return None


def _logged(history: list[dict], pattern: str, label: str, where: str) -> dict[str, list[tuple[dict, float, str]]]:
    """(entry, value, name) of each metric that fits, by what a card calls it; groups: of the set, own name or none."""
    wanted = re.compile(pattern)
    seen: dict[str, list[tuple[dict, float, str]]] = {}
    for entry in history:
        for name, value in entry.items():
            match = wanted.fullmatch(name)
            if match and isinstance(value, (int, float)):
                of_set = f" ({set_name(match[1])})" if set_name(match[1]) else ""
                seen.setdefault(f"{match[2] or label}{of_set}, {where}", []).append((entry, value, name))
    return seen


def _with_error(value: float | None, error: float | None) -> str:
    if not is_number(value):
        return "not measured"
    return f"{value:.3g} ± {error:.2g}" if is_number(error) else f"{value:.3g}"


def alarm_lines(events: list[dict]) -> list[str]:
    """The health alarms of a run, each once, with the step of its beginning."""
    return [f"{event['alarm']} at step {event['step']}" for event in events if "ends" not in event]


def read_versions(path: Path) -> dict[str, str]:
    """What `versions.json` holds; nothing where there is none."""
    try:
        versions = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return versions if isinstance(versions, dict) else {}
