"""The KL arguments that all trainers share (`KLArguments`), the types of their values, and the rules about them."""

from .options import KLArguments

__all__ = ["KLArguments"]
