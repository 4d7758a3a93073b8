"""What a measurement keeps on disk: finished rows, which are never computed again, and the reference's hidden states.

Every file is written whole or not at all (written beside its place, then renamed), and a finished row is one that is in
a file. Several processes share the folder; no two write one row.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..kl.logits import LogitTransform
from .divergence import TokenStatistics
from .errors import MeasureError
from .models import Head, Source

SETTINGS = "settings.json"
_WHOLE_NUMBERS = {"rank_policy", "rank_ref", "top_ids_policy", "top_ids_ref"}


def _per_token(name: str) -> pa.DataType:
    value = pa.int32() if name in _WHOLE_NUMBERS else pa.float32()
    return pa.list_(pa.list_(value)) if name.startswith("top_") else pa.list_(value)


SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("response", pa.int32()),
        ("id", pa.string()),
        ("group", pa.string()),
        ("correct", pa.bool_()),
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        *((name, _per_token(name)) for name in TokenStatistics._fields),
    ]
)


class Store:
    """The folder of one measurement."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def open(self, settings: Mapping[str, Any], *, write: bool) -> None:
        """Take the folder for these settings, or go on with what it holds of them.

        Args:
            settings: what every finished row depends on, but for its policy.
            write: whether this process is the one that writes them.

        Raises:
            MeasureError: the folder holds a measurement with other settings.
        """
        path = self.folder / SETTINGS
        found = json.loads(path.read_text()) if path.is_file() else None
        wanted = json.loads(json.dumps(settings))
        if found is not None and found != wanted:
            name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
            raise MeasureError(
                f"output_dir={str(self.folder)!r} holds a measurement with {name}={found.get(name)!r}, and this one "
                f"has {wanted.get(name)!r}: give another output_dir, or delete it."
            )
        if found is None and write:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(path, json.dumps(wanted, indent=2) + "\n")

    # --- finished rows ---

    def policy_folder(self, source: Source) -> Path:
        return self.folder / "tokens" / re.sub(r"[^\w.-]+", "_", source.label)

    def open_policy(self, source: Source, *, write: bool) -> None:
        """Refuse to mix rows of a checkpoint with those of another one under its name; `write` as in `open`."""
        path, wanted = self.policy_folder(source) / "policy.json", source.fingerprint()
        if path.is_file():
            if json.loads(path.read_text())["fingerprint"] != wanted:
                raise MeasureError(
                    f"output_dir={str(self.folder)!r} holds rows of {source.label!r} from before its files changed: "
                    f"delete {path.parent} to measure it anew."
                )
            return
        if write:
            _write_text(path, json.dumps({"label": source.label, "name": source.name, "fingerprint": wanted}) + "\n")

    def parts(self, source: Source) -> list[Path]:
        return sorted(self.policy_folder(source).glob("part-*.parquet"))

    def finished(self, source: Source) -> set[int]:
        """The responses whose rows are there."""
        return {
            index for path in self.parts(source) for index in pq.read_table(path, columns=["response"])[0].to_pylist()
        }

    def add(self, source: Source, rows: list[dict[str, Any]]) -> None:
        """Add rows of `SCHEMA`, one per response, as one part."""
        first = min(row["response"] for row in rows)
        path = self.policy_folder(source) / f"part-{first:08d}.parquet"
        unfinished = path.with_suffix(".unfinished")
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished, compression="zstd")
        unfinished.replace(path)

    def read(self, source: Source, columns: list[str] | None = None) -> pa.Table:
        """All rows of a policy, in the order of the responses."""
        tables = [pq.read_table(path, columns=columns) for path in self.parts(source)]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        return table.sort_by("response")

    # --- hidden states ---

    def has_hidden(self, name: str, response: int) -> bool:
        return self._hidden(name, response).is_file()

    def save_hidden(self, name: str, response: int, hidden: Tensor) -> None:
        path = self._hidden(name, response)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file({"hidden": hidden.cpu()}, unfinished)
        unfinished.replace(path)

    def load_hidden(self, name: str, response: int) -> Tensor:
        return load_file(self._hidden(name, response))["hidden"]

    def has_head(self, name: str) -> bool:
        return self._head(name).is_file()

    def save_head(self, name: str, head: Head) -> None:
        """Its module must be a plain linear layer, which is saved as weights: a folder may come from anywhere."""
        path = self._head(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in head.module.named_parameters()}
        numbers = json.dumps(head.transform._asdict())
        save_file(tensors, path.with_suffix(".unfinished"), metadata={"head": numbers})
        path.with_suffix(".unfinished").replace(path)

    def load_head(self, name: str) -> Head:
        with safe_open(self._head(name), framework="pt") as file:
            numbers = json.loads(file.metadata()["head"])
            tensors = {key: nn.Parameter(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118  (no mapping)
        outputs, inputs = tensors["weight"].shape
        module = nn.Linear(inputs, outputs, bias="bias" in tensors, device="meta")
        module.load_state_dict(tensors, assign=True)
        return Head(module, LogitTransform(**numbers))

    def _head(self, name: str) -> Path:
        return self._hidden(name, 0).with_name("head.safetensors")

    def _hidden(self, name: str, response: int) -> Path:
        return self.folder / "hidden" / re.sub(r"[^\w.-]+", "_", name) / f"{response:08d}.safetensors"


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
