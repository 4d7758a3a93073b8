"""One pass of each model over the responses: the reference first and once, then every policy against it.

The reference leaves its last hidden states on disk, (T, H) per response; from these its logits are made again, a chunk
at a time, for every policy: one matrix product in place of a forward.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .divergence import TokenStatistics, chunked_token_statistics
from .errors import MeasureError, ModelError, RowError
from .models import Head, Scorer, Source, check_tokenizer, load_model, reference_tokenizer, resolve
from .options import MeasureOptions
from .processes import processes
from .responses import Encoded, Response, encode, encode_prompt, load_rows
from .sampling import sampled_responses
from .store import Store

REFERENCE = "reference"


@dataclass
class Measurement:
    """What a run measured, and what it had to leave out."""

    options: MeasureOptions
    store: Store
    reference: Source
    tokenizer: PreTrainedTokenizerBase
    encoded: list[Encoded]
    policies: list[Source] = field(default_factory=list)  # those that were measured, in their order
    sampler: str | None = None  # label of the model that sampled the responses, "reference", or None
    left_out_rows: dict[str, str] = field(default_factory=dict)  # id: why
    left_out_models: dict[str, str] = field(default_factory=dict)  # label: why

    def check_measured(self) -> None:
        """Raises MeasureError where no policy could be measured."""
        if not self.policies:
            raise MeasureError(f"policies: none could be measured; {next(iter(self.left_out_models.values()))}")


def run_measurement(data: Any, options: MeasureOptions) -> Measurement:
    """Measure, from where an earlier run with the same settings in the same folder was interrupted.

    Raises:
        MeasureError: options, data or reference cannot work. A policy that cannot be measured, and a row, are left out
            and named in the result.
    """
    options.check()
    sources, reference = resolve(options.policies), Source(REFERENCE, options.reference.rstrip("/"))
    sampler = _sampler(options, sources)
    rows = load_rows(data, split=options.split, where=options.where, needs_response=options.sample is None)
    tokenizer = reference_tokenizer(reference)
    done = Measurement(options, Store(options.output_dir), reference, tokenizer, [], sampler=sampler)
    if options.sample:
        source = next(source for source in (reference, *sources) if source.label == sampler)
        rows = sampled_responses(_with_prompts(done, rows), source, tokenizer, options)
    _encode(done, rows)
    is_main = processes().is_main_process
    done.store.open(_settings(done), write=is_main)
    for source in sources:
        done.store.open_policy(source, write=is_main)
    processes().wait_for_everyone()
    head, vocab_size = _run_reference(done)
    for source in sources:
        try:
            _run_policy(done, source, head, vocab_size)
        except ModelError as error:
            done.left_out_models[source.label] = str(error)
        else:
            done.policies.append(source)
    processes().wait_for_everyone()
    return done


def _sampler(options: MeasureOptions, sources: Sequence[Source]) -> str | None:
    """The label of the model that sampled the responses."""
    wanted = options.sample or options.sampled_from
    if wanted is None or wanted == REFERENCE or wanted.rstrip("/") == options.reference.rstrip("/"):
        return wanted and REFERENCE
    for source in sources:
        if wanted.rstrip("/") in (source.label, source.name):
            return source.label
    labels = ", ".join([REFERENCE, *(source.label for source in sources)])
    option = "sample" if options.sample else "sampled_from"
    raise MeasureError(f"{option}={wanted!r} is not one of the models: name one of {labels}.")


def _with_prompts(done: Measurement, rows: list[Response]) -> list[Response]:
    usable = []
    for row in rows:
        try:
            encode_prompt(done.tokenizer, row)
            usable.append(row)
        except RowError as error:
            done.left_out_rows[row.id] = str(error)
    return usable


def _encode(done: Measurement, rows: list[Response]) -> None:
    limit, size = done.options.max_length, len(done.tokenizer)
    for row in rows:
        try:
            item = encode(done.tokenizer, row, add_eos=done.options.add_eos)
            if limit is not None and len(item) > limit:
                raise RowError(f"it has {len(item)} tokens, more than max_length={limit}")
            if not 0 <= min(item.response_ids) <= max(item.response_ids) < size:
                raise RowError(f"its response_ids are not all tokens of the reference, 0 to {size - 1}")
            done.encoded.append(item)
        except RowError as error:
            done.left_out_rows[row.id] = str(error)
    if not done.encoded:
        name, reason = next(iter(done.left_out_rows.items()))
        raise MeasureError(f"data: none of the {len(rows)} rows can be used; of {name!r}, {reason}.")


def _settings(done: Measurement) -> dict[str, Any]:
    """All that a finished row depends on, but for its policy."""
    tokens = hashlib.sha256()
    for item in done.encoded:
        tokens.update(repr((item.row.index, item.row.id, item.prompt_ids, item.response_ids)).encode())
    return {
        "reference": done.reference.name,
        "reference_files": done.reference.fingerprint(),
        "tokens": tokens.hexdigest()[:16],
        "dtype": done.options.dtype,
        "temperature": done.options.temperature,
    }


def _batches(done: Measurement) -> list[list[Encoded]]:
    """Rows of like length together, the longest first. The same for every model, so that a model equals itself exactly:
    a matrix product's last bits depend on its shape."""
    ordered = sorted(done.encoded, key=lambda item: (-len(item), item.row.index))
    size = done.options.batch_size
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _own_share(batches: list[list[Encoded]], text: str) -> Any:
    """The batches of this process, with a bar where there is something to do."""
    state = processes()
    own = batches[state.process_index :: state.num_processes]
    return tqdm(own, desc=text, disable=not (own and state.is_main_process), leave=False)


