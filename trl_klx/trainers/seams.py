"""Where the trainers depend on how TRL, accelerate and transformers are made: read this when a new version is out.

What differs between TRL's versions is in the constants and checks below. Methods that our classes override are in
`OVERRIDDEN`, attributes put in for a while in `SWAPPED`, private ones that are read in `READ`. Four bends are of
another kind: the exact KL wraps the models' `forward` for good (`exact.forward`), FSDP2 does not round what models
give, in PPO and with an exact KL (`keep_float32_outputs`), 4-bit layers on a CPU keep their gradient
(`settle_packed_weights`), and while TRL sets up, a reference that is an adapter stands in `peft_config` under TRL's
name for it (`reference.adapters`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

from ..hub.versions import UNKNOWN, version_of

# Methods of TRL's and transformers' trainers that ours override, and why. Where no version is named: TRL 1.12 to 1.16,
# transformers from 5.5 on.
OVERRIDDEN = {
    # Every trainer, of transformers.Trainer
    "create_accelerator_and_postprocess": "with an exact KL FSDP2 does not round what models give",
    "train": "the run begins: what is watched starts from zero, and checkpoints are found and locked before a step",
    "training_step": "beta moves after the last micro-batch of a step; PPO: a step is a rollout with all its updates; "
    "GRPO: an update that is left out",
    "compute_loss": "the loss is watched; DeepSpeed gets one that it skips, because it steps within backward",
    "prediction_step": "PPO: an evaluation samples answers and scores them",
    "log": "the KL and what else is known at a log joins TRL's entry",
    "evaluate": "DPO: a probe of the policy's own KL comes before the pairs",
    "_evaluate": "a resumed run does not evaluate again at its start",
    "_run_epoch": "a resumed run that is over takes no step",
    "_get_grad_norm": "the last call before the optimizer's step, and the place to skip it",
    "_save_checkpoint": "whole or not at all, with the controllers' state, and none of spoilt weights",
    "_load_from_checkpoint": "PEFT would load a bfloat16 adapter in float32; PPO: policy and value model, each "
    "from its folder",
    "_load_optimizer_and_scheduler": "the earliest call of a resumed run with the model loaded and the state known",
    "_finalize_training": "transformers would delete all checkpoints but the best",
    "_push_from_checkpoint": "pushes what the Hub has not got, with our card, and does not end the run where it fails",
    "_finish_current_push": "reports a push that has failed",
    "init_hf_repo": "a Hub that cannot be reached does not end the run",
    "push_to_hub": "pushes with our card",
    "create_model_card": "our card in place of TRL's",
    # PPO, which runs on transformers' loop (`ppo.loop`); where no method is transformers', it is TRL 1.12's
    "_save": "the policy where `from_pretrained` finds it, the value model beside it",
    "_load_best_model": "policy and value model, each from its folder",
    "save_model": "transformers' again, in place of TRL's, which swaps the model for its policy",
    "get_train_dataloader": "transformers' again: TRL builds its own when it is set up",
    "get_eval_dataloader": "the same",
    "generate_completions": "of TRL 1.12: prints answers of our sampler",
    # GRPO
    "_get_per_token_logps_and_entropies": "the scoring of answers, which also gives hidden states and the exact KL",
    "_prepare_inputs": "a rollout is shuffled on the device",
    "_generate_and_score_completions": "the rollout: the reference's scores and the KL's credit join the batch",
    "_generate_single_turn": "`generate` samples from the policy that is scored; answers end at every end token",
    "_generate": "up to 1.14: answers that end with another end token than the tokenizer's count as cut off",
    "_calculate_rewards": "functions that return something other than rewards, reward models, and the gold reward "
    "in evaluation",
    "_compute_loss": "our KL joins TRL's loss, whose own is off (GRPO); the exact KL rides in TRL's forward (DPO)",
    # DPO
    "_prepare_dataset": "TRL tokenises here: tokens that the policy does not know are found",
}

# Attributes that `swapped` puts in while TRL's code runs, and why.
SWAPPED = {
    "beta": "of the trainer: 0 switches TRL's own KL off; of its config: at 0 TRL would build no reference (GRPO)",
    "sync_ref_model": "of the config: TRL's callback is not added, which knows no adapter and saves nothing",
    "mask_truncated_completions": "up to 1.14: TRL would mask answers that end with another end token (GRPO)",
    "reward_funcs": "checked ones, or the gold reward alone (GRPO)",
    "reward_processing_classes": "of the gold reward (GRPO)",
    "reward_func_names": "of the gold reward (GRPO)",
    "shuffle_sequence_dict": "of TRL's module: its permutation is the host's, which waits at every tensor (GRPO)",
    "create_model_from_path": "of TRL's module: gives the copy of a policy in memory as the reference",
    "add_adapter": "of the policy, with `get_parameter`: TRL finds the reference's adapter made, by whatever name",
    "get_parameter": "see `add_adapter`",
    "generation_config": "of the model: `generate` fills from it what the given one leaves open",
    "_get_logits_processor": "of the model: the only way to a processor behind `generate`'s own",
    "forward": "of the output head, or `_old_forward` inside accelerate's hook: our code where its weights are whole "
    "(in PPO while the whole model runs: it scores tokens in the head's place)",
    "_ChunkedLogProbFunction": "of TRL's module, since 1.16: while its fused head runs for an exact KL, log-probs, "
    "entropy and KL come from one projection",
    "precompute_ref_logps": "TRL reads the reference's log-probs from the batch, and does not score it again (DPO)",
    "gather": "of the accelerator: the log-ratios of single pairs are seen where TRL gathers them (DPO)",
    "save_total_limit": "of the config: rotating checkpoints is ours",
    "dataloader_drop_last": "of the config: rollouts of full size only (PPO)",
    "model": "transformers' loading asks it which weights are tied (PPO)",
    "world_size": "of TrainingArguments: a dry run computes the batches of the processes that it plans for",
    "HF_HUB_OFFLINE": "of huggingface_hub and datasets: a dry run that cannot reach the Hub looks at what is cached",
    "_save": "a checkpoint holds the value model, and what is saved at the end does not (PPO)",
}


# Private attributes of their trainers that ours read or set, and why.
READ = {
    "_step": "the micro-batch of the rollout at which GRPO stands; a resumed run sets it, and what is left out counts",
    "_buffered_inputs": "GRPO's rollout in use: a resumed run empties it, and samples again",
    "_metrics": "what TRL has collected for the next log",
    "_tokenizer": "the tokenizer, also of a processor (GRPO, DPO)",
    "_has_async_funcs": "whether GRPO awaits reward functions",
    "_total_train_tokens": "DPO's count of tokens, which TRL keeps in no checkpoint",
    "_is_vision_dataset": "whether DPO's pairs hold images",
    "_get_output_dir": "where checkpoints of a hyperparameter search go",
    "_clip_grad_norm": "PPO's updates within a step are clipped as transformers' are",
    "_train_batch_size": "transformers' batch size, which PPO sets",
}


def keep_float32_outputs(accelerator: Any) -> None:
    """Leave what a model gives as it is: accelerate has FSDP2 round all of it to half precision, log-probs included.

    In bfloat16 a log-prob of 8 has a spacing of 0.03, and the ratio of two of them a noise of as much. Call before
    `prepare`.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def settle_packed_weights(policy: Any) -> None:
    """Leave the 4-bit weights of bitsandbytes (0.50) as they are on CPUs with AVX512-BF16; refuse a packed head.

    In eval mode, where answers are sampled, its layers would there pack them anew for a faster product, with rounded
    scales and without a gradient: from then on none reaches the layers below, and torch only warns.

    Raises:
        ValueError: it has done so before; or the output head is packed, whose weight the exact KL and, since TRL 1.16,
            its fused head read. (transformers packs it only when it is told to.)
    """
    head = policy.get_output_embeddings()
    if type(head).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"the output head is quantised (a {type(head).__name__}), and its weight is read as it is: leave it out by "
            "llm_int8_skip_modules=['lm_head'] in the quantization_config."
        )
    for module in policy.modules():
        if "support_avx512bf16_for_cpu" not in vars(module):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "the policy has run in eval mode (as for precompute_ref_log_probs), where bitsandbytes packs 4-bit "
                "weights for this CPU in a way that has no gradient: load it again, and pass it before it has run."
            )
        module.support_avx512bf16_for_cpu = False


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

# The versions that CI runs, oldest and newest. Newer ones are tried, with a warning.
TESTED_TRL = (Version("1.12.0"), Version("1.16.0"))

# TRL removed its PPO trainer in 1.13. Ours does not need it: it is a subclass of it where it is there (`ppo.loop`), and
# the tests compare the two.
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
    """Raise ImportError where the trainers would fail later, and less clearly; warn of a TRL that nobody has tested.

    TRL 1.15 imports Triton, which only machines with a GPU have.
    """
    oldest, newest = TESTED_TRL
    if oldest > TRL_VERSION or (TRL_VERSION.major, TRL_VERSION.minor) == (1, 15):
        raise ImportError(
            f"trl {TRL_VERSION} is installed and trl_klx runs on trl>={oldest.major}.{oldest.minor},!=1.15.*: "
            f"pip install 'trl=={newest}'."
        )
    if (TRL_VERSION.major, TRL_VERSION.minor) > (newest.major, newest.minor):
        warnings.warn(
            f"trl {TRL_VERSION} is newer than trl_klx was tested with ({oldest} and {newest}). If a trainer fails in "
            f"TRL's code or a result surprises you: pip install 'trl=={newest}'.",
            stacklevel=1,  # one place, so that Python shows it once
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
