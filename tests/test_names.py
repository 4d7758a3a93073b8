"""Names that fields had elsewhere are taken with a warning, or refused with what to do instead."""

import re
import warnings
from inspect import signature
from pathlib import Path

import pytest
import yaml

from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig, KLXPPOTrainer
from trl_klx.config.names import REMEDIES, RENAMED, RENAMED_ARGUMENTS, does_not_exist, trainer_with_old_names
from trl_klx.run.recipe.parse import Parsed, known_fields, parse

CONFIGS = (KLXGRPOConfig, KLXPPOConfig, KLXDPOConfig)
KNOWN = {config: known_fields(config) for config in CONFIGS}
ON_CPU = {"use_cpu": True, "bf16": False}
# Words of remedies that are values, or fields of something else.
OTHER_WORDS = {"dataset_prepare", "sigmoid", "group_by_length", "flash_attention_2", "enable_prefix_caching"}


def parsed(config: type, tmp_path: Path, fields: dict[str, object], *words: str) -> Parsed:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path), **fields}))
    return parse(config, ["--config", str(file), *words])


@pytest.mark.trl
@pytest.mark.parametrize("table", [RENAMED, REMEDIES])
def test_every_row_is_about_a_name_that_an_algorithm_lacks(table: dict[str, str]) -> None:
    """On every tested version of TRL: a row about a field that exists would never be read, or be wrong."""
    assert [name for name in table if all(name in known for known in KNOWN.values())] == []


@pytest.mark.trl
def test_what_the_tables_recommend_exists() -> None:
    everywhere = set().union(*KNOWN.values())
    assert set(RENAMED.values()) <= everywhere
    words = {word for remedy in REMEDIES.values() for word in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", remedy)}
    assert words - OTHER_WORDS <= everywhere
    assert set(RENAMED_ARGUMENTS.values()) <= set(signature(KLXPPOTrainer).parameters)


OLD = [
    ({"torch_dtype": "bfloat16"}, "model.dtype", "bfloat16"),
    ({"warmup_ratio": 0.1}, "args.warmup_steps", 0.1),
    ({"evaluation_strategy": "epoch"}, "args.eval_strategy", "epoch"),
    ({"vllm_max_model_len": 512}, "args.vllm_max_model_length", 512),
    ({"vllm_guided_decoding_regex": "[0-9]+"}, "args.vllm_structured_outputs_regex", "[0-9]+"),
    ({"hub_model_revision": "v2"}, "args.hub_revision", "v2"),
    ({"no_cuda": True}, "args.use_cpu", True),
]


def value_of(result: Parsed, where: str) -> object:
    part, name = where.split(".")
    return getattr(getattr(result.whole(), part), name)


@pytest.mark.parametrize(("fields", "where", "value"), OLD, ids=lambda row: str(row)[:30])
def test_a_synonym_is_taken_with_a_warning(
    tmp_path: Path, fields: dict[str, object], where: str, value: object
) -> None:
    [(old, given)] = fields.items()
    others = {"bf16": False} if old == "no_cuda" else ON_CPU
    with pytest.warns(UserWarning, match=rf"old\.yaml, {old} is taken as {where.split('.')[1]}"):
        assert value_of(parsed(KLXGRPOConfig, tmp_path, {**others, **fields}), where) == value
    words = [f"--{old}"] if given is True else [f"--{old}", str(given)]
    with pytest.warns(UserWarning, match=f"on the command line, {old} is taken as"):
        of_words = parsed(KLXGRPOConfig, tmp_path, dict(others), *words)
    assert value_of(of_words, where) == value


def test_the_command_line_wins_under_either_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="torch_dtype"):
        result = parsed(KLXGRPOConfig, tmp_path, {**ON_CPU, "torch_dtype": "bfloat16"}, "--dtype", "float32")
    assert result.whole().model.dtype == "float32"


REFUSED = [
    (KLXGRPOConfig, {"max_prompt_length": 512}, "shorten the long ones in the data"),
    (KLXGRPOConfig, {"vllm_device": "auto"}, "vllm_mode: colocate"),
    (KLXGRPOConfig, {"kl_coef": 0.1}, "GRPO calls the weight of its KL beta."),
    (KLXGRPOConfig, {"preprocessing_num_workers": 4}, "GRPO tokenizes prompts as they come up"),
    (KLXPPOConfig, {"beta": 0.1}, "PPO calls the weight of its KL kl_coef."),
    (KLXDPOConfig, {"rpo_alpha": 1.0}, "loss_type: [sigmoid, sft]"),
    (KLXDPOConfig, {"overwrite_output_dir": True}, "remove it: nothing that a run finds"),
    (KLXDPOConfig, {"wandb_project": "x"}, "the environment variable WANDB_PROJECT"),
    (KLXDPOConfig, {"warmup_ratio": 1.0}, "below 1 a share of the run"),
    (KLXDPOConfig, {"evaluation_strategy": "no", "eval_strategy": "steps"}, "give what you mean as eval_strategy."),
    (KLXDPOConfig, {"use_liger": True, "use_liger_loss": False}, "give what you mean as use_liger_kernel."),
    (KLXDPOConfig, {"kl_estimater": "exact"}, "did you mean 'kl_estimator'?"),
]


