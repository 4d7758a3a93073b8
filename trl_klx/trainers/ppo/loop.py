"""PPO on transformers' training loop: one step of the loop is one rollout with its updates.

The dataloader yields the prompts of a rollout, and all that the loop does around a step works as in every other
trainer. TRL's own `PPOTrainer`, which ended with 1.12, replaces that loop by one without clipping, mixed precision,
checkpointing, resuming or evaluation, and never calls `Trainer.__init__`.
"""

import copy
import math
from collections.abc import Sized
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, Trainer
from trl.distributed import DistributedBackend
from trl.models.utils import (
    disable_gradient_checkpointing,
    prepare_deepspeed,
    prepare_fsdp,
    unwrap_model_for_generation,
)
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import identity

from ..checks.noise import without_noise
from ..errors import CheckpointError
from ..seams import TRL_HAS_PPO, keep_float32_outputs, swapped
from ..shared.generation import end_tokens, generating_with
from .config import KLXPPOConfig, as_dict
from .engine import Engine
from .model import VALUE_FOLDER, PolicyAndValue
from .rollout import padded

# Where TRL has a PPO trainer, ours is one, for those who ask with isinstance. All that it does is overridden below, so
# that PPO is the same code on every version of TRL.
if TYPE_CHECKING or not TRL_HAS_PPO:
    _TRLTrainer = _BaseTrainer
else:
    from trl.experimental.ppo import PPOTrainer as _TRLTrainer