def _run_reference(done: Measurement) -> tuple[Head, int]:
    """Leave the reference's hidden states on disk; returns its head and its vocabulary, and lets the rest of it go."""
    store = done.store
    try:
        scorer = _load(done, done.reference)
    except ModelError as error:
        raise MeasureError(f"reference: {error}") from error
    missing = [
        batch for batch in _batches(done) if not all(store.has_hidden(REFERENCE, item.row.index) for item in batch)
    ]
    processes().wait_for_everyone()  # all share out the same list: no file is written before it is made
    for batch in _own_share(missing, REFERENCE):
        for item, hidden in zip(batch, scorer.hidden_states(batch), strict=True):
            store.save_hidden(REFERENCE, item.row.index, hidden)
    processes().wait_for_everyone()
    return scorer.head, scorer.vocab_size


def _load(done: Measurement, source: Source) -> Scorer:
    model = load_model(source, dtype=done.options.torch_dtype, device=processes().device)
    return Scorer(model, temperature=done.options.temperature, name=source.name)


def paired_rows(done: Measurement) -> list[Encoded]:
    """The rows on which the policies are compared with each other: spread evenly over all."""
    count = min(done.options.pairwise, len(done.encoded))
    return [done.encoded[place * len(done.encoded) // count] for place in range(count)]


def _run_policy(done: Measurement, source: Source, ref_head: Head, vocab_size: int) -> None:
    store, state = done.store, processes()
    finished = store.finished(source)
    kept = {item.row.index for item in paired_rows(done)}

    def is_open(item: Encoded) -> bool:
        index = item.row.index
        left = store.has_head(source.label) and store.has_hidden(source.label, index)
        return index not in finished or (index in kept and not left)

    todo = [[item for item in batch if is_open(item)] for batch in _batches(done)]
    todo = [batch for batch in todo if batch]
    state.wait_for_everyone()  # as above
    if not todo:
        return
    scorer = _load_together(done, source, vocab_size)
    if kept and state.is_main_process:
        store.save_head(source.label, scorer.plain_head())
    for batch in _own_share(todo, source.label):
        new = []
        for item, hidden in zip(batch, scorer.hidden_states(batch), strict=True):
            if item.row.index in kept:
                store.save_hidden(source.label, item.row.index, hidden)
            if item.row.index not in finished:
                new.append((item, hidden))
        if new:
            store.add(source, compare(done, source, new, scorer.head, ref_head, vocab_size))
    state.wait_for_everyone()


def _load_together(done: Measurement, source: Source, vocab_size: int) -> Scorer:
    """Load a policy on all processes, or on none: one that continued alone would wait for ever."""
    scorer, reason = None, ""
    try:
        check_tokenizer(source, done.tokenizer)
        scorer = _load(done, source)
        if scorer.vocab_size != vocab_size:
            raise ModelError(
                f"{source.name!r} has a vocabulary of {scorer.vocab_size} and the reference of {vocab_size}: a KL "
                "needs one vocabulary, so compare models of one."
            )
    except ModelError as error:
        reason = str(error)
    reasons = [text for text in gather_object([reason]) if text]
    if scorer is None or reasons:
        raise ModelError(reasons[0])
    return scorer


@torch.no_grad()
def compare(
    done: Measurement, source: Source, new: list[tuple[Encoded, Tensor]], head: Head, ref_head: Head, vocab_size: int
) -> list[dict[str, Any]]:
    """Rows of `store.SCHEMA` from a policy's hidden states and the reference's, which the store has."""
    items, states = zip(*new, strict=True)
    device = processes().device
    ref_states = [done.store.load_hidden(REFERENCE, item.row.index) for item in items]
    statistics = chunked_token_statistics(
        *(head, torch.cat(states)),
        *(ref_head, torch.cat(ref_states).to(device)),
        torch.tensor([token for item in items for token in item.response_ids], device=device),
        vocab_size=vocab_size,
        chunk_size=done.options.chunk_size,
    )
    columns = [column.cpu().split([len(item.response_ids) for item in items]) for column in statistics]
    return [
        {
            "policy": source.label,
            "response": item.row.index,
            "id": item.row.id,
            "group": item.row.group,
            "correct": item.row.correct,
            "num_tokens": len(item.response_ids),
            "token_ids": item.response_ids,
            "tokens": [str(done.tokenizer.decode([token])) for token in item.response_ids],
            **{name: column[place].tolist() for name, column in zip(TokenStatistics._fields, columns, strict=True)},
        }
        for place, item in enumerate(items)
    ]
