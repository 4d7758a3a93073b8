"""One HTML page that needs nothing else: overview, every response as a heatmap, what moved most.

Each response is a compressed block of its own, unpacked by the browser when it is opened, so that hundreds fit.
"""

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from . import plots
from .compute import Measurement
from .spikes import RULE
from .summary import PolicyTokens, Summary, notes

PAGE = "report.html"
METRICS = {
    "kl_policy_ref": "KL(policy || reference), nats",
    "kl_ref_policy": "KL(reference || policy), nats",
    "js": "Jensen-Shannon, nats",
    "tv": "total variation",
    "log_ratio": "log-ratio, nats",
    "entropy_policy": "entropy of the policy, nats",
    "entropy_ref": "entropy of the reference, nats",
}
_POLICY = (*METRICS, "prob_policy", "rank_policy", "top_ids_policy", "top_probs_policy")
_REFERENCE = ("prob_ref", "rank_ref", "top_ids_ref", "top_probs_ref")


def write_report(done: Measurement, policies: list[PolicyTokens], summary: Summary) -> Path:
    """Write `report.html` and return its path."""
    count = min(done.options.report_responses, len(policies[0].lengths))
    shown = [place * len(policies[0].lengths) // count for place in range(count)]
    names = sorted({name for policy in policies for name in policy.classes})
    loader = jinja2.PackageLoader("trl_klx.measure", "page")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("page.html.j2").render(
        style=_file("page.css"),
        script=_file("page.js"),
        reference=done.reference.name,
        summary=summary,
        notes=_notes(done, shown, policies[0]),
        rule=RULE,
        pictures=_pictures(summary, [policy.label for policy in policies]),
        pairwise=_matrix(summary),
        metrics=METRICS,
        classes=names,
        data=_overview(done, policies, summary, shown, names),
        blocks=[(place, _pack(_response(done, policies, place, names))) for place in shown],
    )
    path = done.store.folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _file(name: str) -> Markup:
    return Markup((Path(__file__).parent / "page" / name).read_text(encoding="utf-8"))


def _notes(done: Measurement, shown: list[int], policy: PolicyTokens) -> list[str]:
    out = notes(done)
    if len(shown) < len(policy.lengths):
        out.append(f"The tables are of all {len(policy.lengths)} responses; {len(shown)} of them are shown one by one.")
    return out


def _pictures(summary: Summary, labels: list[str]) -> list[tuple[str, Markup]]:
    """(caption, SVG)"""
    out = [
        ("KL by checkpoint, with 95 % intervals", plots.plot(plots.course(summary.checkpoints), "course")),
        ("KL along the response", plots.plot(plots.position_curves(summary.positions, labels), "positions")),
        (f"KL by class of token, {labels[-1]}", plots.plot(plots.class_bars(summary.classes, labels[-1]), "classes")),
    ]
    if len(summary.right_wrong):
        caption = "Wrong less right responses, with 95 % intervals"
        out.append((caption, plots.plot(plots.right_wrong(summary.right_wrong), "rightwrong")))
    return out


def _matrix(summary: Summary) -> list[tuple[str, list[tuple[float, float]]]]:
    """Rows of (KL, strength of its colour) between the policies; nothing for one alone."""
    labels = list(dict.fromkeys(summary.pairwise["policy"]))
    if len(labels) < 2:
        return []
    values = {(row.policy, row.other): row.kl for row in summary.pairwise.itertuples()}
    largest = max((value for value in values.values() if math.isfinite(value)), default=0.0) or 1.0
    return [
        (label, [(values[label, other], 0.85 * min(1.0, values[label, other] / largest)) for other in labels])
        for label in labels
    ]


def _overview(
    done: Measurement, policies: list[PolicyTokens], summary: Summary, shown: list[int], names: list[str]
) -> dict[str, Any]:
    """What the page's script needs at once."""
    first = policies[0]
    by_index = {item.row.index: item for item in done.encoded}
    means = {
        name: [policy.per_response(policy.values[name])[0] / policy.lengths for policy in policies] for name in METRICS
    }
    spikes = [policy.per_response(policy.spikes.astype(float))[0] for policy in policies]
    info = first.table.select(["response", "id", "group", "correct", "num_tokens"]).to_pylist()
    responses = []
    for place in shown:
        tokens = slice(first.starts[place], first.starts[place] + first.lengths[place])
        responses.append(
            {
                "place": place,
                "id": info[place]["id"],
                "correct": info[place]["correct"],
                "tokens": info[place]["num_tokens"],
                "means": {name: [_short(values[place]) for values in means[name]] for name in METRICS},
                "spikes": [int(values[place]) for values in spikes],
                "classes": sorted({names.index(name) for name in first.classes[tokens]}),
                "text": str(done.tokenizer.decode(by_index[info[place]["response"]].response_ids)),
            }
        )
    visible = {info[place]["response"]: place for place in shown}
    moved = summary.moved[summary.moved["response"].isin(visible)].to_dict("records") if len(summary.moved) else []
    return {
        "policies": [policy.label for policy in policies],
        "classes": names,
        "scales": {name: _scale(name, policies) for name in METRICS},
        "responses": responses,
        "moved": [
            {**{key: _plain(value) for key, value in row.items()}, "place": visible[row["response"]]} for row in moved
        ],
    }


def _scale(name: str, policies: list[PolicyTokens]) -> float:
    """The value of the fullest colour: one for all checkpoints, so that the slider shows what grows."""
    values = np.abs(np.concatenate([policy.values[name] for policy in policies]))
    return _short(max(float(np.quantile(values[np.isfinite(values)], 0.995)), 1e-9))


def _response(done: Measurement, policies: list[PolicyTokens], place: int, names: list[str]) -> dict[str, Any]:
    """All that is shown of one response; tokens of the top lists are numbers into `words`."""
    first = policies[0]
    tokens = slice(first.starts[place], first.starts[place] + first.lengths[place])
    item = next(item for item in done.encoded if item.row.index == first.table["response"][place].as_py())
    words: dict[int, int] = {}

    def columns(policy: PolicyTokens, wanted: tuple[str, ...]) -> dict[str, Any]:
        row = policy.table.select(list(wanted)).slice(place, 1).to_pylist()[0]
        for name in wanted:
            if name.startswith("top_ids"):
                row[name] = [[words.setdefault(token, len(words)) for token in top] for top in row[name]]
            elif name.startswith("top_probs"):
                row[name] = [[_short(value) for value in top] for top in row[name]]
            else:
                row[name] = [_short(value) for value in row[name]]
        return {
            name.removesuffix("_policy").removesuffix("_ref") if "top" in name else name: row[name] for name in wanted
        }

    out: dict[str, Any] = {
        "prompt": str(done.tokenizer.decode(item.prompt_ids)),
        "tokens": first.texts[tokens].tolist(),
        "classes": [names.index(name) for name in first.classes[tokens]],
        "reference": columns(first, _REFERENCE),
        "policies": [
            {**columns(policy, _POLICY), "spikes": np.flatnonzero(policy.spikes[tokens]).tolist()}
            for policy in policies
        ],
    }
    out["words"] = [str(done.tokenizer.decode([token])) for token in words]
    return out


def _short(value: float) -> Any:
    """Three digits, as the page shows them; null for what JSON has no number for."""
    number = float(value)
    return float(f"{number:.3g}") if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return _short(value) if isinstance(value, float) else value


def _pack(content: dict[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
