"""Which token ids a model knows: a tokenizer may have more of them than the model's embedding has entries."""

import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ..errors import RunError
from .loading import loading_arguments

logger = get_logger(__name__)

RESIZE = "call model.resize_token_embeddings(len(tokenizer)) and save the model"


class TokenError(RunError, ValueError):
    """The tokens of a prompt or an answer cannot be read by the model; the message tells why, and what to do."""


def vocabulary_size(model: Any) -> int:
    """Entries of a model's embedding, as its config declares them (sharded weights do not tell)."""
    return int(model.config.get_text_config().vocab_size)


def check_tokens(rows: Iterable[Sequence[int]], vocabulary: int, what: str) -> None:
    """Refuse token ids, of `what`, that the model has no entry for.

    Raises:
        TokenError: with the first of them.
    """
    unknown = next((token for ids in rows for token in ids if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise TokenError(
            f"{what} holds the token {unknown} and the model's vocabulary has {vocabulary} entries: tokenise with the "
            f"model's own tokenizer, or, where tokens were added to it, {RESIZE}."
        )


def with_known_padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int, owner: str) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or a copy of it whose padding token the model knows.

    Where there is no padding token, or one without an entry in the model's embedding (`[PAD]` added, and the model not
    resized), the end token pads, as TRL has it where there is none. What pads is masked: it changes no number, but the
    embedding looks it up nevertheless, and a saved config that names it could not be loaded.

    Args:
        tokenizer: with any padding token, or none.
        vocabulary: entries of the embedding.
        owner: what the sentences call the model.

    Raises:
        ValueError: there is no end token either that the model knows.
    """
    pad = tokenizer.pad_token_id
    if pad is not None and pad < vocabulary:
        return tokenizer
    candidates = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    known = [token for token in candidates if token is not None and tokenizer.get_vocab()[token] < vocabulary]
    found = "there is none" if pad is None else f"{tokenizer.pad_token!r} is token {pad}"
    if not known:
        raise ValueError(
            f"the tokenizer of {owner} has no padding token that the model knows ({found}; the model's vocabulary has "
            f"{vocabulary} entries): {RESIZE}, or set tokenizer.pad_token to a token that it knows."
        )
    if pad is not None:
        logger.warning(
            f"The padding token of {owner} has no entry in its embedding ({found}, the vocabulary has {vocabulary}): "
            f"{known[0]!r} pads instead. To keep it, {RESIZE} first."
        )
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = known[0]
    return padded


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of the tokenizer."""
    return 1 + max(tokenizer.get_vocab().values(), default=0)


def check_vocabularies(policy: nn.Module, other: nn.Module, name: str, *, tokens: int | None = None) -> None:
    """Refuse a model whose vocabulary is smaller than the policy's: it cannot read all that the policy may sample.

    Args:
        policy: the policy.
        other: a model that reads the policy's tokens.
        name: of the other.
        tokens: how many there are, where no more occur; the policy's embedding may have rows that stand for none.

    Raises:
        ValueError: with both sizes.
    """
    size, own = vocabulary_size(other), min(vocabulary_size(policy), tokens or sys.maxsize)
    if size < own:
        raise ValueError(
            f"the {name} has a vocabulary of {size} entries and the policy one of {own}, so that it cannot read every "
            f"answer: give one with the policy's tokenizer, resized to it by resize_token_embeddings({own})."
        )


def check_value_vocabulary(policy: Any, value_model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a value model that reads the policy's tokens as others.

    A larger embedding has the policy's vocabulary and rows for more tokens, if the tokenizer at the model's path shows
    that.

    Raises:
        ValueError: with the difference.
    """
    check_vocabularies(policy, value_model, "value model")
    path, own_path = (get_config_model_id(model.config) for model in (value_model, policy))
    theirs = saved_tokenizer(path) if path and path != own_path else None
    size, own = vocabulary_size(value_model), vocabulary_size(policy)
    if theirs is None and size != own:
        raise ValueError(
            f"the value model has a vocabulary of {size} entries and the policy one of {own}, and it is not "
            "known whether its tokens are the policy's: give one with the policy's tokenizer, resized to it by "
            f"resize_token_embeddings({own})."
        )
    if theirs is not None and not _same_tokens(tokenizer, theirs):
        raise ValueError(
            f"the value model ({path}) has another tokenizer than the policy, so that it would read other tokens: give "
            "one with the policy's tokenizer, or leave value_model out."
        )


def saved_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer at a path; None where there is none, or no Hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # None would ask the user
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer if has_tokens(tokenizer) else None


def has_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it can read text: for a folder without a tokenizer transformers makes one up, of special tokens alone."""
    return not set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab())


def _same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens under the same ids, but for those that were added to one of them."""
    added = {*tokenizer.get_added_vocab(), *other.get_added_vocab()}
    tokens, others = ({t: i for t, i in which.get_vocab().items() if t not in added} for which in (tokenizer, other))
    return tokens == others


def known_tokens(model: Any, args: Any, processing_class: Any) -> tuple[Any, int | None]:
    """What TRL is to be given as tokenizer or processor, so that what pads is a token that the policy knows.

    TRL loads policy and tokenizer itself, so that they are looked at before. `args.model_init_kwargs` is completed.

    Args:
        model: the policy or its path.
        args: the trainer's config.
        processing_class: as the user gave it; None: that of the policy's path.

    Returns:
        It, a copy of it with another padding token, or None where TRL is to load it; and the number of entries in the
        policy's embedding where the tokenizer has more tokens than that, else None.
    """
    if args.model_init_kwargs is not None:
        args.model_init_kwargs = loading_arguments(args.model_init_kwargs)
    loading = {"trust_remote_code": args.trust_remote_code}
    revision = (args.model_init_kwargs or {}).get("revision")
    is_path = isinstance(model, str)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, **loading) if is_path else model.config
        vocabulary = int(config.get_text_config().vocab_size)
        path = model if is_path else get_config_model_id(config)
        processor = AutoProcessor.from_pretrained(path, **loading) if processing_class is None else processing_class
    except (OSError, ValueError, AttributeError, ImportError, KeyError):
        return processing_class, None  # TRL reports what it cannot load
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if token_count(tokenizer) <= vocabulary:
        return processing_class, None
    asked_for = vars(args).get("pad_token")  # DPO's, which TRL puts in the place of the tokenizer's
    if asked_for is not None:
        check_tokens([[tokenizer.convert_tokens_to_ids(asked_for)]], vocabulary, f"pad_token={asked_for!r}")
        return processing_class, vocabulary
    padded = with_known_padding(tokenizer, vocabulary, "the policy")
    if padded is tokenizer:
        return processing_class, vocabulary
    if processor is tokenizer:
        return padded, vocabulary
    processor = copy.copy(processor)
    processor.tokenizer = padded
    return processor, vocabulary


def check_pairs(dataset: Any, vocabulary: int | None) -> Any:
    """DPO's tokenised pairs, checked to hold only tokens that the policy knows; a stream, as its rows are read.

    Raises:
        TokenError: with the first that it does not know.
    """

    def checked(row: dict) -> dict:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            if name in row:  # images are tokenised later
                check_tokens([row[name]], vocabulary or 0, f"{name.removesuffix('_ids')} of a pair")
        return row

    if vocabulary is None:
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.map(checked)
    for row in dataset:
        checked(row)
    return dataset
