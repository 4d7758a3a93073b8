"""From tokens to tables: per response, per checkpoint, by class and position, right against wrong, what moved most.

A KL's name says what it is. On responses that model A sampled, the sum of KL(A || B) over a response is an unbiased
estimate of the sequence KL from A to B, and is called `unbiased_sequence_kl_...`; it is null where it is not known that
A sampled. Everything else is a diagnostic of given prefixes, and is called `teacher_forced_...`.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from .classes import classify
from .compute import REFERENCE, Measurement
from .models import Source
from .spikes import spike_threshold
from .uncertainty import Z95, difference, ratio

DIRECTIONS = ("kl_policy_ref", "kl_ref_policy")
AVERAGED = (*DIRECTIONS, "js", "tv", "log_ratio", "entropy_policy", "entropy_ref")
QUANTILES = (0.5, 0.9, 0.99)
SUBSETS = {"all": None, "right": True, "wrong": False}
POSITIONS = 24  # points of a curve, at most
MOVED = 40  # tokens per checkpoint
CONTEXT = 12  # tokens on either side


@dataclass(frozen=True)
class Summary:
    """Tables of a measurement; nats, and `_se` for standard errors over groups."""

    responses: pd.DataFrame
    checkpoints: pd.DataFrame
    right_wrong: pd.DataFrame
    classes: pd.DataFrame
    positions: pd.DataFrame
    moved: pd.DataFrame
    pairwise: pd.DataFrame

    def write(self, folder: Path) -> None:
        """One Parquet file per table."""
        folder.mkdir(parents=True, exist_ok=True)
        for table in fields(self):
            getattr(self, table.name).to_parquet(folder / f"{table.name}.parquet", index=False)


class PolicyTokens:
    """All tokens of one policy as flat arrays, (N,), in the order of the responses, (B,)."""

    def __init__(self, done: Measurement, source: Source, classes: dict[str, str]) -> None:
        self.label = source.label
        present = {item.row.index for item in done.encoded}
        table = done.store.read(source)
        # A folder may hold rows of an earlier, larger selection.
        self.table = table.filter(pa.array([index in present for index in table["response"].to_pylist()], pa.bool_()))
        self.lengths = self.table["num_tokens"].to_numpy().astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.groups = np.unique(
            np.array(self.table["group"].to_pylist(), dtype=object).astype(str), return_inverse=True
        )[1]
        self.group_count = int(self.groups.max()) + 1
        self.correct = np.array(self.table["correct"].to_pylist(), dtype=object)
        self.values = {name: self._flat(name).astype(np.float64) for name in AVERAGED}
        self.threshold = spike_threshold(self.values["kl_policy_ref"])
        self.spikes = self.values["kl_policy_ref"] > self.threshold
        self.texts, self.ids = self._flat("tokens"), self._flat("token_ids")
        special = set(done.tokenizer.all_special_ids)
        self.classes = np.array(classify(self.texts.tolist(), self.ids.tolist(), special, classes), dtype=object)
        self.positions = np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)

    def _flat(self, name: str) -> np.ndarray:
        return self.table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    def per_response(self, values: np.ndarray, tokens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of tokens per response, of those that the mask `tokens` keeps."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        if tokens is not None:
            owner, values = owner[tokens], values[tokens]
        return (
            np.bincount(owner, weights=values, minlength=len(self.lengths)),
            np.bincount(owner, minlength=len(self.lengths)).astype(np.float64),
        )

    def per_token(self, name: str, *, rows: np.ndarray | None = None, tokens: np.ndarray | None = None):
        """Mean per token, as an `Estimate`, over some rows or tokens."""
        totals, sizes = self.per_response(self.values[name], tokens)
        if rows is not None:
            totals, sizes = np.where(rows, totals, 0.0), np.where(rows, sizes, 0.0)
        return ratio(totals, sizes, self.groups, self.group_count)

    def per_sequence(self, name: str, rows: np.ndarray):
        """Mean sum per response, as an `Estimate`."""
        totals, _ = self.per_response(self.values[name])
        return ratio(np.where(rows, totals, 0.0), rows.astype(np.float64), self.groups, self.group_count)


def unbiased_direction(done: Measurement, label: str) -> str | None:
    """Which of `DIRECTIONS`, summed over a response, is an unbiased sequence KL; None where neither is known to be.

    A sample of which rows had to be left out is none: what was left out is not like the rest.
    """
    if done.left_out_rows:
        return None
    if done.sampler == REFERENCE:
        return "kl_ref_policy"
    return "kl_policy_ref" if done.sampler == label else None


def notes(done: Measurement) -> list[str]:
    """What the numbers are, in sentences."""
    left_out = [f"Left out: {why}" for why in done.left_out_models.values()]
    if done.left_out_rows:
        left_out.insert(0, f"{len(done.left_out_rows)} rows were left out.")
    if done.sampler is None:
        truth = (
            "It was not said which model sampled the responses (sampled_from), so no sum here is a sequence KL: all "
            "are teacher-forced diagnostics of how the models differ at these prefixes."
        )
    elif done.left_out_rows:
        truth = (
            f"The responses are of {done.sampler}, but rows were left out, so that the rest is no sample of it: no sum "
            "here is an unbiased sequence KL."
        )
    else:
        truth = (
            f"The responses were sampled from {done.sampler}: the sum over a response of KL({done.sampler} || other) "
            "is an unbiased estimate of that sequence KL; every other number is a teacher-forced diagnostic."
        )
    return [truth, *left_out]


def summarise(done: Measurement, policies: list[PolicyTokens], pairwise: pd.DataFrame) -> Summary:
    """All tables, from the tokens of every policy."""
    return Summary(
        responses=pd.concat([response_table(done, policy) for policy in policies], ignore_index=True),
        checkpoints=pd.DataFrame([row for policy in policies for row in _checkpoint(done, policy)]),
        right_wrong=pd.DataFrame(
            [row for policy in policies for row in _right_wrong(policy)],
            columns=["policy", "measure", "right", "wrong", "difference", "se", "low", "high"],
        ),
        classes=pd.DataFrame([row for policy in policies for row in _classes(policy)]),
        positions=pd.DataFrame([row for policy in policies for row in _positions(policy)]),
        moved=pd.DataFrame([row for policy in policies for row in _moved(policy)]),
        pairwise=pairwise,
    )


def response_table(done: Measurement, policy: PolicyTokens) -> pd.DataFrame:
    """Numbers per response of one policy."""
    table = policy.table.select(["policy", "response", "id", "group", "correct", "num_tokens"]).to_pandas()
    unbiased = unbiased_direction(done, policy.label)
    sums = {name: policy.per_response(values)[0] for name, values in policy.values.items()}
    for name in DIRECTIONS:
        table[f"teacher_forced_sum_{name}"] = sums[name]
        table[f"unbiased_sequence_{name}"] = sums[name] if name == unbiased else np.nan
    for name, values in sums.items():
        table[f"teacher_forced_mean_{name}"] = values / policy.lengths
    table["sum_log_ratio"] = sums["log_ratio"]
    for name in DIRECTIONS:
        table[f"max_{name}"] = np.maximum.reduceat(policy.values[name], policy.starts)
    table["spikes"] = policy.per_response(policy.spikes.astype(np.float64))[0].astype(int)
    return table


def _checkpoint(done: Measurement, policy: PolicyTokens) -> list[dict]:
    out = []
    for subset, correct in SUBSETS.items():
        rows = np.ones(len(policy.lengths), bool) if correct is None else policy.correct == correct
        rows = rows.astype(bool)
        if not rows.any():
            continue
        tokens = np.repeat(rows, policy.lengths)
        row: dict = {"policy": policy.label, "subset": subset, "responses": int(rows.sum())}
        row |= {"groups": len(np.unique(policy.groups[rows])), "tokens": int(tokens.sum())}
        for name in AVERAGED:
            estimate = policy.per_token(name, rows=rows)
            row[f"teacher_forced_mean_{name}"], row[f"teacher_forced_mean_{name}_se"] = estimate.mean, estimate.se
        for name in DIRECTIONS:
            estimate = policy.per_sequence(name, rows)
            # Right responses are no sample of the model: what it says there is of the prefixes, not of the model.
            known = name == unbiased_direction(done, policy.label) and subset == "all"
            row[f"teacher_forced_sum_{name}"], row[f"teacher_forced_sum_{name}_se"] = estimate.mean, estimate.se
            row[f"unbiased_sequence_{name}"] = estimate.mean if known else math.nan
            row[f"unbiased_sequence_{name}_se"] = estimate.se if known else math.nan
            for quantile in QUANTILES:
                row[f"{name}_p{100 * quantile:g}"] = float(np.quantile(policy.values[name][tokens], quantile))
            row[f"{name}_max"] = float(policy.values[name][tokens].max())
        row["spikes"], row["spike_threshold"] = int(policy.spikes[tokens].sum()), policy.threshold
        out.append(row)
    return out


def _right_wrong(policy: PolicyTokens) -> list[dict]:
    """Wrong less right, mean per token, with 95 % intervals; nothing where one of the two is missing."""
    right, wrong = ((policy.correct == value).astype(bool) for value in (True, False))
    if not (right.any() and wrong.any()):
        return []
    out = []
    for name in AVERAGED:
        estimates = {"right": policy.per_token(name, rows=right), "wrong": policy.per_token(name, rows=wrong)}
        gap, se = difference(estimates["wrong"], estimates["right"])
        row = {"policy": policy.label, "measure": name, "difference": gap, "se": se}
        row |= {side: estimate.mean for side, estimate in estimates.items()}
        out.append({**row, "low": gap - Z95 * se, "high": gap + Z95 * se})
    return out


def _classes(policy: PolicyTokens) -> list[dict]:
    out, whole = [], policy.values["kl_policy_ref"].sum()
    for name in sorted(set(policy.classes)):
        tokens = policy.classes == name
        row: dict = {"policy": policy.label, "class": name, "tokens": int(tokens.sum())}
        for measure in DIRECTIONS:
            estimate = policy.per_token(measure, tokens=tokens)
            row[f"teacher_forced_mean_{measure}"], row[f"teacher_forced_mean_{measure}_se"] = estimate.mean, estimate.se
        row["share_of_kl_policy_ref"] = float(policy.values["kl_policy_ref"][tokens].sum() / whole) if whole else 0.0
        row["spikes"] = int(policy.spikes[tokens].sum())
        out.append(row)
    return out


def _positions(policy: PolicyTokens) -> list[dict]:
    """By token of the response, in stretches of equal length; `position` is the first token of one, from 0 on."""
    width = max(1, math.ceil((int(policy.positions.max()) + 1) / POSITIONS))
    out = []
    for stretch in np.unique(policy.positions // width):
        tokens = policy.positions // width == stretch
        row: dict = {"policy": policy.label, "position": int(stretch * width), "tokens": int(tokens.sum())}
        for measure in DIRECTIONS:
            estimate = policy.per_token(measure, tokens=tokens)
            row[f"teacher_forced_mean_{measure}"], row[f"teacher_forced_mean_{measure}_se"] = estimate.mean, estimate.se
        out.append(row)
    return out


def _moved(policy: PolicyTokens) -> list[dict]:
    """The tokens with the largest KL(policy || reference), with what stands around them."""
    values = policy.values["kl_policy_ref"]
    order = np.argsort(-values, kind="stable")[:MOVED]
    owners = np.searchsorted(policy.starts, order, side="right") - 1
    info = policy.table.select(["response", "id", "correct"]).to_pylist()
    out = []
    for place, owner in zip(order.tolist(), owners.tolist(), strict=True):
        if values[place] <= 0:
            break
        start, end = policy.starts[owner], policy.starts[owner] + policy.lengths[owner]
        out.append(
            {
                "policy": policy.label,
                **info[owner],
                "position": int(policy.positions[place]),
                "class": policy.classes[place],
                "token": policy.texts[place],
                "before": "".join(policy.texts[max(start, place - CONTEXT) : place]),
                "after": "".join(policy.texts[place + 1 : min(end, place + 1 + CONTEXT)]),
                **{name: float(policy.values[name][place]) for name in (*DIRECTIONS, "log_ratio")},
                "spike": bool(policy.spikes[place]),
            }
        )
    return out
