"""The options of a measurement, and every rule about them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import MeasureError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOWEST = {"batch_size": 1, "num_samples": 1, "max_new_tokens": 1, "pairwise": 0, "report_responses": 0}


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class MeasureOptions:
    """What to measure and how; the data come beside it."""

    reference: str = _option("", "Model that all are compared with: a folder, an adapter, a name on the Hub.")
    policies: list[str] = _option([], "Models to compare: folders, adapters, names, patterns as 'run/checkpoint-*'.")
    output_dir: str = _option("runs/measure", "Folder for tables, report and what an interrupted run continues from.")
    split: str = _option("train", "Split of a dataset on the Hub or in a folder.")
    where: str | None = _option(None, 'Rows to keep, as an expression over the columns: "not correct".')
    sampled_from: str | None = _option(
        None,
        "Which model sampled the responses, at this temperature and unfiltered: 'reference' or a policy. KL from that "
        "model is then an unbiased sequence KL.",
    )
    sample: str | None = _option(None, "Sample responses from 'reference' or a policy, instead of reading them.")
    num_samples: int = _option(1, "Responses sampled per prompt.")
    max_new_tokens: int = _option(256, "Longest sampled response, in tokens.")
    seed: int = _option(0, "Seed of the sampled responses.")
    temperature: float = _option(1.0, "Temperature of all models' logits, and of sampling.")
    add_eos: bool = _option(True, "Whether a response given as text ends with the end of text.")
    max_length: int | None = _option(None, "Leave out rows with more tokens, prompt included.")
    batch_size: int = _option(8, "Rows that run through a model together.")
    chunk_size: int | None = _option(None, "Tokens whose logits are held at once; by default 128 MiB of them on a CPU.")
    dtype: str = _option("float32", f"Type of the weights: {', '.join(DTYPES)}.")
    token_classes: str | None = _option(None, "YAML file of name: regular expression, ahead of the built-in classes.")
    report: bool = _option(True, "Whether to write report.html.")
    report_responses: int = _option(500, "Rows shown in report.html one by one, spread evenly over all.")
    pairwise: int = _option(32, "Rows on which the policies are compared with each other; 0 for none.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def check(self) -> None:
        """Raises MeasureError for a value that cannot be."""
        if not self.reference:
            raise MeasureError("reference is missing: name the model that all are compared with.")
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise MeasureError(f"{name}={getattr(self, name)} is too small: give {lowest} or more.")
        for name in ("chunk_size", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise MeasureError(f"{name}={getattr(self, name)} is too small: give 1 or more, or leave it out.")
        if not 0 < self.temperature < float("inf"):
            raise MeasureError(f"temperature={self.temperature} is not above 0: give 1.0, or what the sampler had.")
        if self.dtype not in DTYPES:
            raise MeasureError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}: name one of these.")
        if self.where and self.sampled_from:
            raise MeasureError(
                f"where={self.where!r} and sampled_from={self.sampled_from!r} exclude each other: rows that a "
                "condition keeps are not a sample of a model; leave out sampled_from, or select prompts in the data."
            )
        if self.sample and self.sampled_from:
            raise MeasureError(
                f"sample={self.sample!r} and sampled_from={self.sampled_from!r} exclude each other: sampled responses "
                "are known to come from the model that samples them."
            )
