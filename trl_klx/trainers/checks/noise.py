"""What makes a model in training another than the one that samples: dropout, and noise in routers."""

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

# Numbers by which modules of transformers make noise in training: attention_dropout, layerdrop, router_jitter_noise...
_NOISE = ("dropout", "layerdrop", "jitter", "drop_prob", "drop_path", "drop_rate", "pdrop")


def check_neftune(alpha: float | None) -> None:
    """Refuse NEFTune where log-probs in training are to be those of the policy that samples.

    Raises:
        ValueError: `alpha`, the field neftune_noise_alpha, asks for it.
    """
    if alpha:
        raise ValueError(
            f"neftune_noise_alpha={alpha} adds noise to the embeddings in training: ratios and KL would be those of "
            "the noise and not of the policy; remove it."
        )


def noise_of(model: nn.Module) -> dict[str, float]:
    """The largest number of each kind by which a module of `model` makes noise in training, by its name there."""
    found: dict[str, float] = {}
    for module in model.modules():
        for name, value in _settings(module).items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def without_noise(model: nn.Module) -> None:
    """Set all of it to 0: a ratio of two dropout masks is not a ratio of policies."""
    for module in model.modules():
        for name in _settings(module):
            setattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else name, 0.0)


def _settings(module: nn.Module) -> dict[str, float]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return {"dropout": module.p} if module.p else {}
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, float) and value > 0 and any(part in name for part in _NOISE)
    }


def settle_noise(policy: nn.Module, args: Any) -> None:
    """At the start of a run: stop the noise as `disable_dropout` asks (TRL stops what is a module), or warn of it.

    Raises:
        ValueError: `kl_step_limit` is to compare the policy with itself, through the noise.
    """
    noise = noise_of(policy)
    if noise and args.disable_dropout:
        without_noise(policy)
    elif noise:
        named = ", ".join(f"{name} {value:g}" for name, value in sorted(noise.items()))
        if args.kl_step_limit is not None:
            raise ValueError(
                f"kl_step_limit={args.kl_step_limit:g} compares the policy before and after a step and the policy is "
                f"noisy in training ({named}): set disable_dropout=true, or remove kl_step_limit."
            )
        logger.warning(
            f"The policy is noisy in training ({named}): its log-probs are not those of the policy that samples, "
            "and its KL is above 0 from the start. Set disable_dropout=true."
        )