class PPOLoop(_TRLTrainer):
    """Sets up policy, value model and reference, samples from the policy, saves and loads; a step is the subclass's.

    Args:
        args: the config; it is copied, with what transformers' loop has to see.
        model: policy and value model.
        ref_model: the frozen reference; None: the policy without its adapter, or none needed.

    Attributes:
        rollout_prompts: how many prompts a rollout has, on all processes.
        stop_tokens: ids that end an answer; none where answers have full length.
        engine: vLLM, which samples in the policy's place; None without `use_vllm`.
    """

    args: KLXPPOConfig
    model: PolicyAndValue
    ref_model: Any
    processing_class: Any
    optimizer: Any

    # Where TRL has versions of these, they are part of the loop that is replaced.
    train = Trainer.train
    save_model = Trainer.save_model
    get_eval_dataloader = Trainer.get_eval_dataloader

    def __init__(
        self, args: KLXPPOConfig, model: PolicyAndValue, ref_model: PreTrainedModel | None, tokenizer: Any, **given: Any
    ) -> None:
        own_prompts = args.rollout_size  # of a rollout, on this process
        self.rollout_prompts = own_prompts * args.world_size
        args = _as_the_loop_sees_it(args, self.rollout_prompts)
        without_noise(model)
        if isinstance(model.policy, PeftModel) and args.gradient_checkpointing:
            model.policy.enable_input_require_grads()
        _check_size(self.rollout_prompts, given["train_dataset"])
        # Past the PPOTrainer's own, which leaves Trainer's out.
        own = {"model": model, "args": args, "processing_class": tokenizer, "data_collator": identity}
        _BaseTrainer.__init__(self, **own, **given)
        if self.is_fsdp_enabled:
            keep_float32_outputs(self.accelerator)
        self._train_batch_size = own_prompts  # the dataloader's
        self.ref_model = None if ref_model is None else self.frozen(ref_model)
        self.stop_tokens = end_tokens(model.policy, tokenizer) if args.stop_token == "eos" else []
        if args.stop_token_id is not None:
            self.stop_tokens = [args.stop_token_id]
        self._backend = DistributedBackend(self.accelerator)
        self.engine = Engine(self, model.policy, own_prompts) if args.use_vllm else None
        # Every process samples answers of its own.
        set_seed(args.seed, device_specific=True)
        model.policy.add_model_tags(self._tag_names)

    def frozen(self, model: nn.Module) -> Any:
        """Prepare a model that is only run: placed, in the run's precision, sharded where the policy is."""
        without_noise(model)
        model.eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)

    @property
    def policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def vllm_generation(self) -> Any:
        """TRL's, under the name by which rollout functions for GRPO find it; None without `use_vllm`."""
        return None if self.engine is None else self.engine.generation

    def without_checkpointing(self) -> AbstractContextManager[None]:
        model: Any = self.model
        return disable_gradient_checkpointing(model, as_dict(self.args.gradient_checkpointing_kwargs))

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Sample one answer to each prompt from the policy as it is now, not yet cut at its stop token."""
        args, tokenizer, gather = self.args, self.processing_class, self.args.ds3_gather_for_generation
        config = GenerationConfig(
            max_new_tokens=args.response_length,
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.stop_tokens or None,
        )
        completions: list[list[int]] = []
        size, device = args.local_rollout_forward_batch_size, self.accelerator.device
        with (
            self.accelerator.autocast(),
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, gather) as unwrapped,
            self._backend.summon_full_params(self.model_wrapped, recurse=False),
            generating_with(unwrapped.policy, config),
        ):
            for start in range(0, len(prompt_ids), size):
                tokens, mask = padded(prompt_ids[start : start + size], tokenizer.pad_token_id, "left", device)
                output = unwrapped.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
                completions += output[:, tokens.size(1) :].tolist()
        return completions

    def get_train_dataloader(self) -> Any:
        """Rollouts of full size only: advantages are whitened over them."""
        with swapped(self.args, dataloader_drop_last=True):
            return Trainer.get_train_dataloader(self)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.create_model_card()  # as TRL's trainers do with every checkpoint
        with swapped(self, _save=partial(self._save, with_value_model=True)):
            Trainer._save_checkpoint(self, model, trial)

    def _save(
        self, output_dir: str | None = None, state_dict: dict | None = None, with_value_model: bool = False
    ) -> None:
        """Save the policy, where `from_pretrained` finds it; a checkpoint also holds the value model."""
        folder = Path(output_dir or self.args.output_dir or ".")
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        model.save(folder, state_dict, with_value_model=with_value_model)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        value_folder = Path(resume_from_checkpoint) / VALUE_FOLDER
        if not value_folder.is_dir():
            raise CheckpointError(
                f"{resume_from_checkpoint} holds no {VALUE_FOLDER}, so no PPO run can continue from it: resume from a "
                "checkpoint that PPO wrote, or start from it as model_name_or_path."
            )
        for part, folder in ((self.model.policy, resume_from_checkpoint), (self.model.value_model, str(value_folder))):
            with swapped(self, model=part):  # transformers asks it which weights are tied
                super()._load_from_checkpoint(folder, part)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        if self.engine is not None:
            self.engine.begin()


def _as_the_loop_sees_it(args: KLXPPOConfig, rollout_prompts: int) -> KLXPPOConfig:
    """A copy in which one batch is one rollout, and a step's micro-batches are the trainer's own business."""
    seen = copy.copy(args)
    if seen.total_episodes is not None:
        seen.max_steps = math.ceil(seen.total_episodes / rollout_prompts)
    seen.gradient_accumulation_steps = 1
    seen.remove_unused_columns = False
    accelerator: Any = copy.copy(args.accelerator_config)
    accelerator.dispatch_batches = False  # prompts of a stream are text, which accelerate cannot scatter
    seen.accelerator_config = accelerator
    if seen.data_seed is None:
        seen.data_seed = seen.seed  # processes sample with seeds of their own, and shuffle with one
    if seen.ddp_find_unused_parameters is None:
        seen.ddp_find_unused_parameters = False  # every forward uses all of them
    return seen


def _check_size(rollout_prompts: int, dataset: Any) -> None:
    rows = len(dataset) if isinstance(dataset, Sized) else math.inf  # a stream
    if rows < rollout_prompts:
        raise ValueError(
            f"the dataset has {rows} prompts and a rollout takes {rollout_prompts} (per_device_train_batch_size * "
            "gradient_accumulation_steps * processes): lower one of these, or give more prompts."
        )
