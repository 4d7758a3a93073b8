"""The KL arguments that all trainers share (`KLArguments`), what resolves their values, and the rules about them."""

from .options import KLArguments

__all__ = ["KLArguments"]
