"""What differs between the TRL versions we support, in one place."""

from importlib.metadata import version

from packaging.version import Version

TRL_VERSION = Version(version("trl"))

# TRL removed PPO in 1.13.
TRL_HAS_PPO = TRL_VERSION < Version("1.13")

# Up to 1.14, use_liger_kernel computes the GRPO loss in a fused kernel with its own hard-coded k3, past
# `_compute_loss`. Since 1.16 it only swaps layers.
LIGER_COMPUTES_THE_LOSS = TRL_VERSION < Version("1.16")

# Since 1.16 models carry TRL's fused head, which scores tokens without building the logits.
FUSED_LM_HEAD = TRL_VERSION >= Version("1.16")


def check_trl_version() -> None:
    """Raise ImportError where the trainers would fail later, and less clearly."""
    if not Version("1.12") <= TRL_VERSION < Version("1.17") or (TRL_VERSION.major, TRL_VERSION.minor) == (1, 15):
        raise ImportError(
            f"trl {TRL_VERSION} is installed and trl_klx runs on trl>=1.12,<1.17,!=1.15.*: "
            "pip install 'trl==1.12.0' (the last with PPO) or 'trl==1.16.0'."
        )


def check_trl_has_ppo() -> None:
    """Raise ImportError where TRL has no PPO, with the reason and the command that helps."""
    if TRL_VERSION >= Version("1.13"):
        raise ImportError(
            f"trl {TRL_VERSION} is installed and has no PPO: TRL removed it in 1.13, and KLXPPOTrainer builds on it. "
            "Install the last version that has it: pip install 'trl==1.12.0'. GRPO and DPO run on this version."
        )
