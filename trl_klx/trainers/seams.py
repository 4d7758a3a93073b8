"""What differs between the TRL versions we support, and how their code is bent, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from ..hub.versions import UNKNOWN, version_of


@contextmanager
def swapped(holder: Any, **attributes: Any) -> Iterator[None]:
    """While active, `holder` has these attributes; afterwards those of its own again, and no others.

    Every bend of code that is not ours goes through here. It may be nested, also for the same holder and names. An
    object's attributes are written past its class: a method is shadowed, `trainer.beta` needs no controller's consent,
    and a plain property cannot be swapped on an object, only on its class.
    """
    own = vars(holder)
    kept = {name: own[name] for name in attributes if name in own}
    for name, value in attributes.items():
        _put(holder, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in kept:
                _put(holder, name, kept[name])
            elif isinstance(holder, type):
                delattr(holder, name)
            else:
                own.pop(name, None)


def _put(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, type):
        setattr(holder, name, value)
    else:
        vars(holder)[name] = value


def _trl_version() -> Version:
    """TRL's version. A checkout on the path that was never installed has it in a file, or shows it by having PPO."""
    found = version_of("trl")
    if found == UNKNOWN:
        package = find_spec("trl")
        file = Path(str(package and package.origin)).parent.parent / "VERSION"
        has_ppo = find_spec("trl.experimental.ppo") is not None
        found = file.read_text().strip() if file.is_file() else "1.12" if has_ppo else "1.16"
    return Version(found)


TRL_VERSION = _trl_version()

# TRL removed PPO in 1.13.
TRL_HAS_PPO = TRL_VERSION < Version("1.13")

# Up to 1.14, use_liger_kernel computes the GRPO loss in a fused kernel with its own hard-coded k3, past
# `_compute_loss`. Since 1.16 it only swaps layers.
LIGER_COMPUTES_THE_LOSS = TRL_VERSION < Version("1.16")

# Since 1.16 models carry TRL's fused head, which scores tokens without building the logits.
FUSED_LM_HEAD = TRL_VERSION >= Version("1.16")

# Up to 1.14, GRPO knows one end token, the tokenizer's: answers run past the other ends of a model's generation config,
# and one that ends there counts as cut off. Since 1.16 it knows them all, in `eos_token_ids`.
ONE_END_TOKEN = TRL_VERSION < Version("1.16")


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


def check_reference_head(ref_model: Any) -> None:
    """Raise ValueError where TRL's fused head, since 1.16, would read a weight that accelerate has offloaded."""
    head = ref_model.get_output_embeddings() if FUSED_LM_HEAD and isinstance(ref_model, PreTrainedModel) else None
    if head is not None and head.weight.is_meta:
        raise ValueError(
            f"the output head of ref_model is offloaded, and DPO of trl {TRL_VERSION} reads its weight past "
            "accelerate's hooks: load the reference without device_map, or leave ref_model out."
        )


def check_virtual_tokens(model: Any, peft_config: PeftConfig | None) -> None:
    """Raise ValueError where TRL's DPO would score virtual tokens: below 1.16 it takes all logits for the text's.

    (Prefix tuning puts its tokens into the cache, where nothing scores them.)
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if FUSED_LM_HEAD or config is None or not config.is_prompt_learning or config.peft_type == PeftType.PREFIX_TUNING:
        return
    raise ValueError(
        f"{type(config).__name__} puts virtual tokens before the text, and DPO of trl {TRL_VERSION} scores them as "
        "text: use trl>=1.16, LoRA or prefix tuning."
    )
