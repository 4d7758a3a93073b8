"""A model's own answers to problems: their accuracy, and preference pairs of right and wrong ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..rewards import exact_match

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Problems = Sequence[Mapping[str, Any]]  # an `answer` and a `prompt` each: a text, or messages for the chat template


class Accuracy(NamedTuple):
    """Share of correct completions, and its standard error over the problems."""

    mean: float
    standard_error: float


class Answer(NamedTuple):
    """A sampled answer: its tokens with the end of text, its text without, and its reward.

    The text is None, and the reward 0, where the answer is unfinished or holds another special token: the text would be
    tokenised as something that the model never sampled.
    """

    tokens: list[int]
    text: str | None
    reward: float


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
    """Share of completions that are exactly the answer, over two or more problems.

    `sample` draws `samples_per_problem` completions at temperature 1 with the random numbers of `seed`; without it the
    model decodes greedily, once. `batch_size` completions of at most `max_new_tokens` are generated at a time. The
    random state of PyTorch and the model's mode are left as they were.
    """
    if samples_per_problem < 1 or (samples_per_problem > 1 and not sample):
        raise ValueError(f"samples_per_problem is {samples_per_problem}: give 1, or more with sample=True.")
    rows = [problem for problem in problems for _ in range(samples_per_problem)]
    texts: list[str] = []
    for tokens in _completions(model, tokenizer, rows, sample, seed, batch_size, max_new_tokens):
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    scores = exact_match(texts, texts, answer=[row["answer"] for row in rows])
    # Samples of one problem are alike, so the problem is the unit of the standard error.
    means = [statistics.fmean(own) for own in _by_problem(scores, samples_per_problem)]
    return Accuracy(statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means)))


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    reward: Callable[..., list[float]] = exact_match,
    samples_per_problem: int = 8,
    batch_size: int = 512,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> list[list[Answer]]:
    """The model's own answers to each problem, at temperature 1 with the random numbers of `seed`.

    `reward` is a reward function in TRL's form, which gets the column `answer`. The random state of PyTorch and the
    model's mode are left as they were.
    """
    rows = [problem for problem in problems for _ in range(samples_per_problem)]
    found: list[tuple[list[int], str | None]] = []
    for tokens in _completions(model, tokenizer, rows, True, seed, batch_size, max_new_tokens):
        found += [_finished(tokenizer, row) for row in tokens.tolist()]
    scores = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[text or "" for _, text in found],
        answer=[row["answer"] for row in rows],
    )
    answers = [
        Answer(tokens, text, 0.0 if text is None else score)
        for (tokens, text), score in zip(found, scores, strict=True)
    ]
    return _by_problem(answers, samples_per_problem)


def preference_pairs(problems: Problems, answers: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Pairs `{"prompt", "chosen", "rejected"}`: the first right and the first wrong answer to each problem.

    A problem whose answers are all right, or all wrong, gives no pair, so that both sides are samples of the model, as
    preference data are in theory. An answer without a text is in no pair. A text carries no end of text: TRL appends
    it. Where the prompt is messages, the sides are.
    """
    pairs = []
    for problem, own in zip(problems, answers, strict=True):
        right = [answer.text for answer in own if answer.text is not None and answer.reward == 1]
        wrong = [answer.text for answer in own if answer.text is not None and answer.reward != 1]
        if right and wrong:
            sides: list[Any] = [right[0], wrong[0]]
            if not isinstance(problem["prompt"], str):
                sides = [[{"role": "assistant", "content": side}] for side in sides]
            pairs.append({"prompt": problem["prompt"], "chosen": sides[0], "rejected": sides[1]})
    return pairs


def _by_problem(values: list, samples: int) -> list[list]:
    return [values[start : start + samples] for start in range(0, len(values), samples)]


def _finished(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> tuple[list[int], str | None]:
    """The tokens up to the end of text, and their text."""
    if tokenizer.eos_token_id not in tokens:
        return tokens, None
    end = tokens.index(tokenizer.eos_token_id)
    is_odd = set(tokens[:end]) & set(tokenizer.all_special_ids)
    return tokens[: end + 1], None if is_odd else str(tokenizer.decode(tokens[:end]))


def _completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Problems,
    sample: bool,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[Tensor]:
    """Completion tokens, (batch, new tokens) for each batch of rows; at temperature 1, or greedy."""
    import torch

    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    generate: Any = model.generate
    prompts: Any = [row["prompt"] for row in rows]
    is_chat = any(not isinstance(prompt, str) for prompt in prompts)
    if is_chat:
        prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    completions, was_training = [], model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            inputs = tokenizer(
                prompts[start : start + batch_size],
                add_special_tokens=not is_chat,  # a chat template writes its own
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            tokens = generate(**inputs, max_new_tokens=max_new_tokens, **options)
            completions.append(tokens[:, inputs["input_ids"].shape[1] :])
    model.train(was_training)
    return completions
