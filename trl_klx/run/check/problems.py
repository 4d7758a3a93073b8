"""How configuration, layout, models and data fit together."""

from collections.abc import Iterator

from datasets import IterableDataset

from ...trainers.errors import CheckpointError
from ...trainers.reference.resumed import check_resume
from ..recipe.algorithm import Algorithm, Inputs
from ..recipe.arguments import Findings, Recipe
from .layout import Layout
from .memory import Models

# A bfloat16 weight has 8 bits: AdamW's step, about the learning rate, is lost below 1/512 of the weight, for weights of
# typically 0.02 to 0.1.
_BFLOAT16_STEPS = 4e-5


def rows_of_training(inputs: Inputs, recipe: Recipe, found: Findings) -> int | None:
    """Rows of the training split, where that is known."""
    train, split = inputs.train_dataset, recipe.run.dataset_train_split
    if isinstance(train, IterableDataset):
        return found.ask(count_rows, train, split, is_local=recipe.run.data_is_local)
    return len(train)


def count_rows(stream: IterableDataset, split: str, *, is_local: bool) -> int | None:
    """Rows according to the dataset's own metadata; local files are counted, others would be downloaded whole for
    it."""
    known = (stream.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return known.num_examples
    return sum(1 for _ in stream) if is_local else None


def check_run(
    algorithm: Algorithm, recipe: Recipe, rows: int | None, models: Models | None, layout: Layout
) -> Iterator[str]:
    """Sentences about how configuration, layout, models and data fit together."""
    args = recipe.args
    try:
        check_resume(args, recipe.model.model_name_or_path)
    except CheckpointError as error:
        yield str(error)
    if rows is not None:
        yield from algorithm.problems(args, rows, layout.processes)
    if models is not None and layout.kind in ("NO", "MULTI_GPU") and args.learning_rate < _BFLOAT16_STEPS:
        parts = [models.policy] if models.value is None else [models.policy, models.value]
        if any(part.trainable and part.trainable_bytes == 2 * part.trainable for part in parts):
            yield (
                f"dtype={recipe.model.dtype!r} trains 16-bit weights, in which steps of learning_rate="
                f"{args.learning_rate} are rounded away: set dtype to float32 (bf16 keeps the speed), or use "
                "DeepSpeed, which keeps float32 weights."
            )
    if args.kl_needs_exact and layout.kind == "FSDP" and layout.fsdp_version == 1:
        yield "the exact KL refuses FSDP1: set fsdp_version: 2 in the accelerate file, or kl_estimator k1, k2 or k3."
    if args.kl_needs_exact and models is not None and models.adapts_head:
        yield "the exact KL refuses an adapter on lm_head: take it out of lora_target_modules and lora_modules_to_save."
    if getattr(args, "use_vllm", False) and algorithm.has_value_model and layout.fsdp_version == 1:
        yield "use_vllm=true: PPO cannot send weights that FSDP1 has flattened: set fsdp_version: 2."
    if getattr(args, "use_vllm", False) and layout.processes % args.vllm_tensor_parallel_size:
        size = args.vllm_tensor_parallel_size
        yield f"vllm_tensor_parallel_size={size} must divide the {layout.processes} processes."
