"""What the public functions of this room ask of their arguments, and how many tokens they take at a time."""

from torch import Tensor

from ..exact import check_direction
from ..logits import LogitTransform, check_transform

# Bytes of logits, and on a GPU of their gradient in half precision, that are held at once. On a CPU more buys no speed
# (docs/performance.md). A GPU wants large products.
_BYTES = 128 * 2**20
_GPU_BYTES = 896 * 2**20
_GPU_MULTIPLE = 128  # tokens per chunk, there


def default_chunk_size(vocab_size: int, device: str = "cpu", *, is_trained: bool = False) -> int:
    """Tokens per chunk, at least 1: float32 logits of two models take 128 MiB then, 896 MiB with a gradient elsewhere.

    Args:
        vocab_size: V.
        device: a device type, for example "cpu" or "cuda".
        is_trained: whether the head is: each chunk adds (V, H) numbers to its gradient, so that a GPU takes four times
            as many tokens.
    """
    if device == "cpu":
        return max(1, _BYTES // (2 * 4 * vocab_size))
    tokens = (4 if is_trained else 1) * _GPU_BYTES // ((2 * 4 + 2) * vocab_size)
    return max(1, tokens // _GPU_MULTIPLE * _GPU_MULTIPLE or tokens)


def check_hidden(hidden: Tensor, ref_hidden: Tensor) -> None:
    if hidden.dim() != 2 or ref_hidden.dim() != 2 or hidden.size(0) != ref_hidden.size(0):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)}: both must be (tokens, "
            "hidden size) with the same tokens."
        )


def check_vocabularies(vocab: int, ref_weight: Tensor) -> None:
    if vocab != ref_weight.size(0):
        raise ValueError(
            f"the policy has a vocabulary of {vocab} and the reference of {ref_weight.size(0)}: exact KL needs one "
            "vocabulary."
        )


def check_settings(direction: str, transform: LogitTransform, chunk_size: int | None) -> None:
    check_direction(direction)
    check_transform(transform)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to choose it from a memory budget.")
