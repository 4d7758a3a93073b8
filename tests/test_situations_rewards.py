"""Reward functions as users write them: what they take, what they return, what they raise."""

import functools
import importlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from support.fault_tools import ALGORITHMS, make
from support.tiny import save_tiny, tiny_dataset, tiny_tokenizer
from trl.trainer.utils import get_callable_name

from trl_klx import KLXGRPOConfig
from trl_klx.run import grpo, train
from trl_klx.run.sources.data import prepare_rows
from trl_klx.run.sources.users_code import try_reward
from trl_klx.trainers.errors import RunError
from trl_klx.trainers.rewarding import calls as reward_calls
from trl_klx.trainers.rewarding.calls import RewardError, reward_values
from trl_klx.trainers.rewarding.functions import RewardFunctions
from trl_klx.trainers.rewarding.gold import GoldWatch

BUILD_TRAINER = train.build_trainer
SAMPLERS = [name for name in ALGORITHMS if name != "dpo"]
PLAIN = {"kl_estimator": "k3", "kl_placement": "loss", "max_steps": 1}


def made(algorithm: str, folder: Path, reward: Any, **changes: Any) -> Any:
    return make(algorithm, folder, reward=reward, **{**PLAIN, **changes})


@functools.cache
def grpo_trainer() -> Any:
    return made("grpo", Path(tempfile.mkdtemp()), slow_evens)  # starts the event loop that async rewards need


def rewards_of(algorithm: str, reward: Any, rows: int = 8) -> list[float]:
    """What the trainer makes of a reward function's result."""
    prompts, completions, ids = ["1+1="] * rows, [str(row) for row in range(rows)], [[4]] * rows
    if algorithm == "ppo":
        return RewardFunctions([reward], None, None, tiny_tokenizer())(prompts, completions, ids, {}, "cpu")[
            :, 0
        ].tolist()
    trainer = grpo_trainer()
    trainer.reward_funcs, trainer.reward_func_names = [reward], [get_callable_name(reward)]
    return trainer._calculate_rewards([{"prompt": prompt} for prompt in prompts], prompts, completions, ids)[
        :, 0
    ].tolist()


def returning(value: Callable[[int], Any]) -> Callable[..., Any]:
    """A reward function that returns `value` of the number of answers."""

    def odd_reward(completions: list, **_: Any) -> Any:
        return value(len(completions))

    return odd_reward


def evens(rows: int) -> list[float]:
    return [float(row % 2) for row in range(rows)]


async def slow_evens(completions: list, **_: Any) -> list[float]:
    return evens(len(completions))


class Scorer:
    """An instance that is called, and has to be awaited."""

    async def __call__(self, completions: list, **_: Any) -> list[float]:
        return evens(len(completions))


GOOD = {
    "floats": evens,
    "numbers of several kinds": lambda rows: [True if row % 2 else np.float32(0) for row in range(rows)],
    "a tensor": lambda rows: torch.tensor(evens(rows), requires_grad=True),
    "an array": lambda rows: np.array(evens(rows)),
    "booleans": lambda rows: [row % 2 == 1 for row in range(rows)],
    "a tuple": lambda rows: tuple(evens(rows)),
    "a generator": lambda rows: iter(evens(rows)),
    "tensors of one number": lambda rows: list(torch.tensor(evens(rows))),
}


@pytest.mark.situation("a reward returns a tensor, an array, booleans, a tuple or a generator", "right")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("kind", GOOD)
def test_numbers_of_any_kind(algorithm: str, kind: str) -> None:
    assert rewards_of(algorithm, returning(GOOD[kind])) == evens(8)


@pytest.mark.situation("a reward has to be awaited", "right")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize(
    "reward",
    [slow_evens, Scorer(), functools.partial(slow_evens), lambda **given: slow_evens(**given)],
    ids=["function", "instance", "partial", "lambda"],
)
def test_awaited(algorithm: str, reward: Any) -> None:
    assert rewards_of(algorithm, reward) == evens(8)