@pytest.mark.filterwarnings("ignore:.*is taken as")
@pytest.mark.parametrize(("config", "fields", "sentence"), REFUSED, ids=lambda row: str(row)[:40])
def test_what_is_gone_is_refused_with_its_remedy(
    tmp_path: Path, config: type, fields: dict[str, object], sentence: str
) -> None:
    """In a recipe, on the command line and in Python."""
    assert sentence in " ".join(parsed(config, tmp_path, {**ON_CPU, **fields}).problems)
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    assert sentence in " ".join(parsed(config, tmp_path, dict(ON_CPU), *words).problems)
    with pytest.raises(TypeError, match=re.escape(sentence)):
        config(output_dir=str(tmp_path), **ON_CPU, **fields)


@pytest.mark.trl
def test_a_config_in_python_takes_synonyms(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="in KLXDPOConfig, preprocessing_num_workers is taken as dataset_num_proc"):
        args = KLXDPOConfig(output_dir=str(tmp_path), **ON_CPU, preprocessing_num_workers=2)  # type: ignore[call-arg, arg-type]
    assert args.dataset_num_proc == 2


@pytest.mark.trl
@pytest.mark.parametrize(
    ("trainer", "given", "sentence"),
    [
        (KLXDPOTrainer, {"beta": 0.1}, "beta belongs to the config: pass args=KLXDPOConfig(beta=...)."),
        (KLXDPOTrainer, {"max_length": 1}, "pass args=KLXDPOConfig(max_length=...)."),
        (KLXGRPOTrainer, {"use_liger": True}, "pass args=KLXGRPOConfig(use_liger_kernel=...)."),
        (KLXDPOTrainer, {"max_prompt_length": 1}, "the argument 'max_prompt_length' does not exist: nothing cuts"),
        (KLXGRPOTrainer, {"nonsense": 1}, "the argument 'nonsense' does not exist: remove it."),
        (KLXPPOTrainer, {"kl_coef": 0.1}, "pass args=KLXPPOConfig(kl_coef=...)."),
        (KLXPPOTrainer, {"tokenizer": 1, "processing_class": 2}, "give what you mean as processing_class."),
    ],
    ids=str,
)
def test_a_trainer_refuses_what_belongs_elsewhere(trainer: type, given: dict[str, object], sentence: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"in {trainer.__name__}, ")) as refused:
        trainer("nowhere", **given)
    assert sentence in str(refused.value)


@pytest.mark.trl
def test_a_trainer_takes_old_names_of_its_arguments() -> None:
    received = {}

    class Base:
        def __init__(self, model: object, processing_class: object = None) -> None:
            received["processing_class"] = processing_class

    @trainer_with_old_names(KLXDPOConfig)
    class Trainer(Base):
        def __init__(self, *positional: object, **given: object) -> None:
            super().__init__(*positional, **given)  # type: ignore[arg-type]

    with pytest.warns(UserWarning, match="in Trainer, tokenizer is taken as processing_class"):
        Trainer("m", tokenizer="t")
    assert received == {"processing_class": "t"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer("m", processing_class="p")
    assert received == {"processing_class": "p"}


@pytest.mark.parametrize(
    ("config", "name", "harmful"),
    [
        (KLXGRPOConfig, "torch_dtype_", "torch_compile"),
        (KLXGRPOConfig, "max_prompt_len", "max_completion_length"),
        (KLXDPOConfig, "rpo_beta", "lora_alpha"),
        (KLXGRPOConfig, "kl_coefficient", "kl_coef_min"),
        (KLXGRPOConfig, "hub_revisions_of_model", "model_revision"),
        (KLXPPOConfig, "top_q", "top_p"),
    ],
)
def test_a_name_that_is_not_near_is_not_suggested(config: type, name: str, harmful: str) -> None:
    assert "did you mean" not in does_not_exist(name, KNOWN[config]), harmful


@pytest.mark.parametrize("name", ["learning_rates", "lr_schedular_type", "num_generation", "eval_step", "max_st"])
def test_a_slip_of_the_fingers_is_understood(name: str) -> None:
    assert "did you mean" in does_not_exist(name, KNOWN[KLXGRPOConfig])


@pytest.mark.parametrize("policy", [{}, {"model_name_or_path": "runs/sft"}])
def test_the_policy_of_a_ppo_recipe_may_be_its_sft_model(tmp_path: Path, policy: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="sft_model_path is taken as model_name_or_path"):
        result = parsed(KLXPPOConfig, tmp_path, {**ON_CPU, **policy, "sft_model_path": "runs/sft"})
    assert result.whole().model.model_name_or_path == "runs/sft"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what a run writes has both
        both = parsed(KLXPPOConfig, tmp_path, {**ON_CPU, "model_name_or_path": "runs/sft", "sft_model_path": None})
    assert both.whole().model.model_name_or_path == "runs/sft"
    other = {"model_name_or_path": "runs/base", "sft_model_path": "runs/sft"}
    (problem,) = parsed(KLXPPOConfig, tmp_path, {**ON_CPU, **other}).problems
    assert "give what you mean as model_name_or_path" in problem
    assert KLXPPOConfig(output_dir=str(tmp_path), **ON_CPU, sft_model_path="x").sft_model_path == "x"  # type: ignore
