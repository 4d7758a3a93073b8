"""From the rows of a dataset to prompts, and from prompts to answers, as GRPO reads and takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..checks.rows import check_prompts
from ..checks.vocabulary import TokenError, check_tokens

Rows = Sequence[dict[str, Any]]
# As TRL's GRPO: (prompts, trainer) -> {"prompt_ids", "completion_ids", optional "env_mask", columns for the rewards}.
RolloutFunction = Callable[[list, Any], dict[str, list]]
_LOOKED_AT = 100  # prompts that are checked before the run; the others are when their turn comes


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts as the policy does.

    A column `prompt` holds strings or messages; without it, `input_ids` holds tokens, as TRL's PPO has it, of which
    those count that `attention_mask` marks. Without that column, tokens `padding` at either end of a row do not count.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any]
    padding: int | None
    vocabulary: int  # entries of the policy's embedding

    def read(self, rows: Rows) -> tuple[list, list[list[int]]]:
        """Prompts as reward functions get them, and their tokens."""
        if "prompt" not in rows[0]:
            ids = [_without_padding(row, self.padding) for row in rows]
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True), ids
        prompts = [row["prompt"] for row in rows]
        check_prompts(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            return prompts, self.tokenizer(text=prompts)["input_ids"]
        tokens: Any = self.tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
        )
        return prompts, tokens["input_ids"]

    def check_first(self, *datasets: Any) -> None:
        """Refuse datasets whose first prompts hold tokens that the policy does not know. (Streams are read later.)"""
        for dataset in datasets:
            if isinstance(dataset, Dataset) and len(dataset):
                rows = [dataset[place] for place in range(min(len(dataset), _LOOKED_AT))]
                self.check(self.read(rows)[1], "a prompt")

    def check(self, ids: list[list[int]], what: str) -> None:
        """Raise TokenError where `what` holds a token that the policy does not know."""
        check_tokens(ids, self.vocabulary, what)


def _without_padding(row: dict[str, Any], padding: int | None) -> list[int]:
    ids = [int(token) for token in row["input_ids"]]
    mask = row.get("attention_mask")
    if mask is None:
        kept = [place for place, token in enumerate(ids) if token != padding]
        ids = ids[kept[0] : kept[-1] + 1] if kept else []
    elif len(mask) == len(ids):
        ids = [token for token, counts in zip(ids, mask, strict=True) if counts]
    else:
        raise TokenError(
            f"a row has {len(ids)} input_ids and {len(mask)} entries of attention_mask: give one for each token, or "
            "remove the column."
        )
    if not ids:
        raise TokenError("the input_ids of a row are padding alone, so that there is nothing to answer: leave it out.")
    return ids


def take_answers(given: dict[str, list], prompts: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Take the tokens of prompts and answers out of a rollout function's result, and which the policy made (env_mask).

    Raises:
        ValueError: one is missing, or they do not fit the number of prompts or each other.
    """
    for name in ("prompt_ids", "completion_ids"):
        if name not in given:
            raise ValueError(f"rollout_func returned no {name}: return prompt_ids and completion_ids.")
    names = ("prompt_ids", "completion_ids", "env_mask")
    if given.get("env_mask") is None:
        given["env_mask"] = [[1] * len(row) for row in given["completion_ids"]]
    found = [[[int(number) for number in row] for row in given.pop(name)] for name in names]
    for name, rows in zip(names, found, strict=True):
        if len(rows) != prompts:
            raise ValueError(f"rollout_func returned {len(rows)} {name} for {prompts} prompts: return one per prompt.")
    prompt_ids, completion_ids, policy_made = found
    for place, (ids, made) in enumerate(zip(completion_ids, policy_made, strict=True)):
        if len(ids) != len(made):
            raise ValueError(
                f"rollout_func returned {len(made)} entries of env_mask for the {len(ids)} tokens of answer {place}: "
                "return one per token."
            )
    return prompt_ids, completion_ids, policy_made
