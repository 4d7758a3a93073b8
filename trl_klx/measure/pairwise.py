"""The policies against each other, on some of the rows: KL(column || row), teacher-forced, in nats per token."""

import itertools
import json
import re

import pandas as pd
import torch

from .compute import Measurement, paired_rows
from .divergence import chunked_token_statistics
from .models import Source
from .processes import processes


def pairwise_kl(done: Measurement) -> pd.DataFrame:
    """Mean KL per token of every policy to every other; columns `policy`, `other`, `kl` = KL(policy || other).

    From the hidden states and heads that each policy left on disk for `paired_rows`: two heads are held at a time. A
    finished pair is a file, and not computed again.
    """
    items = paired_rows(done)
    pairs = list(itertools.combinations(done.policies, 2)) if items else []
    state = processes()
    for first, second in pairs[state.process_index :: state.num_processes]:
        if not _file(done, first, second).is_file():
            _compare(done, first, second)
    state.wait_for_everyone()
    rows = [{"policy": source.label, "other": source.label, "kl": 0.0} for source in done.policies if items]
    for first, second in pairs:
        rows += json.loads(_file(done, first, second).read_text())
    return pd.DataFrame(rows, columns=["policy", "other", "kl"])


@torch.no_grad()
def _compare(done: Measurement, first: Source, second: Source) -> None:
    items, store, device = paired_rows(done), done.store, processes().device
    heads = [store.load_head(source.label) for source in (first, second)]
    for head in heads:
        head.module.to(device)
    totals, tokens = [0.0, 0.0], 0
    for item in items:
        states = [store.load_hidden(source.label, item.row.index).to(device) for source in (first, second)]
        statistics = chunked_token_statistics(
            heads[0],
            states[0],
            heads[1],
            states[1],
            torch.tensor(item.response_ids, device=device),
            vocab_size=int(heads[0](states[0][:1]).size(-1)),
            chunk_size=done.options.chunk_size,
        )
        totals[0] += float(statistics.kl_policy_ref.double().sum())
        totals[1] += float(statistics.kl_ref_policy.double().sum())
        tokens += len(item.response_ids)
    rows = [
        {"policy": first.label, "other": second.label, "kl": totals[0] / tokens},
        {"policy": second.label, "other": first.label, "kl": totals[1] / tokens},
    ]
    path = _file(done, first, second)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".unfinished").write_text(json.dumps(rows))
    path.with_suffix(".unfinished").replace(path)


def _file(done: Measurement, first: Source, second: Source):
    labels = "--".join(re.sub(r"[^\w.-]+", "_", source.label) for source in (first, second))
    return done.store.folder / "pairwise" / f"{len(paired_rows(done))}-{labels}.json"
