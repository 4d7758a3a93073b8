"""`trl-klx measure`: parse, measure, then tables on the terminal, in Parquet and in one HTML page."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pandas as pd
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from ..launching import end_with_launcher
from .page.html import write_page
from .passes.errors import MeasureError
from .passes.measurement import Measurement, run_measurement
from .passes.options import MeasureOptions
from .passes.processes import processes
from .statistics.pairwise import pairwise_kl
from .statistics.tables import DIRECTIONS, PolicyTokens, Tables, make_tables, notes, unbiased_direction
from .statistics.token_classes import load_classes


@dataclass
class Data:
    """What to read."""

    data: str = field(
        default="", metadata={"help": "Responses: a .jsonl, .json or .parquet file, or a dataset of the Hub."}
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MeasureError(f"{message}; see `{self.prog} --help`.")


def command_parser(program: str) -> HfArgumentParser:
    """What the command takes."""
    return _Parser([DataClassType(Data), DataClassType(MeasureOptions)], prog=program, allow_abbrev=False)


def main(argv: list[str] | None = None, program: str = "measure_kl.py") -> int:
    """Returns the exit status: 0, 1 where a policy was left out, 2 for bad input."""
    end_with_launcher()
    try:
        data, options = _parse(command_parser(program), sys.argv[1:] if argv is None else argv)
        classes = load_classes(options.token_classes)
        start = time.perf_counter()
        with _quiet_transformers():
            done = run_measurement(data, options)
        if processes().is_main_process:
            _print_left_out(done)
        done.check_measured()
        pairwise = pairwise_kl(done)
        if processes().is_main_process:
            _finish(done, pairwise, classes, time.perf_counter() - start)
    except MeasureError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    state = processes()
    if state.num_processes > 1:  # in order: gloo aborts now and then when one leaves while another still talks
        state.wait_for_everyone()
        time.sleep(0.5)
        state.destroy_process_group()
    return 1 if done.left_out_models else 0


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Only errors of transformers are printed; its level is what it was afterwards, as it also decides whether a later
    training in this process has a progress bar."""
    transformers_logger = logging.getLogger("transformers")
    level = transformers_logger.level
    transformers_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logger.setLevel(level)


def _parse(parser: HfArgumentParser, argv: list[str]) -> tuple[str, MeasureOptions]:
    data, options, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"{unknown[0]!r} on the command line is not an option")
    if not data.data:
        raise MeasureError("data is missing: give a .jsonl or .parquet file with a row per response.")
    return data.data, options


def _print_left_out(done: Measurement) -> None:
    for why in done.left_out_models.values():
        print(f"left out: {why}", file=sys.stderr)
    by_reason: dict[str, list[str]] = {}
    for name, why in done.left_out_rows.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        print(f"left out {len(names)} of the rows ({shown}): {why}.", file=sys.stderr)


def _finish(done: Measurement, pairwise: pd.DataFrame, classes: dict[str, str], seconds: float) -> None:
    policies = [PolicyTokens(done, source, classes) for source in done.policies]
    tables, folder = make_tables(done, policies, pairwise), done.store.folder / "tables"
    tables.write(folder)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(checkpoints_table(done, tables))
    for line in (*notes(done), f"tables: {folder}"):
        console.print(line, highlight=False)
    if done.options.report:
        console.print(f"report: {write_page(done, policies, tables)}", highlight=False)
    console.print(f"{seconds:.1f} s", highlight=False)


def checkpoints_table(done: Measurement, tables: Tables) -> Table:
    """One line per checkpoint, and one each for its right and wrong responses."""
    rows = f"{tables.checkpoints['responses'].iloc[0]} responses, {tables.checkpoints['tokens'].iloc[0]} tokens"
    table = Table(
        title=f"against {done.reference.name}, on {rows}; nats, mean ± standard error",
        caption="P the policy, R the reference; per token, over the whole vocabulary, teacher-forced",
    )
    table.add_column("policy")
    for name in ("KL(P || R)", "KL(R || P)", "JS", "log P/R", "p99 KL(P || R)", "spikes"):
        table.add_column(name, justify="right")
    known = any(unbiased_direction(done, source.label) for source in done.policies)
    if known:
        table.add_column("unbiased sequence KL", justify="right")
    for row in tables.checkpoints.to_dict("records"):
        cells = [_mean(row, f"teacher_forced_mean_{name}") for name in (*DIRECTIONS, "js", "log_ratio")]
        cells += [f"{row['kl_policy_ref_p99']:.3f}", str(row["spikes"])]
        direction = unbiased_direction(done, row["policy"]) if row["subset"] == "all" else None
        if direction is not None:
            arrow = {"kl_policy_ref": "P || R", "kl_ref_policy": "R || P"}[direction]
            cells.append(f"{arrow} {_mean(row, f'unbiased_sequence_{direction}')}")
        elif known:
            cells.append("-")
        table.add_row(row["policy"] if row["subset"] == "all" else f"  {row['subset']}", *cells)
    return table


def _mean(row: dict[Any, Any], name: str) -> str:
    return f"{row[name]:.4f} ± {row[name + '_se']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