BAD = {
    "None": (lambda rows: None, "returned None for"),
    "one number": (lambda rows: 1.0, "returned 1.0 for"),
    "a tensor of one number": (lambda rows: torch.tensor(1.0), r"returned tensor\(1\.\) for"),
    "a text": (lambda rows: "1" * rows, "returned '1+' for"),
    "texts": (lambda rows: ["1.0"] * rows, "returned '1.0' for answer 0, which is not a number"),
    "a mapping": (lambda rows: dict(enumerate(evens(rows))), "returned a dict for"),
    "a set": (lambda rows: set(range(rows)), "returned a set for"),
    "too few": (lambda rows: [1.0], "returned 1 rewards for"),
    "too many": (lambda rows: [1.0] * (rows + 1), "returned 9 rewards for 8"),
    "lists": (lambda rows: [[1.0]] * rows, r"returned \[1.0\] for answer 0, which is not a number"),
    "a matrix": (lambda rows: torch.ones(rows, 1), r"returned \[1.0\] for answer 0, which is not a number"),
    "mappings": (lambda rows: [{"score": 1.0}] * rows, "returned {'score': 1.0} for answer 0, which is not a number"),
    "complex numbers": (lambda rows: [1j] * rows, "returned 1j for answer 0"),
    "numbers too large": (lambda rows: [0.0] * (rows - 1) + [10**400], r"returned 10+.* for answer \d, which is no"),
}


@pytest.mark.situation("a reward returns nothing, one number, text, a dict or another number of rewards", "refused")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("kind", BAD)
def test_no_numbers(algorithm: str, kind: str) -> None:
    value, said = BAD[kind]
    with pytest.raises(RewardError, match=f"^the reward function 'odd_reward' ({said}).*: return a list with one"):
        rewards_of(algorithm, returning(value))


def fails(completions: list, **_: Any) -> list[float]:
    raise KeyError("score")


async def fails_later(completions: list, **_: Any) -> list[float]:
    raise KeyError("score")


def leaves(completions: list, **_: Any) -> list[float]:
    raise SystemExit(3)


def wants_messages(completions: list, **_: Any) -> list[float]:
    return [len(completion[0]["content"]) for completion in completions]


RAISES = {
    "fails": (fails, "raised KeyError: 'score'"),
    "fails_later": (fails_later, "raised KeyError: 'score'"),
    "leaves": (leaves, r"raised SystemExit\(3\), which would end the run"),
    "wants_messages": (
        wants_messages,
        "raised (TypeError: string indices|IndexError).*it got are strings, as the prom",
    ),
}


@pytest.mark.situation("a reward raises, leaves the program, or wants messages where there is text", "refused")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("name", RAISES)
def test_the_users_own_exception_is_theirs(algorithm: str, name: str, tmp_path: Path) -> None:
    reward, said = RAISES[name]
    with pytest.raises(RewardError, match=f"^the reward function '{name}' {said}") as stopped:
        made(algorithm, tmp_path, reward).train()
    assert isinstance(stopped.value, RunError)  # exit status 1 of a run, and no traceback of ours
    assert f"{Path(__file__).name}, line {reward.__code__.co_firstlineno + 1}" in str(stopped.value)
    cause = stopped.value.__cause__
    assert cause is not None
    frames = reward_calls.users_frames(cause)
    assert frames is not None and frames.tb_frame.f_code is reward.__code__


@pytest.mark.situation("a reward does not apply to some answers, or is not finite for some", "right")
def test_what_does_not_count() -> None:
    assert reward_values("f", [None, 1, -2.5, math.inf], 4)[1:] == [1.0, -2.5, math.inf]
    assert math.isnan(reward_values("f", [None], 1)[0])
    assert math.isnan(reward_values("f", np.array([np.nan]), 1)[0])


SIGNATURES = {
    "no kwargs": (lambda completions: [1.0] * len(completions), r"has no \*\*kwargs and is called with prompts="),
    "no kwargs for a column": (
        lambda prompts, completions, completion_ids, trainer_state, log_extra, log_metric: [1.0] * len(prompts),
        "is called with answer=",
    ),
    "positions": (lambda prompts, completions, /, **_: [1.0] * len(prompts), "'prompts' by its position only"),
    "singular": (lambda completion, **_: [1.0], r"takes 'completion' and is called with completions="),
    "a column that is not there": (lambda completions, solution, **_: [1.0], "needs a column 'solution'"),
}


@pytest.mark.situation("a reward cannot be called by the names that the trainer passes", "refused")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("kind", SIGNATURES)
def test_signatures(algorithm: str, kind: str, tmp_path: Path) -> None:
    reward, said = SIGNATURES[kind]
    with pytest.raises(ValueError, match=said):
        made(algorithm, tmp_path, reward)


