"""What output heads give, chunk by chunk over tokens, so that no (N, V) tensor is ever held."""

from .exact import chunked_exact_kl, chunked_exact_kl_from_logits
from .products import float32_linear
from .scores import TokenScores, token_scores

__all__ = ["TokenScores", "chunked_exact_kl", "chunked_exact_kl_from_logits", "float32_linear", "token_scores"]
