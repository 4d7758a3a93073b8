"""The library form: measure, and get a dataset."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .passes.errors import MeasureError
from .passes.measurement import Measurement, run_measurement
from .passes.options import MeasureOptions
from .passes.processes import processes
from .statistics.tables import PolicyTokens, response_table
from .statistics.token_classes import load_classes


def measure_kl(
    data: str | Path | Dataset | Sequence[Mapping[str, Any]],
    reference: str,
    policies: Sequence[str] | str,
    *,
    output_dir: str | Path | None = None,
    **options: Any,
) -> Dataset:
    """Compare policies with a reference on given responses, token by token.

    Args:
        data: rows with `prompt` and `response`; see `trl_klx.measure.passes.responses.load_rows`.
        reference: folder, adapter or name on the Hub.
        policies: one or more, or patterns such as "runs/x/checkpoint-*".
        output_dir: where finished rows are kept, and an interrupted call continues from; None for a temporary
            folder, with one process.
        **options: fields of `trl_klx.measure.passes.options.MeasureOptions`.

    Returns:
        A dataset with a row per policy and response. T is the response's tokens, p the policy, r the reference.

        - `policy`, `response` (its row in the data), `id`, `group`, `correct`, `num_tokens` (T);
        - lists of T: `token_ids`, `tokens` (text), `class`, `spike`; in nats `kl_policy_ref` = KL(p || r),
          `kl_ref_policy` = KL(r || p), `js`, `log_ratio` = log p(token) - log r(token), `entropy_policy`,
          `entropy_ref`, `logp_policy`, `logp_ref`; `tv` from 0 to 1; `prob_policy`, `prob_ref`; `rank_policy`,
          `rank_ref` (1 is the most probable);
        - lists of T by 5, the most probable tokens first: `top_ids_policy`, `top_probs_policy`, `top_ids_ref`,
          `top_probs_ref`;
        - numbers of the response: `teacher_forced_sum_kl_...` and `teacher_forced_mean_...` (nats per response and per
          token), `unbiased_sequence_kl_...` (nats per response, null unless the model that the KL starts from is known
          to have sampled the response), `sum_log_ratio`, `max_kl_...`, `spikes`.

    Raises:
        MeasureError: options, data or reference cannot work, or no policy can be measured. A row or policy that alone
            cannot be used is left out with a warning.
    """
    if output_dir is None and processes().num_processes > 1:
        raise MeasureError("output_dir is missing: several processes need one folder that they share.")
    names = [policies] if isinstance(policies, str) else list(policies)
    with tempfile.TemporaryDirectory() as temporary:
        settings = MeasureOptions(
            reference=reference, policies=names, output_dir=str(output_dir or temporary), **options
        )
        done = run_measurement(data, settings)
        for reason in (*done.left_out_models.values(), *(f"row {id}: {why}" for id, why in done.left_out_rows.items())):
            warnings.warn(f"left out: {reason}", stacklevel=2)
        done.check_measured()
        classes = load_classes(settings.token_classes)
        return Dataset(pa.concat_tables([_rows(PolicyTokens(done, source, classes), done) for source in done.policies]))


def _rows(policy: PolicyTokens, done: Measurement) -> pa.Table:
    table, numbers = policy.table, response_table(done, policy)
    for name, values in (("class", policy.classes), ("spike", policy.spikes)):
        table = table.append_column(name, pa.ListArray.from_arrays([*policy.starts, len(values)], pa.array(values)))
    for name in numbers.columns.drop(table.column_names, errors="ignore"):
        table = table.append_column(name, pa.array(numbers[name]))
    return table.combine_chunks()
