"""Models to compare: which names mean which, whether they fit together, and their hidden states at the response."""

import glob
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ...kl.logits import LogitTransform
from ...wording import first_line
from .errors import MeasureError, ModelError
from .responses import Encoded


@dataclass(frozen=True)
class Source:
    """A model by name: what tables call it, and where it is."""

    label: str
    name: str  # folder, or name on the Hub, with `@revision` where one is meant

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` takes."""
        name, _, revision = self.name.partition("@")
        local = Path(self.name).exists() or not revision
        return {"pretrained_model_name_or_path": self.name if local else name, "revision": None if local else revision}

    def fingerprint(self) -> str:
        """Changes when the files of a local model do: a checkpoint that was written again is another one."""
        folder = Path(self.name)
        files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
        stated = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr([str(folder.resolve()) if files else self.name, stated]).encode()).hexdigest()[:16]


def resolve(names: Sequence[str]) -> list[Source]:
    """Expand patterns such as `runs/x/checkpoint-*`, in the order of their numbers, and give each a short label.

    Raises:
        MeasureError: a pattern matches nothing, or a model is named twice.
    """
    found: list[str] = []
    for name in names:
        is_pattern = glob.has_magic(name)
        matching = [path for path in glob.glob(name) if Path(path).is_dir()] if is_pattern else [name]
        if not matching:
            raise MeasureError(f"policies: {name!r} matches no folder: check the pattern.")
        found += [path.rstrip("/") or path for path in sorted(matching, key=_natural)]
    if not found:
        raise MeasureError("policies is missing: name at least one folder, pattern or model on the Hub.")
    if twice := [name for name in found if found.count(name) > 1]:
        raise MeasureError(f"policies: {twice[0]!r} is named twice: name it once.")
    return [Source(_label(name, found), name) for name in found]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _label(name: str, names: Sequence[str]) -> str:
    """The shortest end of the path that no other has."""
    parts = name.split("/")
    for length in range(1, len(parts)):
        label = "/".join(parts[-length:])
        if sum(("/" + other).endswith("/" + label) for other in names) == 1:
            return label
    return name


def reference_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Raises MeasureError where there is none."""
    try:
        if not _has_tokenizer(source):
            raise OSError("it has no tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
    except Exception as error:  # whatever the files, the Hub or their parsers raise
        raise MeasureError(f"reference={source.name!r} has no tokenizer that loads ({first_line(error)}).") from error
    if tokenizer.eos_token_id is None:
        raise MeasureError(f"the tokenizer of {source.name!r} has no eos_token: set one in its tokenizer_config.json.")
    return tokenizer


def check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy whose own tokenizer has other tokens than the reference's; one without any uses that.

    Raises:
        ModelError: the vocabularies differ.
    """
    try:
        if not _has_tokenizer(source):  # weights alone: the size of their head is compared when they are loaded
            return
        own = AutoTokenizer.from_pretrained(**source.arguments)
    except Exception:  # missing or broken: loading the model reports which, or works without it
        return
    mine, reference = own.get_vocab(), tokenizer.get_vocab()
    if mine != reference:
        different = sorted(set(mine.items()) ^ set(reference.items()), key=lambda item: (item[1], item[0]))[0]
        raise ModelError(
            f"{source.name!r} has another tokenizer than the reference ({len(mine)} and {len(reference)} tokens, the "
            f"first that differs is {different[0]!r}, {different[1]}): it reads the same response as other tokens, so "
            "compare models with one tokenizer."
        )


def _has_tokenizer(source: Source) -> bool:
    """Whether it has one of its own: where there is none, transformers makes an empty one of the model's kind."""
    name, revision = source.arguments.values()
    return any(
        cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    )


@dataclass(frozen=True)
class Head:
    """Hidden states to logits, float32 or wider."""

    module: nn.Module
    transform: LogitTransform

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.module(hidden)
        return self.transform.apply_(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class Scorer:
    """A model that gives the hidden states behind each response token's distribution, and the head for them."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head(model.get_output_embeddings(), LogitTransform.of(model.config, temperature))
        self.vocab_size = self._check_head(name, temperature)

    @torch.no_grad()
    def hidden_states(self, batch: Sequence[Encoded]) -> list[Tensor]:
        """For each response of T tokens, (T, H): the state at the token before each. Rows are padded on the right."""
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, item in enumerate(batch):
            ids[place, : len(item)] = torch.tensor(item.prompt_ids + item.response_ids)
            mask[place, : len(item)] = 1
        states = self._states(ids.to(self.model.device), mask.to(self.model.device))
        # The state at place t predicts the token at place t + 1.
        spans = [slice(len(item.prompt_ids) - 1, len(item) - 1) for item in batch]
        return [states[place, span].contiguous() for place, span in enumerate(spans)]

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    @torch.no_grad()
    def plain_head(self) -> Head:
        """The head with a plain linear layer, whatever it is here (quantised, with an adapter).

        A layer's weight is what it makes of the unit vectors.
        """
        if type(self.head.module) is nn.Linear:
            return self.head
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        state = self._states(ids, torch.ones_like(ids))[0]
        bias = self.head.module(torch.zeros_like(state))
        weight = self.head.module(torch.eye(state.size(1), dtype=state.dtype, device=state.device)) - bias
        plain = nn.Linear(weight.size(0), weight.size(1), device="meta")
        plain.weight, plain.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias[0])
        return replace(self.head, module=plain)

    @torch.no_grad()
    def _check_head(self, name: str, temperature: float) -> int:
        """Check that head and states are the whole model, because an architecture may do more; returns its
        vocabulary."""
        ids = torch.arange(4, device=self.model.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        mine = self.head(self._states(ids, mask))
        whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.to(mine.dtype) / temperature
        loose = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        scale = float(whole[whole != -torch.inf].abs().max())
        if mine.shape != whole.shape or not torch.allclose(mine, whole, rtol=loose, atol=loose * scale):
            raise ModelError(
                f"{name!r} ({self.model.config.model_type}) changes its logits in a way that its config does not "
                "describe, so that they cannot be computed in chunks: please report the architecture."
            )
        return int(whole.size(-1))


def load_model(source: Source, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model, or an adapter with the base that it names.

    Raises:
        ModelError: it cannot be loaded.
    """
    if source.name.startswith(("/", "./", "../", "runs/")) and not Path(source.name).is_dir():
        raise ModelError(f"{source.name!r} does not exist: give a folder with a model or an adapter.")
    try:
        # By `device_map`, because a quantised model cannot be moved afterwards.
        return AutoModelForCausalLM.from_pretrained(**source.arguments, dtype=dtype, device_map={"": device})
    except Exception as error:  # whatever the files, the Hub, PEFT or their parsers raise
        raise ModelError(
            f"{source.name!r} cannot be loaded ({first_line(error)}): give a folder with a model or an adapter, or "
            "the name of one on the Hub."
        ) from error
