"""The recipes for real models, which cannot be run here, and what recipes/README.md changes for other models: parsed,
two real steps on tiny models, and dry-run.

What a test replaces of a recipe is in `REPLACED` and `SMALLER`, with the reason; all else is the recipe's own.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from support import real_models
from support.real_models import PUBLISHED, SHAPES, save_dataset, save_shape, save_tiny

from trl_klx import rewards
from trl_klx.run import dpo, grpo, ppo
from trl_klx.run.check.dry_run import make_plan
from trl_klx.run.check.page import memory_sentence
from trl_klx.run.recipe.parse import parse
from trl_klx.trainers.seams import FUSED_LM_HEAD
from trl_klx.trainers.shared.lifecycle import Lifecycle

RECIPES = Path(__file__).parent.parent / "recipes"
LAYOUTS = {"qwen2.5-1.5b-lora": ["one_gpu"], "qwen2.5-7b-qlora": ["one_gpu"], "qwen2.5-7b-full": ["zero3", "zero2"]}
GPU_MEMORY = {"qwen2.5-1.5b-lora": 24, "qwen2.5-7b-qlora": 24, "qwen2.5-7b-full": 80}  # GiB
PATHS = [path for folder in LAYOUTS for path in sorted((RECIPES / folder).glob("*.yaml"))]
MODULES = {"grpo": grpo, "dpo": dpo, "ppo": ppo}
# What a machine with two cores does not have.
REPLACED = {
    "use_cpu": True,  # no GPU, so
    "bf16": False,  # float32,
    "use_vllm": False,  # sampling by transformers,
    "load_in_4bit": False,  # no bitsandbytes, and one process
    "report_to": "none",
}
# What would take too long: sizes of batches and lengths, the length of the run, and how often it looks.
SMALLER = {
    "grpo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": 6},
    "ppo": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "response_length": 6},
    "dpo": {"gradient_accumulation_steps": 2, "kl_probe_steps": 1, "kl_probe_prompts": 4, "kl_probe_max_new_tokens": 4},
}
SHORTER = {
    "grpo": {"max_steps": 2, "eval_steps": 2},
    "ppo": {"total_episodes": 16},
    "dpo": {"max_steps": 2, "eval_steps": 2},
}
# And a reward that varies: a random model never gives a right answer, and equal rewards have no gradient.
EVERY_STEP = {"logging_steps": 1, "save_steps": 2, "warmup_steps": 1, "dtype": "float32"}


def algorithm_of(path: Path) -> str:
    return path.stem.split("_")[0]


def recipes(paths: list[Path] = PATHS) -> list:
    return [pytest.param(path, id="-".join(path.relative_to(RECIPES).with_suffix("").parts)) for path in paths]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Folders with the tiny models and the published shapes, by name on the Hub, and the datasets."""
    folder = tmp_path_factory.mktemp("real")
    data = {name: save_dataset(name, folder / "data" / name) for name in real_models._ROWS}
    return {
        "tiny": {**{name: save_tiny(name, folder / "tiny" / name) for name in SHAPES}, **data},
        "shape": {**{name: save_shape(name, folder / "shape" / name) for name in SHAPES}, **data},
    }


def argv(path: Path, where: dict[str, str], *changes: dict, other: dict | None = None) -> list[str]:
    """The recipe, or `other` of it, with every name on the Hub replaced by a folder here, and these changes."""
    fields = {**yaml.safe_load(path.read_text()), **(other or {})}
    here = {name: where[value] for name, value in fields.items() if isinstance(value, str) and value in where}
    if "dataset_config" in fields:
        here["dataset_config"] = "default"
    merged = {name: value for change in (other or {}, here, *changes) for name, value in change.items()}
    return ["--config", str(path), *(part for name, value in merged.items() for part in (f"--{name}", str(value)))]


_final_number = rewards.final_number


def varying_reward(prompts: list, completions: list, answer: list, **kwargs: object) -> list[float]:
    """The recipe's reward, and a little for an even number of characters."""
    right = _final_number(prompts, completions, answer)
    return [r + 0.5 * (len(c[-1]["content"]) % 2) for r, c in zip(right, completions, strict=True)]


class Other(NamedTuple):
    """A recipe for another model: what the table changes of it, and the memory that it states, in GiB."""

    path: Path
    changes: dict[str, str]
    layout: str
    memory: int


