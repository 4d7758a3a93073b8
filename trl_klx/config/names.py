"""Names that fields and arguments have had in TRL or transformers, or have in other projects, and what replaces them.

The tables are consulted for a name that is not known, before names that are spelled alike. Read in transformers 4 and
5, TRL 0.12 to 1.16, the Alignment Handbook and Open-R1.
"""

import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

# The same option with the same values, under the name that is right here: taken, with a warning.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "reward_model_name_or_path": "reward_model_path",
    "sft_model_path": "model_name_or_path",
    "torch_dtype": "dtype",
    "use_liger": "use_liger_kernel",
    "use_liger_loss": "use_liger_kernel",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "vllm_max_model_len": "vllm_max_model_length",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "warmup_ratio": "warmup_steps",
}
# Arguments of trainers, likewise; the last three are those of TRL's first PPOTrainer with a config.
RENAMED_ARGUMENTS = {"tokenizer": "processing_class", "config": "args", "policy": "model", "ref_policy": "ref_model"}

_LENGTHS = "GRPO bounds answers by max_completion_length, PPO by response_length; DPO cuts pairs at max_length."
_BY_ENV = "set the environment variable {} (a recipe's `env` can)."
_ONLY_OF_A_SERVER = "start the vLLM server with it (`trl vllm-serve --{}`) and remove it here."
_MIXTURE = "write datasets: a list of path, split, columns and fraction, as in TRL."
# No other name has the same meaning; what to do instead.
REMEDIES = {
    "beta": "PPO calls the weight of its KL kl_coef.",
    "chat_template": "the tokenizer's own is used: save the model's tokenizer with the template that you want.",
    "dataset_mixer": _MIXTURE,
    "dataset_mixture": _MIXTURE,
    "dataset_prompt_column": "the column must be named prompt: rename it in the data, or by dataset_prepare.",
    "dataset_splits": "give dataset_train_split and dataset_test_split.",
    "dispatch_batches": "put it into accelerator_config.",
    "generate_during_eval": "DPO's evaluation samples no answers; kl_probe_steps measures the KL on sampled ones.",
    "group_by_length": "write train_sampling_strategy: group_by_length.",
    "include_inputs_for_metrics": "write include_for_metrics: [inputs].",
    "kl_coef": "GRPO calls the weight of its KL beta.",
    "logging_dir": _BY_ENV.format("TENSORBOARD_LOGGING_DIR"),
    "kl_kd": "the pid controller looks ahead by kl_kp / kl_ki updates instead: remove it.",
    "max_completion_length": _LENGTHS,
    "max_length": _LENGTHS,
    "max_new_tokens": _LENGTHS,
    "max_prompt_length": "nothing cuts prompts any more: shorten the long ones in the data, or leave them out.",
    "max_seq_length": _LENGTHS,
    "max_target_length": _LENGTHS,
    "overwrite_output_dir": "remove it: nothing that a run finds in output_dir is deleted first.",
    "preprocessing_num_workers": "GRPO tokenizes prompts as they come up: remove it.",
    "ref_model_init_kwargs": "the reference is loaded as the policy is, by model_init_kwargs: remove it.",
    "reference_free": "DPO always has a reference: remove it.",
    "response_length": _LENGTHS,
    "reward_model_path": "GRPO's reward model is reward_model_name_or_path, and DPO has none.",
    "rpo_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, ALPHA].",
    "save_safetensors": "models are always saved as safetensors: remove it.",
    "split_batches": "put it into accelerator_config.",
    "system_prompt": "put it into the data, as the first message of each prompt; dataset_prepare can.",
    "tokenizer_name_or_path": "the tokenizer in the model's folder is used: save another one there.",
    "torch_dtype": "write model_init_kwargs={'dtype': ...}.",  # of a config, which has no field `dtype`
    "use_flash_attention_2": "write attn_implementation: flash_attention_2.",
    "vllm_device": "vLLM shares the GPUs of training (vllm_mode: colocate) or is a server (vllm_mode: server).",
    "vllm_dtype": _ONLY_OF_A_SERVER.format("dtype"),
    "vllm_enable_prefix_caching": _ONLY_OF_A_SERVER.format("enable_prefix_caching"),
    "wandb_entity": _BY_ENV.format("WANDB_ENTITY"),
    "wandb_project": _BY_ENV.format("WANDB_PROJECT"),
    "wandb_run_group": _BY_ENV.format("WANDB_RUN_GROUP"),
}
# A slip of the fingers, and no more: below this, names that mean different things are taken for each other.
_NEAR = 0.88

