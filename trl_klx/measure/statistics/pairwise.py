"""The policies against each other, on some of the rows: KL(column || row), teacher-forced, in nats per token."""

import itertools
import json

import pandas as pd
import torch

from ...files import whole
from ..passes.divergence import chunked_token_statistics
from ..passes.measurement import Measurement, paired_rows
from ..passes.models import Source
from ..passes.processes import processes
from ..passes.store import file_name


def pairwise_kl(done: Measurement) -> pd.DataFrame:
    """Mean KL per token of every policy to every other; columns `policy`, `other`, `kl` = KL(policy || other).

    From the hidden states and heads that each policy left on disk for `paired_rows`: two heads are held at a time. A
    finished pair is a file, and not computed again.
    """
    count = len(paired_rows(done))
    folder, state = done.store.folder / "pairwise", processes()
    files = {
        (first, second): folder / f"{count}-{file_name(first.label)}--{file_name(second.label)}.json"
        for first, second in itertools.combinations(done.policies if count else [], 2)
    }
    for pair, path in list(files.items())[state.process_index :: state.num_processes]:
        if not path.is_file():
            rows = _compare(done, *pair)
            with whole(path) as partial:
                partial.write_text(json.dumps(rows))
    state.wait_for_everyone()
    rows = [{"policy": source.label, "other": source.label, "kl": 0.0} for source in done.policies if count]
    for path in files.values():
        rows += json.loads(path.read_text())
    return pd.DataFrame(rows, columns=["policy", "other", "kl"])


@torch.no_grad()
def _compare(done: Measurement, first: Source, second: Source) -> list[dict]:
    """Two rows of the table: from the first to the second, and back."""
    store, device = done.store, processes().device
    heads = [store.load_head(source.label) for source in (first, second)]
    for head in heads:
        head.module.to(device)
    forth, back, tokens = 0.0, 0.0, 0
    for item in paired_rows(done):
        states = [store.load_hidden(source.label, item.row.index).to(device) for source in (first, second)]
        statistics = chunked_token_statistics(
            *(heads[0], states[0]),
            *(heads[1], states[1]),
            torch.tensor(item.response_ids, device=device),
            vocab_size=int(heads[0](states[0][:1]).size(-1)),
            chunk_size=done.options.chunk_size,
        )
        forth += float(statistics.kl_policy_ref.double().sum())
        back += float(statistics.kl_ref_policy.double().sum())
        tokens += len(item.response_ids)
    return [
        {"policy": first.label, "other": second.label, "kl": forth / tokens},
        {"policy": second.label, "other": first.label, "kl": back / tokens},
    ]
