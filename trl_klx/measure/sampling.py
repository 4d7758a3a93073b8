"""Responses sampled from one of the models, so that a KL on them is that of whole sequences."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .inputs import Row
from .processes import processes
from .tokens import encode_prompt


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    folder: Path,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Sample `num_samples` responses to every prompt, without top-k or top-p, one file of `folder` per prompt.

    Every process takes a share of `rows`, which must be the same for all. The random numbers of a prompt depend on
    `seed` and its place alone, not on the other prompts nor on the number of processes.
    """
    state = processes()
    folder.mkdir(parents=True, exist_ok=True)
    # In place of the model's own, whose penalties and filters would sample from another distribution than is measured.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    for row in rows[state.process_index :: state.num_processes]:
        prompt = torch.tensor([encode_prompt(tokenizer, row)], device=model.device)
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(1_000_003 * seed + row.index)
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
        responses = [_until(tokens, tokenizer.eos_token_id) for tokens in ids[:, prompt.size(1) :].tolist()]
        unfinished = _file(folder, row).with_suffix(".unfinished")
        unfinished.write_text(json.dumps(responses))
        unfinished.replace(_file(folder, row))
    state.wait_for_everyone()


def missing_samples(rows: Sequence[Row], folder: Path) -> list[Row]:
    """The prompts whose responses are not there yet."""
    return [row for row in rows if not _file(folder, row).is_file()]


def sampled_rows(rows: Sequence[Row], folder: Path) -> list[Row]:
    """One row per sampled response; those of one prompt share its group."""
    out: list[Row] = []
    for row in rows:
        for number, ids in enumerate(json.loads(_file(folder, row).read_text())):
            changed = {"index": len(out), "id": f"{row.id}/{number}", "response": None, "response_ids": ids}
            out.append(dataclasses.replace(row, correct=None, **changed))
    return out


def _file(folder: Path, row: Row) -> Path:
    return folder / f"{row.index:08d}.json"


def _until(tokens: list[int], end: int) -> list[int]:
    """Up to the end of text, which is sampled too and counts."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
