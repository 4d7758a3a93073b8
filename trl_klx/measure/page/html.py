"""One HTML page that needs nothing else: a summary, every response as a heatmap, what moved most.

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

from ..passes.measurement import Measurement
from ..statistics.spikes import RULE
from ..statistics.tables import PolicyTokens, Tables, notes
from .pictures import class_bars, course, position_curves, right_wrong, svg

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


def write_page(done: Measurement, policies: list[PolicyTokens], tables: Tables) -> Path:
    """Write `report.html` and return its path."""
    responses = len(policies[0].lengths)
    count = min(done.options.report_responses, responses)
    shown = [place * responses // count for place in range(count)]
    sentences = notes(done)
    if count < responses:
        sentences.append(f"The tables are of all {responses} responses; {count} of them are shown individually.")
    names = sorted({name for policy in policies for name in policy.classes})
    loader = jinja2.PackageLoader("trl_klx.measure.page", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment.filters["with_error"] = _with_error
    page = environment.get_template("page.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        reference=done.reference.name,
        tables=tables,
        notes=sentences,
        rule=RULE,
        pictures=_pictures(tables, [policy.label for policy in policies]),
        pairwise=_matrix(tables),
        metrics=METRICS,
        classes=names,
        data=_overview(done, policies, tables, shown, names),
        blocks=[(place, _pack(_response(done, policies, place, names))) for place in shown],
    )
    path = done.store.folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _with_error(row: dict[str, Any], name: str) -> str:
    """A mean with the digits that its standard error leaves it."""
    value, error = row[name], row[f"{name}_se"]
    if not math.isfinite(value):
        return "-"
    if not (math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    digits = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _pictures(tables: Tables, labels: list[str]) -> list[tuple[str, str, Markup]]:
    """(title, what it shows in words, SVG)"""
    out = [
        (
            "KL to the reference, by checkpoint",
            "Line chart of the KL in nats per token over the checkpoints: a line for each direction, 95 % intervals",
            svg("course", course, tables.checkpoints),
        ),
        (
            "KL(P || R) along the response",
            "Line chart of the KL in nats over the place of the token: a line for each checkpoint, 95 % bands",
            svg("positions", position_curves, tables.positions, labels),
        ),
        (
            f"KL(P || R) by class of token (how many), {labels[-1]}",
            "Bar chart of the KL in nats per token: a bar for each class of token, 95 % intervals",
            svg("classes", class_bars, tables.classes, labels[-1]),
        ),
    ]
    if len(tables.right_wrong):
        words = "Point chart of the difference in nats per token over the checkpoints, 95 % intervals"
        picture = svg("rightwrong", right_wrong, tables.right_wrong)
        out.append(("KL(P || R) of wrong minus right responses", words, picture))
    return out


def _matrix(tables: Tables) -> list[tuple[str, list[tuple[float, float]]]]:
    """Rows of (KL, strength of its colour) between the policies; nothing for one alone."""
    labels = list(dict.fromkeys(tables.pairwise["policy"]))
    if len(labels) < 2:
        return []
    kl = {(row.policy, row.other): row.kl for row in tables.pairwise.itertuples()}
    largest = max((value for value in kl.values() if math.isfinite(value)), default=0.0) or 1.0
    return [
        (label, [(kl[label, other], 0.85 * min(1.0, kl[label, other] / largest)) for other in labels])
        for label in labels
    ]


def _overview(
    done: Measurement, policies: list[PolicyTokens], tables: Tables, shown: list[int], names: list[str]
) -> dict[str, Any]:
    """What the page's script needs at once."""
    first = policies[0]
    ids = {item.row.index: item.response_ids for item in done.encoded}
    means = {name: [policy.sums(policy.values[name]) / policy.lengths for policy in policies] for name in METRICS}
    spikes = [policy.sums(policy.spikes) for policy in policies]
    info = first.table.select(["response", "id", "group", "correct", "num_tokens"]).to_pylist()
    responses = [
        {
            "place": place,
            "id": info[place]["id"],
            "correct": info[place]["correct"],
            "tokens": info[place]["num_tokens"],
            "means": {name: [_short(values[place]) for values in means[name]] for name in METRICS},
            "spikes": [int(counts[place]) for counts in spikes],
            "classes": sorted({names.index(name) for name in first.classes[first.tokens_of(place)]}),
            "text": str(done.tokenizer.decode(ids[info[place]["response"]])),
        }
        for place in shown
    ]
    places = {info[place]["response"]: place for place in shown}
    moved = [row for row in tables.moved.to_dict("records") if row["response"] in places]
    return {
        "policies": [policy.label for policy in policies],
        "classes": names,
        "scales": {name: _scale(name, policies) for name in METRICS},
        "responses": responses,
        "moved": [
            {**{key: _plain(value) for key, value in row.items()}, "place": places[row["response"]]} for row in moved
        ],
    }


def _scale(name: str, policies: list[PolicyTokens]) -> float:
    """The value of the fullest colour: one for all checkpoints, so that the slider shows what grows."""
    values = np.abs(np.concatenate([policy.values[name] for policy in policies]))
    return _short(max(float(np.quantile(values[np.isfinite(values)], 0.995)), 1e-9))


def _response(done: Measurement, policies: list[PolicyTokens], place: int, names: list[str]) -> dict[str, Any]:
    """All that is shown of one response; tokens of the top lists are numbers into `words`."""
    first = policies[0]
    tokens = first.tokens_of(place)
    prompts = {item.row.index: item.prompt_ids for item in done.encoded}
    words: dict[int, int] = {}

    def columns(policy: PolicyTokens, wanted: tuple[str, ...]) -> dict[str, Any]:
        row = policy.table.select(list(wanted)).slice(place, 1).to_pylist()[0]
        out = {}
        for name, values in row.items():
            if name.startswith("top_ids"):
                out["top_ids"] = [[words.setdefault(token, len(words)) for token in top] for top in values]
            elif name.startswith("top_probs"):
                out["top_probs"] = [[_short(value) for value in top] for top in values]
            else:
                out[name] = [_short(value) for value in values]
        return out

    content: dict[str, Any] = {
        "prompt": str(done.tokenizer.decode(prompts[first.table["response"][place].as_py()])),
        "tokens": first.texts[tokens].tolist(),
        "classes": [names.index(name) for name in first.classes[tokens]],
        "reference": columns(first, _REFERENCE),
        "policies": [
            {**columns(policy, _POLICY), "spikes": np.flatnonzero(policy.spikes[tokens]).tolist()}
            for policy in policies
        ],
    }
    return content | {"words": [str(done.tokenizer.decode([token])) for token in words]}


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
