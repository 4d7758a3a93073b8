"""Responses sampled from one of the models, so that a KL on them is that of whole sequences."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...files import whole
from .models import Source, load_model
from .options import MeasureOptions
from .processes import processes
from .responses import Response, encode_prompt


def sampled_responses(
    rows: Sequence[Response], source: Source, tokenizer: PreTrainedTokenizerBase, options: MeasureOptions
) -> list[Response]:
    """`num_samples` responses to every prompt, without top-k or top-p; those of one prompt share its group.

    One file of output_dir per prompt, which is never sampled again. Every process takes a share of `rows`, which must
    be the same for all.
    """
    # By what the responses depend on: others are never taken for them.
    names = ("num_samples", "max_new_tokens", "temperature", "seed", "where", "split")
    key = repr([source.fingerprint(), [row.prompt for row in rows], *(getattr(options, name) for name in names)])
    folder = Path(options.output_dir) / "sampled" / hashlib.sha256(key.encode()).hexdigest()[:16]
    files = [folder / f"{row.index:08d}.json" for row in rows]
    missing = [(row, path) for row, path in zip(rows, files, strict=True) if not path.is_file()]
    processes().wait_for_everyone()  # all share out the same list: no file is written before it is made
    if missing:
        _sample(missing, source, tokenizer, options)
    out: list[Response] = []
    for row, path in zip(rows, files, strict=True):
        for number, ids in enumerate(json.loads(path.read_text())):
            changed = {"index": len(out), "id": f"{row.id}/{number}", "response": None, "response_ids": ids}
            out.append(dataclasses.replace(row, correct=None, **changed))
    return out


def _sample(
    missing: list[tuple[Response, Path]], source: Source, tokenizer: PreTrainedTokenizerBase, options: MeasureOptions
) -> None:
    """Random numbers of a prompt depend on `seed` and its place alone, not on other prompts or the processes."""
    state = processes()
    model = load_model(source, dtype=options.torch_dtype, device=state.device)
    # In place of the model's own, whose penalties and filters would sample from another distribution than is measured.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.num_samples,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    for row, path in missing[state.process_index :: state.num_processes]:
        prompt = torch.tensor([encode_prompt(tokenizer, row)], device=model.device)
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(1_000_003 * options.seed + row.index)
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
        responses = [_until(tokens, tokenizer.eos_token_id) for tokens in ids[:, prompt.size(1) :].tolist()]
        with whole(path) as partial:
            partial.write_text(json.dumps(responses))
    state.wait_for_everyone()


def _until(tokens: list[int], end: int) -> list[int]:
    """Up to the end of text, which is sampled too and counts."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
