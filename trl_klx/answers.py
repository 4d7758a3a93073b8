"""A model's own answers to problems: their accuracy, and preference pairs of right and wrong ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .rewards import exact_match

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Problems = Sequence[Mapping[str, str]]


class Accuracy(NamedTuple):
    """Share of correct completions, and its standard error over the problems."""

    mean: float
    standard_error: float


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    sample: bool,
    samples_per_problem: int = 1,
    batch_size: int = 512,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Accuracy:
    """Share of completions that are exactly the answer, over two or more problems with a `prompt` and an `answer`.

    `sample` draws `samples_per_problem` completions at temperature 1, with the random numbers of `seed`; without it the
    model decodes greedily, once. `batch_size` completions of at most `max_new_tokens` are generated at a time. The
    random state of PyTorch and the model's mode are left as they were.
    """
    if samples_per_problem < 1 or (samples_per_problem > 1 and not sample):
        raise ValueError(f"samples_per_problem is {samples_per_problem}: give 1, or more with sample=True.")
    rows = [problem for problem in problems for _ in range(samples_per_problem)]
    prompts = [row["prompt"] for row in rows]
    texts = []
    length = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for tokens in _completions(model, tokenizer, prompts, sample=sample, seed=seed, **length):
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    scores = exact_match(prompts, texts, answer=[row["answer"] for row in rows])
    # Samples of one problem are alike, so the problem is the unit of the standard error.
    means = [statistics.fmean(scores[i : i + samples_per_problem]) for i in range(0, len(scores), samples_per_problem)]
    return Accuracy(statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means)))


def preference_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    samples_per_problem: int = 8,
    batch_size: int = 512,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Pairs `{"prompt", "chosen", "rejected"}` of the model's own samples: the first right and the first wrong one.

    Samples at temperature 1, with the random numbers of `seed`. A problem of which all samples are right, or all wrong,
    gives no pair: both sides are samples of the model, as preference data are in theory. The texts carry no end of text
    (TRL appends it), and a sample that did not come to its end, or that holds another special token, is in no pair: its
    text would be tokenised as something that the model never sampled.
    """
    prompts = [problem["prompt"] for problem in problems for _ in range(samples_per_problem)]
    samples: list[str | None] = []
    length = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for tokens in _completions(model, tokenizer, prompts, sample=True, seed=seed, **length):
        samples += [_finished_text(tokenizer, row) for row in tokens.tolist()]
    pairs = []
    for place, problem in enumerate(problems):
        own = samples[place * samples_per_problem : (place + 1) * samples_per_problem]
        right = [text for text in own if text == problem["answer"]]
        wrong = [text for text in own if text is not None and text != problem["answer"]]
        if right and wrong:
            pairs.append({"prompt": problem["prompt"], "chosen": right[0], "rejected": wrong[0]})
    return pairs


def _finished_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str | None:
    """The text before the end of text; None if there is no end, or another special token before it."""
    if tokenizer.eos_token_id not in tokens:
        return None
    before = tokens[: tokens.index(tokenizer.eos_token_id)]
    return None if set(before) & set(tokenizer.all_special_ids) else str(tokenizer.decode(before))


def _completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    sample: bool,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[Tensor]:
    """Completion tokens, (batch, new tokens) for each batch of prompts; at temperature 1, or greedy."""
    import torch

    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    completions = []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
            completions.append(tokens[:, inputs["input_ids"].shape[1] :])
    model.train(was_training)
    return completions
