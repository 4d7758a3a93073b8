"""How configuration, layout, models and data fit together."""

from collections.abc import Iterator

from datasets import IterableDataset
from trl import ModelConfig

from ...trainers.errors import CheckpointError
from ...trainers.reference.resumed import check_resume
from ..recipe.algorithm import Algorithm, Inputs
from ..recipe.arguments import Findings, Recipe
from .layout import Layout
from .memory import Models


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
    if args.kl_needs_exact and layout.kind == "FSDP" and layout.fsdp_version == 1:
        yield "the exact KL refuses FSDP1: set fsdp_version: 2 in the accelerate file, or kl_estimator k1, k2 or k3."
    if args.kl_needs_exact and models is not None and models.adapts_head:
        yield "the exact KL refuses an adapter on lm_head: take it out of lora_target_modules and lora_modules_to_save."
    yield from _sharded_bits(recipe.model, layout)
    if getattr(args, "use_vllm", False) and algorithm.has_value_model and layout.fsdp_version == 1:
        yield "use_vllm=true: PPO cannot send weights that FSDP1 has flattened: set fsdp_version: 2."
    if getattr(args, "use_vllm", False) and layout.processes % args.vllm_tensor_parallel_size:
        size = args.vllm_tensor_parallel_size
        yield f"vllm_tensor_parallel_size={size} must divide the {layout.processes} processes."


def _sharded_bits(model: ModelConfig, layout: Layout) -> Iterator[str]:
    """What shards parameters takes packed ones only as numbers of the dtype that the others have."""
    if not layout.shards_parameters:
        return
    if model.load_in_8bit:
        yield f"load_in_8bit=True: {layout.name} cannot shard 8-bit weights: use load_in_4bit."
    if model.load_in_4bit and model.bnb_4bit_quant_storage != model.dtype:
        yield (
            f"load_in_4bit=True: {layout.name} shards 4-bit weights only if they are stored as the others are: set "
            f"bnb_4bit_quant_storage to dtype, {model.dtype}."
        )
