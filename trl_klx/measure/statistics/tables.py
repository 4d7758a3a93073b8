"""From tokens to tables: per response, per checkpoint, by class and position, right against wrong, what moved most.

A KL's name tells what it is. On responses that model A sampled, the sum of KL(A || B) over a response is an unbiased
estimate of the sequence KL from A to B, and is called `unbiased_sequence_kl_...`; it is null where it is not known that
A sampled. Everything else is a diagnostic of given prefixes, and is called `teacher_forced_...`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from ...monitor.uncertainty import Z95, Estimate, difference, ratio
from ..passes.measurement import REFERENCE, Measurement
from ..passes.models import Source
from .spikes import spike_threshold
from .token_classes import classify

DIRECTIONS = ("kl_policy_ref", "kl_ref_policy")
AVERAGED = (*DIRECTIONS, "js", "tv", "log_ratio", "entropy_policy", "entropy_ref")
QUANTILES = (0.5, 0.9, 0.99)
SUBSETS = {"all": None, "right": True, "wrong": False}
POSITIONS = 24  # points of a curve, at most
MOVED = 40  # tokens per checkpoint
CONTEXT = 12  # tokens on either side


@dataclass(frozen=True)
class Tables:
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
        self.owners = np.repeat(np.arange(len(self.lengths)), self.lengths)  # (N,) the response of each token
        self.positions = np.arange(len(self.owners)) - self.starts[self.owners]
        self.groups = np.unique(np.array(self.table["group"].to_pylist()).astype(str), return_inverse=True)[1]
        self.correct = np.array(self.table["correct"].to_pylist(), dtype=object)
        self.values = {name: self._flat(name).astype(np.float64) for name in AVERAGED}
        self.threshold = spike_threshold(self.values["kl_policy_ref"])
        self.spikes = self.values["kl_policy_ref"] > self.threshold
        self.texts = self._flat("tokens")
        special, ids = set(done.tokenizer.all_special_ids), self._flat("token_ids").tolist()
        self.classes = np.array(classify(self.texts.tolist(), ids, special, classes), dtype=object)

    def _flat(self, name: str) -> NDArray:
        return self.table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    def tokens_of(self, place: int) -> slice:
        """The tokens of one response."""
        return slice(self.starts[place], self.starts[place] + self.lengths[place])

    def sums(self, values: NDArray, tokens: NDArray | slice = slice(None)) -> NDArray:
        """(B,) sum per response, of the tokens that the mask keeps."""
        return np.bincount(self.owners[tokens], weights=values[tokens], minlength=len(self.lengths))

    def per_token(self, name: str, tokens: NDArray | slice = slice(None)) -> Estimate:
        """Mean per token, of the tokens that the mask keeps."""
        return self._ratio(self.sums(self.values[name], tokens), self.sums(np.ones(len(self.owners)), tokens))

    def per_sequence(self, name: str, rows: NDArray) -> Estimate:
        """Mean sum per response, of the responses that the mask keeps."""
        return self._ratio(np.where(rows, self.sums(self.values[name]), 0.0), rows.astype(np.float64))

    def _ratio(self, totals: NDArray, sizes: NDArray) -> Estimate:
        return ratio(*(np.bincount(self.groups, weights=column) for column in (totals, sizes)))


def unbiased_direction(done: Measurement, label: str) -> str | None:
    """Which of `DIRECTIONS`, summed over a response, is an unbiased sequence KL; None where neither is known to be.

    Where rows had to be left out neither is: what was left out is not like the rest.
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
        count = len(done.left_out_rows)
        left_out.insert(0, f"{count} row{'s were' if count > 1 else ' was'} left out.")
    if done.sampler is None:
        truth = (
            "It is not known which model sampled the responses (sampled_from), so no sum here is a sequence KL: all "
            "are teacher-forced diagnostics of how the models differ at these prefixes."
        )
    elif done.left_out_rows:
        truth = (
            f"The responses come from {done.sampler}, but rows were left out, so that the rest is not a sample of it: "
            f"no sum "
            "here is an unbiased sequence KL."
        )
    else:
        truth = (
            f"The responses were sampled from {done.sampler}: the sum over a response of KL({done.sampler} || other) "
            "is an unbiased estimate of that sequence KL; every other number is a teacher-forced diagnostic."
        )
    return [truth, *left_out]