def others() -> list[Other]:
    """The rows of recipes/README.md's table of other models, one for each recipe of its folder."""
    found = []
    for line in (RECIPES / "README.md").read_text().splitlines():
        folder, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if folder.strip("`/") not in LAYOUTS or len(cells) != 6:
            continue
        model, layout, batches, reward, value, memory = cells
        paths = sorted((RECIPES / folder.strip("`/")).glob("*.yaml"), key=lambda path: "gdp".index(path.stem[0]))
        for number, path in enumerate(paths):
            changes = {"model_name_or_path": model}
            if batches != "the same":
                rows, steps = re.findall(r"\d+", batches.split(", ")[number])
                changes |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
            if algorithm_of(path) == "ppo":
                named = {"reward_model_path": reward, "value_model_path": value}
                changes |= {option: name for option, name in named.items() if name != "the same"}
            found.append(Other(path, changes, layout.strip("`"), int(memory.split(", ")[number])))
    return found


def first_runs() -> list[Other]:
    """The rows of docs/first-run.md's table of GPUs that name a recipe for GPUs."""
    found = []
    for line in (RECIPES.parent / "docs" / "first-run.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        recipe = re.search(r"`recipes/(qwen[^`]+)`", cells[1]) if len(cells) == 4 else None
        if recipe:
            changes = dict(re.findall(r"`(\w+): ([^`]+)`", cells[2]))
            layout = "zero3" if "zero3" in cells[1] else "one_gpu"
            found.append(Other(RECIPES / recipe[1], changes, layout, int(cells[3])))
    assert len(found) == 4
    return found


OTHERS = others()


def named(other: Other) -> str:
    return f"{other.path.parent.name}-{other.path.stem}-{other.changes.get('model_name_or_path', 'as it is')}"


def test_there_is_a_recipe_for_each_machine_and_a_row_for_each_other_model() -> None:
    found = {path.relative_to(RECIPES).as_posix() for path in PATHS}
    names = {"grpo": "grpo_exact_both_pid", "dpo": "dpo_exact_loss", "ppo": "ppo_k1_reward_pid"}
    assert found == {
        *(f"{folder}/{name}.yaml" for folder in ("qwen2.5-1.5b-lora", "qwen2.5-7b-full") for name in names.values()),
        "qwen2.5-7b-qlora/grpo_exact_both_pid.yaml",
    }
    assert len(OTHERS) == 3 * 3 + 1 + 3 * 3
    assert {other.changes["model_name_or_path"] for other in OTHERS} < set(SHAPES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "-".join(path.relative_to(RECIPES).parts))
def test_the_machine_and_the_models_are_what_the_header_says(path: Path) -> None:
    text, fields = path.read_text(), yaml.safe_load(path.read_text())
    folder = path.parent.name
    assert fields.get("use_peft", False) is (folder != "qwen2.5-7b-full")
    assert fields.get("load_in_4bit", False) is (folder == "qwen2.5-7b-qlora")
    assert all(f"{layout}.yaml" in text for layout in LAYOUTS[folder])
    assert re.search(rf"GPUs? of {GPU_MEMORY[folder]} GB", text)
    assert "# Outcome: not run." in text
    assert fields["bf16"] is True
    assert fields["gradient_checkpointing"] is True
    by_vllm = {"qwen2.5-1.5b-lora": ["grpo"], "qwen2.5-7b-full": ["grpo", "ppo"]}
    assert ("vllm_mode" in fields) is (algorithm_of(path) in by_vllm.get(folder, []))
    for option in ("model_name_or_path", "reward_model_path", "value_model_path"):
        assert fields.get(option, "") in ("", *SHAPES), option


def each_way() -> list:
    """Every recipe as it is, and each algorithm on a Llama, whose tokenizer has no padding token."""
    llamas = [
        other for other in OTHERS if other.layout == "one_gpu" and "3.2-1B" in other.changes["model_name_or_path"]
    ]
    own = [pytest.param(*param.values, None, id=param.id, marks=param.marks) for param in recipes()]
    params = recipes([other.path for other in llamas])
    return own + [
        pytest.param(*param.values, other.changes, id=f"{param.id}-llama", marks=param.marks)
        for param, other in zip(params, llamas, strict=True)
    ]


@pytest.mark.parametrize(("path", "other"), each_way())
def test_two_steps_on_a_tiny_model(
    path: Path, other: dict | None, places: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real trainer, built by the recipe's own way, samples, trains two steps and writes a checkpoint."""
    algorithm = algorithm_of(path)
    replaced = {name: value for name, value in REPLACED.items() if name != "use_vllm" or algorithm != "dpo"}
    changes = [replaced, SMALLER[algorithm], SHORTER[algorithm], EVERY_STEP, {"output_dir": tmp_path / "run"}]
    weights: list[torch.Tensor] = []
    train = Lifecycle.train

    def watched(self, *args, **kwargs):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        weights.extend(p.detach().clone() for p in parameters)
        result = train(self, *args, **kwargs)
        weights[:] = [(p.detach() - old).abs().max() for p, old in zip(parameters, weights, strict=True)]
        return result

    monkeypatch.setattr(Lifecycle, "train", watched, raising=False)
    monkeypatch.setattr(rewards, "final_number", varying_reward)
    words = argv(path, places["tiny"], *changes, other=other)
    assert MODULES[algorithm].main(words) == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in history) == 2
    logged = {name for entry in history for name in entry}
    assert {"kl/sequence", "kl/coef", "grad_norm"} <= logged or algorithm == "dpo"
    assert any(name.startswith("eval_kl/") for name in logged) or algorithm == "ppo"
    if algorithm == "dpo":
        assert {"kl/data_exact", "kl/loss", "kl/exact", "grad_norm"} <= logged
    assert max(float(change) for change in weights) > 0
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize("path", recipes())
def test_dry_run_finds_no_problem_of_the_recipe(path: Path, places: dict) -> None:
    """All that is left are problems of this machine: no GPU, no vLLM, perhaps no disk; and its header is right."""
    for layout in LAYOUTS[path.parent.name]:
        accelerate = {"accelerate_config": RECIPES / "accelerate" / f"{layout}.yaml"}
        plan = make_plan(algorithm_of(path), argv(path, places["tiny"], accelerate))
        own = [problem for problem in plan.problems if not problem.startswith("on this machine: ")]
        assert own == [] or all("prompts and a rollout takes" in problem for problem in own)
        shape = make_plan(algorithm_of(path), argv(path, places["shape"], accelerate))
        assert shape.memory is not None
        if FUSED_LM_HEAD:  # as the headers were made; older TRLs keep logits
            words = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
            assert memory_sentence(shape.memory) in words, layout
            assert shape.memory.device < GPU_MEMORY[path.parent.name] * 2**30, layout


@pytest.mark.parametrize("path", recipes([path for path in PATHS if "vllm_mode" in path.read_text()]))
def test_vllm_may_be_a_server(path: Path, places: dict) -> None:
    """Then it takes no memory of the training's GPUs."""
    accelerate = {"accelerate_config": RECIPES / "accelerate" / f"{LAYOUTS[path.parent.name][0]}.yaml"}
    plan = make_plan(algorithm_of(path), argv(path, places["tiny"], accelerate, {"vllm_mode": "server"}))
    own = [problem for problem in plan.problems if not problem.startswith("on this machine: ")]
    assert own == [] or all("prompts and a rollout takes" in problem for problem in own)
    assert plan.memory is not None
    assert plan.memory.vllm_share == 0


@pytest.mark.skipif(not FUSED_LM_HEAD, reason="the figures are those of TRL 1.16")
@pytest.mark.parametrize("other", [*OTHERS, *first_runs()], ids=named)
def test_memory_of_a_recipe_for_another_model_is_what_the_tables_say(other: Other, places: dict) -> None:
    accelerate = {"accelerate_config": RECIPES / "accelerate" / f"{other.layout}.yaml"}
    plan = make_plan(algorithm_of(other.path), argv(other.path, places["shape"], accelerate, other=other.changes))
    assert plan.memory is not None
    assert math.ceil(plan.memory.device / 2**30) == other.memory


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str, places: dict) -> None:
    """The parameter counts that the models' cards give come out of the shapes that the headers' estimates rest on."""
    [recipe] = (path for path in PATHS if path.parent.name == "qwen2.5-1.5b-lora" and algorithm_of(path) == "grpo")
    words = argv(recipe, places["shape"], REPLACED, other={"model_name_or_path": name})
    plan = make_plan("grpo", words)
    assert plan.models is not None
    assert plan.models.base.parameters == PUBLISHED[name]
    assert plan.recipe is not None
    assert parse(type(plan.recipe.args), words).whole().run.dataset_prepare
