"""From a row's text to tokens, with an exact boundary between prompt and response."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import RowError
from .inputs import Row


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; only `response_ids` count."""

    row: Row
    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, *, add_eos: bool) -> Encoded:
    """Tokenise a row: the prompt as the model was given it, then the response.

    Messages go through the chat template, up to where the assistant's turn begins; a prompt that is a string is taken
    as it stands. Text of prompt and response is tokenised together where this leaves the prompt's tokens as they are.
    Where a token would span the boundary (prompt "1+", response "+2", token "++"), the response is tokenised alone, as
    a model that has been given the prompt can only write after it.

    Args:
        tokenizer: the reference's.
        row: what to tokenise; its `response_ids` are taken as they are.
        add_eos: whether the end of text is the last token of a response given as text.

    Raises:
        RowError: prompt or response is missing, empty or no text.
    """
    text, special = _prompt_text(tokenizer, row.prompt)
    prompt_ids = _ids(tokenizer, text, special)
    if not prompt_ids:
        raise RowError("its prompt is empty, and nothing says how probable the response's first token is")
    if row.response_ids is not None:
        if not row.response_ids:
            raise RowError("its response is empty")
        return Encoded(row, prompt_ids, [int(token) for token in row.response_ids])
    response = _response_text(row.response)
    together = _ids(tokenizer, text + response, special)
    start = len(prompt_ids)
    aligned = len(together) > start and together[:start] == prompt_ids
    ids = together[start:] if aligned else _ids(tokenizer, response, False)
    end = tokenizer.eos_token_id
    return Encoded(row, prompt_ids, [*ids, end] if add_eos and ids[-1:] != [end] else ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The prompt's tokens, for sampling."""
    ids = _ids(tokenizer, *_prompt_text(tokenizer, row.prompt))
    if not ids:
        raise RowError("its prompt is empty")
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # A tokenizer that closes every text would put the end of text between prompt and response.
    return ids[:-1] if special and ids and ids[-1] == tokenizer.eos_token_id and ids[0] != ids[-1] else ids


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> tuple[str, bool]:
    """The prompt as one string, and whether the tokenizer still has to add its special tokens."""
    if isinstance(prompt, str):
        return prompt, True
    if not prompt:
        raise RowError("it has no prompt")
    if not tokenizer.chat_template:
        raise RowError("its prompt is a list of messages and the tokenizer has no chat template: give text")
    begun = prompt[-1]["role"] == "assistant"  # the response continues what the assistant has begun
    messages = [{name: value for name, value in message.items() if value is not None} for message in prompt]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # a template may refuse roles, orders, ... with an error of its own
        raise RowError(f"the chat template refuses its prompt ({' '.join(str(error).split())})") from error
    return str(text), False


def _response_text(response: Any) -> str:
    if isinstance(response, list):
        if len(response) != 1 or response[0].get("role") != "assistant":
            raise RowError("its response is not one message of the assistant")
        response = response[0].get("content")
    if response is None or response == "":
        raise RowError("its response is empty")
    if not isinstance(response, str):
        raise RowError(f"its response is a {type(response).__name__}, not text")
    return response
