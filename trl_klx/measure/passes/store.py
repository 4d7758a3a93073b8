"""What a measurement keeps on disk: finished rows, which are never computed again, and the reference's hidden states.

Every file is written whole or not at all, and a finished row is one that is in a file. Several processes share the
folder; no two write one row.
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

from ...files import whole
from ...kl.logits import LogitTransform
from .divergence import TokenStatistics
from .errors import MeasureError
from .models import Head, Source


def _per_token(name: str) -> pa.DataType:
    value = pa.int32() if name.startswith(("rank_", "top_ids_")) else pa.float32()
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


def file_name(label: str) -> str:
    """A label as the name of a file or folder."""
    return re.sub(r"[^\w.-]+", "_", label)


class Store:
    """The folder of one measurement."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def open(self, settings: Mapping[str, Any], *, write: bool) -> None:
        """Take the folder for these settings, or continue with what it holds of them.

        Args:
            settings: what every finished row depends on, but for its policy.
            write: whether this process is the one that writes them.

        Raises:
            MeasureError: the folder holds a measurement with other settings.
        """
        path = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        found = json.loads(path.read_text()) if path.is_file() else wanted
        if found != wanted:
            name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
            raise MeasureError(
                f"output_dir={str(self.folder)!r} holds a measurement with {name}={found.get(name)!r}, and this one "
                f"has {wanted.get(name)!r}: give another output_dir, or delete it."
            )
        if write and not path.is_file():
            with whole(path) as partial:
                partial.write_text(json.dumps(wanted, indent=2) + "\n")

    # --- finished rows ---

    def _policy_folder(self, source: Source) -> Path:
        return self.folder / "tokens" / file_name(source.label)

    def open_policy(self, source: Source, *, write: bool) -> None:
        """Refuse to mix rows of a checkpoint with those of another one under its name; `write` as in `open`."""
        path, wanted = self._policy_folder(source) / "policy.json", source.fingerprint()
        if path.is_file() and json.loads(path.read_text())["fingerprint"] != wanted:
            raise MeasureError(
                f"output_dir={str(self.folder)!r} holds rows of {source.label!r} from before its files changed: "
                f"delete {path.parent} to measure it again."
            )
        if write and not path.is_file():
            with whole(path) as partial:
                content = {"label": source.label, "name": source.name, "fingerprint": wanted}
                partial.write_text(json.dumps(content) + "\n")

    def _parts(self, source: Source) -> list[Path]:
        return sorted(self._policy_folder(source).glob("part-*.parquet"))

    def finished(self, source: Source) -> set[int]:
        """The responses whose rows are there."""
        columns = (pq.read_table(path, columns=["response"])[0] for path in self._parts(source))
        return {index for column in columns for index in column.to_pylist()}

    def add(self, source: Source, rows: list[dict[str, Any]]) -> None:
        """Add rows of `SCHEMA`, one per response, as one part."""
        first = min(row["response"] for row in rows)
        with whole(self._policy_folder(source) / f"part-{first:08d}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial, compression="zstd")

    def read(self, source: Source) -> pa.Table:
        """All rows of a policy, in the order of the responses."""
        tables = [pq.read_table(path) for path in self._parts(source)]
        return (pa.concat_tables(tables) if tables else SCHEMA.empty_table()).sort_by("response")

    # --- hidden states ---

    def _tensors(self, label: str, name: str) -> Path:
        return self.folder / "hidden" / file_name(label) / f"{name}.safetensors"

    def has_hidden(self, label: str, response: int) -> bool:
        return self._tensors(label, f"{response:08d}").is_file()

    def save_hidden(self, label: str, response: int, hidden: Tensor) -> None:
        with whole(self._tensors(label, f"{response:08d}")) as partial:
            save_file({"hidden": hidden.cpu()}, partial)

    def load_hidden(self, label: str, response: int) -> Tensor:
        return load_file(self._tensors(label, f"{response:08d}"))["hidden"]

    def has_head(self, label: str) -> bool:
        return self._tensors(label, "head").is_file()

    def save_head(self, label: str, head: Head) -> None:
        """Its module must be a plain linear layer, which is saved as weights: a folder may come from anywhere."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in head.module.named_parameters()}
        with whole(self._tensors(label, "head")) as partial:
            save_file(tensors, partial, metadata={"head": json.dumps(head.transform._asdict())})

    def load_head(self, label: str) -> Head:
        with safe_open(self._tensors(label, "head"), framework="pt") as file:
            numbers = json.loads(file.metadata()["head"])
            tensors = {key: nn.Parameter(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118  (no mapping)
        outputs, inputs = tensors["weight"].shape
        module = nn.Linear(inputs, outputs, bias="bias" in tensors, device="meta")
        module.load_state_dict(tensors, assign=True)
        return Head(module, LogitTransform(**numbers))
