"""What output heads give, chunk by chunk over tokens, so that no (N, V) tensor is held.

`exact` and `from_logits` are the public functions. `scores` drives: `products` makes the logits of a chunk, and
`backend` says who computes with them what `rows` defines, `triton_rows` or its twin `torch_rows`.
"""

from .exact import chunked_exact_kl, token_scores
from .from_logits import chunked_exact_kl_from_logits
from .products import float32_linear
from .scores import TokenScores

__all__ = ["TokenScores", "chunked_exact_kl", "chunked_exact_kl_from_logits", "float32_linear", "token_scores"]