@pytest.mark.situation("the dataset has a column of a name that reward functions get otherwise", "refused")
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_metric"])
def test_columns_of_the_trainers_names(
    algorithm: str, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_dataset().rename_column("answer", column)
    monkeypatch.setattr("support.fault_tools.tiny_dataset", lambda: data)
    with pytest.raises(ValueError, match=f"has a column '{column}', and reward functions get what the trainer makes"):
        made(algorithm, tmp_path, returning(evens))


WEIGHTS = {
    "NaN": ([math.nan], "must be a list of finite numbers"),
    "inf": ([math.inf], "must be a list of finite numbers"),
    "all zero": ([0.0], "leave no reward to learn from"),
    "two of one": ([1.0, 1.0], "has 2 entries and there are 1 rewards"),
    "text": (["one"], "reward_weights="),
    "a number": (1.0, "must be a list of finite numbers"),
    "booleans": ([True], "must be a list of finite numbers"),
    "none": ([], "has 0 entries|no reward to learn from"),
}


@pytest.mark.situation(
    "reward_weights are not finite, all 0, no numbers or of another number than the rewards", "refused"
)
@pytest.mark.parametrize("algorithm", SAMPLERS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(algorithm: str, kind: str, tmp_path: Path) -> None:
    weights, said = WEIGHTS[kind]
    with pytest.raises(ValueError, match=said):
        made(algorithm, tmp_path, returning(evens), reward_weights=weights)


@pytest.mark.situation("reward_weights are negative or leave one reward out", "right")
def test_good_weights(tmp_path: Path) -> None:
    assert KLXGRPOConfig(str(tmp_path), reward_weights=[0, -1.5], use_cpu=True, bf16=False).reward_weights == [0, -1.5]


@pytest.mark.situation("a gold reward returns no numbers", "refused")
@pytest.mark.parametrize("algorithm", SAMPLERS)
def test_gold(algorithm: str, tmp_path: Path) -> None:
    run = made(algorithm, tmp_path, returning(evens), per_device_eval_batch_size=8)
    run.eval_dataset = Dataset.from_dict(tiny_dataset(8)[:])
    run.gold = GoldWatch(run, returning(lambda rows: None))
    with pytest.raises(RewardError, match="returned None for 8 answers"):
        run.evaluate()


# On the command line: found before a model is loaded, by the run and by the dry run

MODULES = {
    "good": "def reward(completions, **_):\n    return [1.0] * len(completions)\n",
    "leaves": "import sys\nsys.exit(3)\n",
    "broken": "def reward(:\n",
    "needs": "import nowhere_to_be_found\n",
    "fails": "raise KeyError('rubric')\n",
    "inside": "from good import reword\n",
    "named": "class Reward:\n    pass\nNUMBER = 1\n",
    "raises": "def reward(completions, **_):\n    return [1 / 0 for _ in completions]\n",
    "chat": "def reward(completions, **_):\n    return [len(c[0]['content']) for c in completions]\n",
    "quits": "def reward(completions, **_):\n    raise SystemExit('no key')\n",
    "nothing": "def reward(completions, **_):\n    print(len(completions))\n",
    "keys": "def reward(completions, **_):\n    return {c: 1.0 for c in completions}\n",
    "text": "def reward(completions, **_):\n    return ['good'] * len(completions)\n",
    "short": "def reward(completions, **_):\n    return [1.0]\n",
    "strict": "def reward(completions):\n    return [1.0] * len(completions)\n",
}
COMMANDS = {
    "leaves.reward": (True, "importing leaves, for reward_funcs='leaves.reward', raised SystemExit(3)"),
    "broken.reward": (True, "importing broken, for reward_funcs='broken.reward', raised SyntaxError"),
    "needs.reward": (True, "raised ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "fails.reward": (True, "importing fails, for reward_funcs='fails.reward', raised KeyError: 'rubric'"),
    "inside.reward": (True, "raised ImportError: cannot import name 'reword'"),
    "named.reward": (False, "cannot be imported (module 'named' has no attribute 'reward')"),
    "named.Reward": (False, "is a class: name a function, or an instance of the class"),
    "named.NUMBER": (False, "is not a function: give module.function or path/to/file.py:function"),
    "goood.reward": (False, "cannot be imported (No module named 'goood')"),
    "good.part.reward": (False, "cannot be imported (No module named 'good.part'"),
    "good..reward": (False, "is not a function: give module.function or path/to/file.py:function"),
    "good.py": (False, "names a file alone: add the function"),
    "./good.py": (False, "names a file alone: add the function"),
    "nowhere.py:reward": (False, "cannot be imported (there is no file nowhere.py)"),
    "good.py:reword": (False, "has no attribute 'reword'"),
    "needs.py:reward": (True, "raised ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "fails.py:reward": (True, "importing fails.py, for reward_funcs='fails.py:reward', raised KeyError: 'rubric'"),
    "good.reward()": (False, "is not a function: give module.function or path/to/file.py:function"),
    "raises.reward": (True, "the reward function 'reward' raised ZeroDivisionError: division by zero"),
    "chat.reward": (True, "raised TypeError: string indices must be integers"),
    "quits.reward": (True, "the reward function 'reward' raised SystemExit('no key')"),
    "nothing.reward": (False, "the reward function 'reward' returned None for 4 answers"),
    "keys.reward": (False, "the reward function 'reward' returned a dict for 4 answers"),
    "text.reward": (False, "the reward function 'reward' returned 'good' for answer 0, which is not a number"),
    "short.reward": (False, "the reward function 'reward' returned 1 rewards for 4 answers"),
    "strict.reward": (False, "the reward function 'reward' has no **kwargs"),
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Writes a recipe, with the modules of the user beside it; ends the test where a model is about to be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    rows = "".join(json.dumps(row) + "\n" for row in tiny_dataset(8))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    save_tiny(tmp_path / "model")

    def write(**changes: Any) -> list[str]:
        fields = {"model_name_or_path": "model", "dataset_name": "./data", "output_dir": "out", "num_generations": 4}
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 8}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**fields, **quiet, **changes}))
        return ["--config", "recipe.yaml"]

    yield write
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.situation("names a reward whose module or name is wrong, or that fails at its first answer", "refused")
@pytest.mark.parametrize("name", COMMANDS)
def test_rewards_of_a_recipe(name: str, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence; then, of what the user's own code raised, its traceback, in which nothing is ours."""
    is_theirs, said = COMMANDS[name]
    argv = command(reward_funcs=[name])
    assert grpo.main(argv) == 2
    error = capsys.readouterr().err
    sentence, *rest = error[error.index("error: ") + 7 :].splitlines()
    assert said in sentence
    assert bool(rest) == is_theirs
    if is_theirs:
        assert rest[0] == "Traceback (most recent call last):" or "SyntaxError" in rest[-1]
        assert not any("trl_klx" in line or "importlib" in line for line in rest)
    sys.modules.pop(name.split(".")[0], None)
    assert grpo.main([*argv, "--dry_run"]) == 1
    assert sentence in capsys.readouterr().out


@pytest.mark.situation("names a gold reward that fails at its first answer", "refused")
def test_gold_reward_of_a_recipe(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    (Path("data") / "test.jsonl").write_text((Path("data") / "train.jsonl").read_text())
    changes = {"reward_funcs": ["good.reward"], "beta": 0.1, "eval_strategy": "steps", "eval_steps": 1}
    assert grpo.main(command(**changes, gold_reward_func="raises.reward")) == 2
    assert "raised ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.situation("weighs two rewards of a recipe by one number", "refused")
def test_weights_of_a_recipe(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(reward_funcs=["good.reward", "trl_klx.rewards.exact_match"], reward_weights=[1.0])
    assert grpo.main(argv) == 2
    assert "reward_weights has 1 entries and there are 2 rewards" in capsys.readouterr().err
    assert grpo.main([*argv, "--dry_run"]) == 1
    assert "reward_weights has 1 entries and there are 2 rewards" in capsys.readouterr().out


PREPARES = {
    "returns_none": ("def prepare(row):\n    pass\n", False, "returns None for the first row of the split 'train'"),
    "returns_text": ("def prepare(row):\n    return row['prompt']\n", False, "returns '0=' for the first row"),
    "returns_a_list": ("def prepare(row):\n    return [row]\n", False, "returns [{'prompt': '0="),
    "drops_the_prompt": ("def prepare(row):\n    return {'answer': '1'}\n", False, "has no column 'prompt'"),
    "empties_it": ("def prepare(row):\n    return {'prompt': None, 'answer': '1'}\n", False, "its prompt is None"),
    "raises_first": ("def prepare(row):\n    return row['question']\n", True, "fails on the first row of the split"),
    "raises_later": (
        "def prepare(row):\n    return row if row['prompt'] == '0=' else row['question']\n",
        True,
        "fails on row 1 of the split 'train': it raised KeyError: 'question'",
    ),
    "none_later": (
        "def prepare(row):\n    return row if row['prompt'] == '0=' else None\n",
        False,
        "returns None for row 1 of the split 'train'",
    ),
    "quits_there": ("import sys\ndef prepare(row):\n    sys.exit(0)\n", True, "raised SystemExit(0)"),
    "mixes": (
        "def prepare(row):\n    return {**row, 'answer': '1' if row['prompt'] == '0=' else [1]}\n",
        False,
        "that do not fit together",
    ),
}


@pytest.mark.situation("prepares rows by a function that returns nothing, raises, or drops what is needed", "refused")
@pytest.mark.parametrize("name", PREPARES)
def test_dataset_prepare(name: str, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    text, is_theirs, said = PREPARES[name]
    Path(f"{name}.py").write_text(text)
    argv = command(reward_funcs=["trl_klx.rewards.exact_match"], dataset_prepare=f"{name}.prepare")
    assert grpo.main(argv) == 2
    error = capsys.readouterr().err
    sentence, *rest = error[error.index("error: ") + 7 :].splitlines()
    assert said in sentence
    assert bool(rest) == is_theirs
    assert not any("trl_klx" in line for line in rest)
    assert grpo.main([*argv, "--dry_run"]) == 1
    assert sentence in capsys.readouterr().out


@pytest.mark.situation("uses a reward that divides by max_steps, compares a group, or reads log functions", "right")
def test_what_a_made_up_call_gives() -> None:
    def careful(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, **_: Any):
        log_extra("answer", answer)
        log_metric("share", trainer_state.global_step / trainer_state.max_steps)
        assert len(prompts) == len(answer) == len(completion_ids) == 4
        return [statistics.stdev(len(text) for text in completions)] * 4

    try_reward(careful, "careful", {"prompt": "1+1=", "answer": "2"}, 4, 10)


@pytest.mark.situation("uses a reward that has to be awaited, or an instance that counts its calls", "right")
def test_what_is_not_tried() -> None:
    class Counter:
        calls = 0

        def __call__(self, **_: Any) -> list[float]:
            self.calls += 1
            return []

    counter = Counter()
    try_reward(counter, "counter", {"prompt": "1"}, 4, 10)
    try_reward(slow_evens, "slow", {"prompt": "1"}, 4, 10)
    assert counter.calls == 0


@pytest.mark.situation("a reward fails in the middle of a run of the command line", "refused")
def test_exit_status_of_a_run(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("late.py").write_text(
        "calls = []\ndef reward(completions, **_):\n    calls.append(1)\n"
        "    return [1.0] * len(completions) if len(calls) < 3 else [1 / 0]\n"
    )
    monkeypatch.setattr(train, "build_trainer", BUILD_TRAINER)
    argv = command(reward_funcs=["late.reward"], per_device_train_batch_size=4, max_steps=3, save_strategy="no")
    assert grpo.main(argv) == 1
    error = capsys.readouterr().err
    sentence, *rest = error[error.index("error: ") + 7 :].splitlines()
    assert sentence.startswith("the reward function 'reward' raised ZeroDivisionError: division by zero (")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ZeroDivisionError: division by zero"
    assert not any("trl_klx" in line for line in rest)


@pytest.mark.situation("edits the function that prepares the rows, and runs again", "right")
def test_an_edited_dataset_prepare_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    tmp_path.joinpath("train.jsonl").write_text('{"prompt": "1+1="}\n')
    seen = []
    for text in ("1=", "2="):
        tmp_path.joinpath("edited_prepare.py").write_text(f"def prepare(row):\n    return {{'prompt': {text!r}}}\n")
        sys.modules.pop("edited_prepare", None)
        importlib.invalidate_caches()
        rows = load_dataset("json", data_files=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
        prepared = prepare_rows(rows, "edited_prepare.prepare")["train"]
        # What a trainer makes of the rows is kept by `datasets`, too.
        seen.append([prepared[0]["prompt"], prepared.map(str_of_prompt)[0]["text"]])
    assert seen == [["1=", "1="], ["2=", "2="]]


def str_of_prompt(row: dict[str, Any]) -> dict[str, str]:
    return {"text": row["prompt"]}
