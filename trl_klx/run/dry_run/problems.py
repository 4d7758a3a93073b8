"""What is wrong with a recipe's models, data, rewards and batches: every problem found, none of them fatal here."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import IterableDataset, load_dataset
from transformers import AutoTokenizer
from trl.data_utils import is_conversational

from ...trainers.checkpoints import CheckpointError, resolve_checkpoint
from ...trainers.gold import check_gold_reward
from ..arguments import BadInput, Recipe
from ..inputs import check_columns, check_model, first_line, load_reward_functions, prepare_rows
from .layout import Layout
from .parameters import Models

# A bfloat16 weight has 8 bits: AdamW's step, about the learning rate, is lost below 1/512 of the weight, for weights of
# typically 0.02 to 0.1.
_BFLOAT16_STEPS = 4e-5


class Data(NamedTuple):
    """The splits that the run would read, as streams; `rows` of the training split, where that is known."""

    splits: dict[str, IterableDataset]
    rows: int | None


class Collector:
    """Collects the sentences of checks that raise ValueError."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def ask(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a check; None where it complained."""
        try:
            return check(*args, **kwargs)
        except ValueError as error:
            self.add(str(error))
            return None

    def add(self, sentence: str) -> None:
        if sentence not in self.sentences:
            self.sentences.append(sentence)


def check_inputs(algorithm: str, recipe: Recipe, found: Collector) -> Data | None:
    """Check models, tokenizer, rewards and data, and what they have to do with each other."""
    run, args, model = recipe
    trusts = bool(getattr(args, "trust_remote_code", False))
    path = model.model_name_or_path
    found.ask(check_model, path, revision=model.model_revision, trust_remote_code=trusts)
    for option in ("reward_model_path", "value_model_path"):
        if getattr(args, option, None) is not None:
            found.ask(check_model, getattr(args, option), option=option, trust_remote_code=trusts)
    rewards: list[Callable] = []
    for name in run.reward_funcs or []:
        rewards += found.ask(load_reward_functions, name) or []
    gold = None
    if run.gold_reward_func:
        gold = found.ask(load_reward_functions, run.gold_reward_func, option="gold_reward_func")
    if algorithm == "dpo":
        for option in ("reward_funcs", "gold_reward_func"):
            if getattr(run, option):
                found.add(f"{option}={getattr(run, option)!r} has no effect in DPO: remove it.")
    else:
        if not run.reward_funcs and getattr(args, "reward_model_path", None) is None:
            found.add(
                "there is no reward: give reward_funcs as dotted paths"
                + ", or reward_model_path." * (algorithm == "ppo")
            )
        found.ask(check_gold_reward, args, gold[0] if gold else None)
    data = found.ask(_open, algorithm, recipe)
    if data is not None:
        _check_data(algorithm, recipe, data, [*rewards, *(gold or [])], found)
    found.ask(_tokenizer, recipe, data)
    return data


def _open(algorithm: str, recipe: Recipe) -> Data:
    """The dataset as streams, so that nothing is downloaded but its first rows."""
    run, args, _ = recipe
    if run.dataset_name is None:
        raise BadInput("dataset_name is missing: give a folder with train.jsonl, or the name of a dataset on the Hub.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = load_dataset(run.dataset_name, name=run.dataset_config, streaming=True)
    except Exception as error:  # `datasets` raises a different class for every way a path can be wrong
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(f"dataset_name={run.dataset_name!r} cannot be loaded here ({reason}).") from error
    wanted = {"dataset_train_split": run.dataset_train_split}
    probes = algorithm == "dpo" and bool(args.kl_probe_steps)
    if probes or args.eval_strategy != "no" or args.eval_on_start:
        wanted["dataset_test_split"] = run.dataset_test_split
    for option, split in wanted.items():
        if split not in dataset:
            raise BadInput(f"{option}={split!r} is not in {run.dataset_name}, which has {', '.join(dataset)}.")
    rows = count_rows(
        dataset[run.dataset_train_split], run.dataset_train_split, is_local=Path(run.dataset_name).exists()
    )
    dataset = prepare_rows(dataset, run.dataset_prepare)
    return Data({split: dataset[split] for split in wanted.values()}, rows)


def count_rows(stream: IterableDataset, split: str, *, is_local: bool) -> int | None:
    """Rows as the dataset's own metadata says; local files are counted, others would be downloaded whole for it."""
    known = (stream.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return known.num_examples
    return sum(1 for _ in stream) if is_local else None


_COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "grpo": [("prompt",)],
    "ppo": [("prompt", "input_ids")],
    "dpo": [("chosen",), ("rejected",)],
}


def _check_data(algorithm: str, recipe: Recipe, data: Data, rewards: list[Callable], found: Collector) -> None:
    for split, stream in data.splits.items():
        first: dict | None = next(iter(stream), None)
        if first is None:
            found.add(f"the split {split!r} of the dataset is empty: give it at least one row.")
            continue
        for wanted in _COLUMNS[algorithm]:
            found.ask(check_columns, list(first), split, [wanted], [])
        for function in rewards:
            found.ask(check_columns, list(first), split, [], [function])


def _tokenizer(recipe: Recipe, data: Data | None) -> None:
    """Refuse a tokenizer that is not there, or has no chat template for conversations."""
    model = recipe.model
    if model.model_name_or_path is None:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    except Exception as error:  # as many classes as there are tokenizers
        raise BadInput(
            f"the tokenizer of model_name_or_path={model.model_name_or_path!r} cannot be loaded here "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    first = next(iter(data.splits[recipe.run.dataset_train_split]), None) if data else None
    given = getattr(recipe.args, "chat_template_path", None)
    if first is not None and is_conversational(first) and tokenizer.chat_template is None and given is None:
        raise BadInput(
            f"the data is conversational and the tokenizer of {model.model_name_or_path!r} has no chat template: take "
            "an instruct model, or prompts that are plain strings."
        )


def check_run(
    algorithm: str, recipe: Recipe, data: Data | None, models: Models | None, layout: Layout
) -> Iterator[str]:
    """Sentences about how configuration, layout, models and data fit together."""
    args = recipe.args
    try:
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    except CheckpointError as error:
        yield str(error)
    rows = None if data is None else data.rows
    if algorithm == "ppo" and rows is not None and rows < args.rollout_size * layout.processes:
        yield (
            f"the dataset has {rows} prompts and a rollout takes {args.rollout_size * layout.processes} "
            "(per_device_train_batch_size * gradient_accumulation_steps * processes): lower one of these."
        )
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
    if getattr(args, "use_vllm", False) and layout.processes % args.vllm_tensor_parallel_size:
        size = args.vllm_tensor_parallel_size
        yield f"vllm_tensor_parallel_size={size} must divide the {layout.processes} processes."
