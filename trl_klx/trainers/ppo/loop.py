"""TRL's PPOTrainer put back on transformers' training loop.

TRL's `PPOTrainer` replaces that loop by one of its own, without clipping, mixed precision, checkpointing, resuming or
evaluation, and never calls `Trainer.__init__`. Here one step of transformers' loop is one rollout: its dataloader
yields the prompts of a rollout, and all that the loop does around a step works as in every other trainer.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.experimental.ppo import PPOTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import identity, use_adapter

from ..checks.noise import without_noise
from ..errors import CheckpointError
from ..reference.adapters import REF_ADAPTER, trainable_as_before
from .config import KLXPPOConfig
from .model import VALUE_FOLDER, PolicyAndValue


class PPOLoop(PPOTrainer):
    """Sets up policy, value model and reference, and saves and loads them; what a step does is the subclass's.

    Args:
        args: the config; it is copied, with what transformers' loop has to see.
        model: policy and value model.
        ref_model: the frozen reference; None: the policy without its adapter, or none needed.
    """

    args: KLXPPOConfig
    model: PolicyAndValue
    ref_model: Any
    processing_class: Any
    optimizer: Any

    # TRL's own versions of these are part of the loop that is replaced.
    train = Trainer.train
    save_model = Trainer.save_model
    get_eval_dataloader = Trainer.get_eval_dataloader
    _saves_value_model = False

    def __init__(
        self,
        args: KLXPPOConfig,
        model: PolicyAndValue,
        ref_model: PreTrainedModel | None,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Any,
        eval_dataset: Any,
        **kwargs: Any,
    ) -> None:
        args = _as_the_loop_sees_it(args)
        without_noise(model)
        self.is_peft_model = isinstance(model.policy, PeftModel)
        if self.is_peft_model and args.gradient_checkpointing:
            model.policy.enable_input_require_grads()
        _check_size(args, train_dataset)
        # Trainer's own __init__, past the PPOTrainer's that leaves it out.
        super(PPOTrainer, self).__init__(
            model=model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._train_batch_size = args.local_batch_size or 0  # the dataloader's: prompts of a rollout on this process
        self.ref_model = None if ref_model is None else self._frozen(ref_model)
        # Every process samples answers of its own.
        set_seed(args.seed, device_specific=True)
        model.policy.add_model_tags(self._tag_names)

    def _frozen(self, model: nn.Module) -> Any:
        """Prepare a model that is only run: placed, in the run's precision, sharded where the policy is."""
        without_noise(model)
        model.eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)

    @property
    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model).policy

    @contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """While active, a PEFT policy is its reference: the adapter of that name, or no adapter."""
        name = self.args.ref_adapter_name
        if name is None and REF_ADAPTER in self._policy.peft_config:
            name = REF_ADAPTER
        with trainable_as_before(self._policy), use_adapter(self._policy, name):
            yield

    def get_train_dataloader(self) -> Any:
        """Rollouts of full size only: advantages are whitened over them."""
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, True
        try:
            return Trainer.get_train_dataloader(self)
        finally:
            self.args.dataloader_drop_last = kept

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saves_value_model = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_value_model = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the policy, where `from_pretrained` finds it; a checkpoint also holds the value model."""
        folder = Path(output_dir or self.args.output_dir or ".")
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        model.save(folder, state_dict, with_value_model=self._saves_value_model)
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
            with self._seen_as_model(part):
                super()._load_from_checkpoint(folder, part)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[arg-type]

    @contextmanager
    def _seen_as_model(self, part: nn.Module) -> Iterator[None]:
        """Trainer's loading asks `self.model` which weights are tied."""
        kept, self.model = self.model, part  # type: ignore[assignment]
        try:
            yield
        finally:
            self.model = kept


def _as_the_loop_sees_it(args: KLXPPOConfig) -> KLXPPOConfig:
    """A copy in which one batch is one rollout, and a step's micro-batches are the trainer's own business."""
    seen = copy.copy(args)
    seen.world_size = PartialState().num_processes  # TRL's field hides TrainingArguments' property
    seen.local_batch_size = args.rollout_size
    seen.batch_size = args.rollout_size * seen.world_size
    seen.micro_batch_size = args.per_device_train_batch_size * seen.world_size
    seen.local_mini_batch_size = args.rollout_size // args.num_mini_batches
    seen.mini_batch_size = seen.local_mini_batch_size * seen.world_size
    if seen.total_episodes is not None:
        seen.max_steps = math.ceil(seen.total_episodes / seen.batch_size)
    seen.gradient_accumulation_steps = 1
    seen.remove_unused_columns = False
    seen.accelerator_config = copy.copy(args.accelerator_config)
    seen.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]  # prompts of a stream are text, which accelerate cannot scatter
    if seen.data_seed is None:
        seen.data_seed = seen.seed  # processes sample with seeds of their own, and shuffle with one
    if seen.ddp_find_unused_parameters is None:
        seen.ddp_find_unused_parameters = False  # every forward uses all of them
    return seen


def _check_size(args: KLXPPOConfig, dataset: Any) -> None:
    try:
        rows = len(dataset)
    except TypeError:
        return  # a stream
    if rows < (args.batch_size or 0):
        raise ValueError(
            f"the dataset has {rows} prompts and a rollout takes {args.batch_size} (per_device_train_batch_size * "
            "gradient_accumulation_steps * processes): lower one of these, or give more prompts."
        )


def check_arguments(
    args: Any, model: Any, ref_model: Any, train_dataset: Any, reward_model: Any, value_model: Any, data_collator: Any
) -> None:
    """Refuse arguments of the trainer that cannot be meant, before a model is loaded."""
    if not isinstance(args, KLXPPOConfig):
        raise TypeError(f"args is a {type(args).__name__}: KLXPPOTrainer takes a KLXPPOConfig.")
    if model is None:
        raise ValueError("model is missing: pass the policy, or its path.")
    if train_dataset is None:
        raise ValueError("train_dataset is missing: pass a dataset with a column 'prompt'.")
    if isinstance(model, nn.Module) and ref_model is model:
        raise ValueError("ref_model is the policy itself: leave it out, and a copy of the policy is made.")
    if isinstance(value_model, nn.Module) and value_model is reward_model:
        raise ValueError("value_model is the reward model itself, which training would change: pass a copy of it.")
    if data_collator is not None:
        raise ValueError("data_collator has no effect: prompts are tokenised and padded by the trainer; remove it.")
