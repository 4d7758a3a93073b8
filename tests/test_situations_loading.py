"""What models are loaded with: `model_init_kwargs`, in Python and in recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fault_tools import ALGORITHMS, make
from support.tiny import save_tiny

from trl_klx import KLXGRPOConfig
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.recipe.parse import parse


@pytest.mark.situation("torch_dtype in model_init_kwargs", "right")
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_type_of_weights_is_honoured(tmp_path: Path, algorithm: str, value: Any) -> None:
    path = save_tiny(tmp_path / "model")
    made = make(algorithm, tmp_path / "run", model=path, model_init_kwargs={"torch_dtype": value})
    for model in (made.model, made.ref_model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.situation("torch_dtype and dtype in model_init_kwargs, and they differ", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_types_of_weights(tmp_path: Path, algorithm: str) -> None:
    kwargs = {"torch_dtype": "bfloat16", "dtype": torch.float16}
    with pytest.raises(ValueError, match=r"dtype=torch.float16 and torch_dtype='bfloat16', which is the same option"):
        make(algorithm, tmp_path, model=save_tiny(tmp_path / "model"), model_init_kwargs=kwargs)


def parsed(kwargs: dict[str, Any], *more: str) -> Any:
    given = ["--output_dir", "out", "--model_init_kwargs", json.dumps(kwargs), "--use_cpu", "true", "--bf16", "false"]
    return parse(KLXGRPOConfig, [*given, *more]).whole()


@pytest.mark.situation(
    "a recipe's model_init_kwargs says what has a field of its own (dtype, revision, attention)", "right"
)
@pytest.mark.parametrize(
    ("kwargs", "field", "value"),
    [
        ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"dtype": "auto"}, "dtype", "auto"),
        ({"revision": "v2"}, "model_revision", "v2"),
        ({"attn_implementation": "eager"}, "attn_implementation", "eager"),
    ],
    ids=str,
)
def test_a_recipes_loading_arguments_count(kwargs: dict, field: str, value: str) -> None:
    recipe = parsed({**kwargs, "low_cpu_mem_usage": True})
    assert getattr(recipe.model, field) == value
    assert recipe.args.model_init_kwargs == {"low_cpu_mem_usage": True}


@pytest.mark.situation("a recipe's model_init_kwargs and a field of its own differ", "refused")
@pytest.mark.parametrize(("field", "name", "values"), [("dtype", "torch_dtype", ("float16", "bfloat16"))])
def test_a_recipe_that_says_two_things(field: str, name: str, values: tuple[str, str]) -> None:
    with pytest.raises(BadInput, match=f"{field}='{values[0]}' and model_init_kwargs with dtype='{values[1]}' differ"):
        parsed({name: values[1]}, f"--{field}", values[0])