_Class = TypeVar("_Class", bound=type)


def does_not_exist(name: str, known: Collection[str]) -> str:
    """The sentence about a name that is not among the `known` ones, with what to use instead."""
    begun = [field for field in known if field.startswith(name)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    hint = REMEDIES.get(name) or (f"did you mean {near[0]!r}?" if near else "remove it.")
    return f"the field {name!r} does not exist: {hint}"


def with_new_names(
    given: Mapping[str, Any], known: Collection[str], place: str, renamed: Mapping[str, str] = RENAMED
) -> tuple[dict[str, Any], list[str]]:
    """Put what is given under an old name under its new one, with a warning.

    Args:
        given: values by name; a list stands for the words of a command line.
        known: the names that there are.
        place: where they are given, for the sentences.
        renamed: new names by old ones.

    Returns:
        The values by names that there are or not, and a sentence for each old name that cannot be replaced.
    """
    taken, problems = {}, []
    for name, value in given.items():
        new = renamed.get(name, name)
        if name in known or new not in known:
            taken[name] = value
        elif value is None and new in given:
            continue  # as in what a run writes: all fields, whether they are used or not
        elif given.get(new, taken.get(new)) not in (None, value):
            problems.append(f"{place}, {name} and {new} are the same option, and differ: give what you mean as {new}.")
        elif name == "warmup_ratio" and not _is_share(value):
            problems.append(
                f"{place}, warmup_ratio is gone: give warmup_steps, below 1 a share of the run, else steps."
            )
        else:
            taken[new] = value
            warnings.warn(f"{place}, {name} is taken as {new}, its name here: rename it.", UserWarning, stacklevel=4)
    return taken, problems


def _is_share(value: Any) -> bool:
    """Whether a number is below 1, from where on warmup_steps counts steps."""
    try:
        return float(value[0] if isinstance(value, list) else value) < 1
    except (TypeError, ValueError, IndexError):
        return False


def config_with_old_names(config: _Class) -> _Class:
    """Have a config's class take old names of its fields. One that has none is a TypeError that names the remedy."""
    known = [field.name for field in dataclasses.fields(config) if field.init]
    return _with_arguments(config, known, RENAMED, lambda name: does_not_exist(name, known))


def trainer_with_old_names(config: type) -> Callable[[_Class], _Class]:
    """Have a trainer's class take old names of its arguments; fields of its `config` are refused, with the remedy."""
    fields = [field.name for field in dataclasses.fields(config) if field.init]

    def refusal(name: str) -> str:
        field = RENAMED.get(name, name)
        if field in fields:
            return f"{name} belongs to the config: pass args={config.__name__}({field}=...)."
        return does_not_exist(name, fields).replace("the field", "the argument")

    def decorated(trainer: _Class) -> _Class:
        return _with_arguments(trainer, _arguments(trainer), RENAMED_ARGUMENTS, refusal)

    return decorated


def _with_arguments(
    made: _Class, known: Collection[str], renamed: Mapping[str, str], refusal: Callable[[str], str]
) -> _Class:
    """A class whose keyword arguments may have old names; raises TypeError for those that it does not know."""
    init, place = made.__init__, f"in {made.__name__}"  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **given: Any) -> None:
        taken, problems = with_new_names(given, known, place, renamed)
        problems += [f"{place}, {refusal(name)}" for name in taken if name not in known]
        if problems:
            raise TypeError(problems[0])
        init(self, *positional, **taken)

    made.__init__ = __init__  # type: ignore[misc]
    return made


def _arguments(made: type) -> set[str]:
    """The arguments of a class, and of those that it hands further keywords to."""
    names: set[str] = set()
    for base in made.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        names |= {name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        if parameters and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
            break
    return names - {"self"}
