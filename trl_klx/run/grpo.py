"""GRPO from a recipe: `scripts/grpo.py` and `trl-klx grpo`."""

import os
import sys
import time
from pathlib import Path

from transformers import ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..monitor.history import HistoryCallback
from ..monitor.progress import KLProgressCallback
from ..trainers.grpo import KLXGRPOTrainer
from ..trainers.grpo_config import KLXGRPOConfig
from ..trainers.kl_control import ControllerStateError
from .arguments import RunArguments, parse_recipe
from .inputs import check_checkpoint, check_model, load_reward_functions, load_splits
from .report import report, write_resolved_recipe


def main(argv: list[str] | None = None, program: str = "grpo.py") -> int:
    """Check everything, then train, save and report. Returns the exit status: 0, or 2 for bad input."""
    try:
        run, args, model = parse_recipe(
            program, (RunArguments, KLXGRPOConfig, ModelConfig), sys.argv[1:] if argv is None else argv
        )
        rewards = load_reward_functions(run.reward_funcs)
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        dataset = load_splits(run, rewards, needs_test=evaluates)
        check_checkpoint(args.resume_from_checkpoint)
        check_model(model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
        trainer = build_trainer(run, args, model, rewards, dataset, evaluates)
    except ValueError as error:
        return _refuse(error)
    if trainer.accelerator.is_main_process:
        write_resolved_recipe(Path(args.output_dir), run, args, model)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except ControllerStateError as error:
        return _refuse(error)
    trainer.save_model(args.output_dir)
    on_the_hub = None if Path(run.dataset_name).exists() else run.dataset_name
    trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=on_the_hub)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_the_hub)
    if trainer.accelerator.is_main_process:
        report(Path(args.output_dir), args)
    _leave_together(trainer)
    return 0


def _refuse(error: ValueError) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2


def build_trainer(run, args, model, rewards, dataset, evaluates: bool) -> KLXGRPOTrainer:
    """The trainer that a parsed recipe describes, as TRL's own script builds it."""
    args.model_init_kwargs = {
        **(args.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    trainer = KLXGRPOTrainer(
        model.model_name_or_path,
        rewards,
        args,
        train_dataset=dataset[run.dataset_train_split],
        eval_dataset=dataset[run.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[HistoryCallback()],
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(KLProgressCallback())
    return trainer


def _leave_together(trainer: KLXGRPOTrainer) -> None:
    """End all processes in order: gloo aborts now and then when one leaves while another still talks."""
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5 if trainer.accelerator.num_processes > 1 else 0)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