def make_tables(done: Measurement, policies: list[PolicyTokens], pairwise: pd.DataFrame) -> Tables:
    """All tables, from the tokens of every policy."""
    return Tables(
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
    sums = {name: policy.sums(values) for name, values in policy.values.items()}
    for name in DIRECTIONS:
        table[f"teacher_forced_sum_{name}"] = sums[name]
        table[f"unbiased_sequence_{name}"] = sums[name] if name == unbiased else np.nan
    for name, values in sums.items():
        table[f"teacher_forced_mean_{name}"] = values / policy.lengths
    table["sum_log_ratio"] = sums["log_ratio"]
    for name in DIRECTIONS:
        table[f"max_{name}"] = np.maximum.reduceat(policy.values[name], policy.starts)
    table["spikes"] = policy.sums(policy.spikes).astype(int)
    return table


def _means(policy: PolicyTokens, names: tuple[str, ...], tokens: NDArray) -> dict[str, float]:
    """Each mean per token with its error."""
    out: dict[str, float] = {}
    for name in names:
        estimate = policy.per_token(name, tokens)
        out |= {f"teacher_forced_mean_{name}": estimate.mean, f"teacher_forced_mean_{name}_se": estimate.se}
    return out


def _checkpoint(done: Measurement, policy: PolicyTokens) -> Iterator[dict[str, Any]]:
    """All responses, the right ones and the wrong ones, as far as there are any."""
    for subset, correct in SUBSETS.items():
        rows = np.ones(len(policy.lengths), bool) if correct is None else (policy.correct == correct).astype(bool)
        if not rows.any():
            continue
        tokens = rows[policy.owners]
        row: dict[str, Any] = {"policy": policy.label, "subset": subset, "responses": int(rows.sum())}
        row |= {"groups": len(np.unique(policy.groups[rows])), "tokens": int(tokens.sum())}
        row |= _means(policy, AVERAGED, tokens)
        for name in DIRECTIONS:
            estimate, values = policy.per_sequence(name, rows), policy.values[name][tokens]
            # Right responses are not a sample of the model: the KL there describes the prefixes, not the model.
            known = name == unbiased_direction(done, policy.label) and subset == "all"
            row |= {f"teacher_forced_sum_{name}": estimate.mean, f"teacher_forced_sum_{name}_se": estimate.se}
            row[f"unbiased_sequence_{name}"] = estimate.mean if known else math.nan
            row[f"unbiased_sequence_{name}_se"] = estimate.se if known else math.nan
            row |= {f"{name}_p{100 * share:g}": float(np.quantile(values, share)) for share in QUANTILES}
            row[f"{name}_max"] = float(values.max())
        yield row | {"spikes": int(policy.spikes[tokens].sum()), "spike_threshold": policy.threshold}


def _right_wrong(policy: PolicyTokens) -> Iterator[dict[str, Any]]:
    """Wrong minus right, mean per token, with 95 % intervals; nothing where one of the two is missing."""
    right, wrong = ((policy.correct == value).astype(bool) for value in (True, False))
    if not (right.any() and wrong.any()):
        return
    for name in AVERAGED:
        of_right, of_wrong = (policy.per_token(name, rows[policy.owners]) for rows in (right, wrong))
        gap, se = difference(of_wrong, of_right)
        row = {"policy": policy.label, "measure": name, "right": of_right.mean, "wrong": of_wrong.mean}
        yield row | {"difference": gap, "se": se, "low": gap - Z95 * se, "high": gap + Z95 * se}


def _classes(policy: PolicyTokens) -> Iterator[dict[str, Any]]:
    whole = policy.values["kl_policy_ref"].sum()
    for name in sorted(set(policy.classes)):
        tokens = policy.classes == name
        row = {"policy": policy.label, "class": name, "tokens": int(tokens.sum()), **_means(policy, DIRECTIONS, tokens)}
        row["share_of_kl_policy_ref"] = float(policy.values["kl_policy_ref"][tokens].sum() / whole) if whole else 0.0
        yield row | {"spikes": int(policy.spikes[tokens].sum())}


def _positions(policy: PolicyTokens) -> Iterator[dict[str, Any]]:
    """By token of the response, in stretches of equal length; `position` is the first token of one, from 0 on."""
    width = max(1, math.ceil((int(policy.positions.max()) + 1) / POSITIONS))
    for stretch in np.unique(policy.positions // width):
        tokens = policy.positions // width == stretch
        row = {"policy": policy.label, "position": int(stretch * width), "tokens": int(tokens.sum())}
        yield row | _means(policy, DIRECTIONS, tokens)


def _moved(policy: PolicyTokens) -> Iterator[dict[str, Any]]:
    """The tokens with the largest KL(policy || reference), with what stands around them."""
    values = policy.values["kl_policy_ref"]
    info = policy.table.select(["response", "id", "correct"]).to_pylist()
    for place in np.argsort(-values, kind="stable")[:MOVED].tolist():
        if values[place] <= 0:
            break
        owner = policy.owners[place]
        start, end = policy.starts[owner], policy.starts[owner] + policy.lengths[owner]
        yield {
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
