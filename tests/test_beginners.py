"""What beginners get wrong, and the sentence that they get: what is wrong and the remedy, before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.tiny import save_tiny

from trl_klx.cli import commands as cli
from trl_klx.run import train

ROW = {"prompt": "1+1=", "answer": "2"}
CHAT = [{"role": "user", "content": "1+1="}]
REWARD = "def f(completions, **kwargs):\n    return "
FILES = {
    "good.py": f"{REWARD}[float(len(text)) for text in completions]\n",
    "words.py": f"{REWARD}['good' for text in completions]\n",
    "nothing.py": f"{REWARD}None\n",
    "one.py": f"{REWARD}[1.0]\n",
    "scalar.py": f"{REWARD}1.0\n",
    "other_name.py": "def my_reward(completions, **kwargs):\n    return [1.0 for text in completions]\n",
    "colon.py": "def f(completions, **kwargs)\n    return [1.0]\n",
    "no_kwargs.py": "def f(completions):\n    return [1.0 for text in completions]\n",
    "column.py": "def f(completions, solution, **kwargs):\n    return [1.0 for text in completions]\n",
    "data.jsonl": [ROW] * 8,
    "pairs.jsonl": [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8,
    "question.jsonl": [{"question": "1+1=", "answer": "2"}] * 8,
    "broken.jsonl": f'{json.dumps(ROW)}\n{{"prompt": "1+1=", "answer": \n',
    "quotes.jsonl": "{'prompt': '1+1=', 'answer': '2'}\n",
    "empty.jsonl": "",
    "rows.txt": "1+1=\n",
    "chat.jsonl": [{**ROW, "prompt": CHAT}] * 8,
    "chat_pairs.jsonl": [
        {"prompt": CHAT, **{name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}}
    ]
    * 8,
    "null.jsonl": [ROW, {**ROW, "prompt": None}],
    "from.jsonl": [{**ROW, "prompt": [{"from": "human", "value": "1+1="}]}] * 8,
    "long.jsonl": [{**ROW, "prompt": "1+" * 500}] * 8,
    "a_file": "",
}
GRPO = {"dataset_name": "data.jsonl", "reward_funcs": "good.py:f", "num_generations": 2, "max_completion_length": 4}
OF = {
    "grpo": {**GRPO, "per_device_train_batch_size": 2},
    "ppo": {"dataset_name": "data.jsonl", "reward_funcs": "good.py:f", "response_length": 4},
    "dpo": {"dataset_name": "pairs.jsonl"},
}
ALL, ONLINE = ("grpo", "ppo", "dpo"), ("grpo", "ppo")
KL_COEF = {"grpo": "beta", "ppo": "kl_coef", "dpo": "kl_coef"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "no_tokenizer")
    for path in (tmp_path / "no_tokenizer").glob("token*"):
        path.unlink()
    for name, content in FILES.items():
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    return tmp_path


def write(algorithm: str, changes: dict, change: Callable[[str], str] = str) -> str:
    machine = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "output_dir": "run"}
    fields = {"model_name_or_path": "model", **machine, **OF[algorithm], **changes}
    text = yaml.safe_dump({name: value for name, value in fields.items() if value is not None})
    Path("recipe.yaml").write_text(change(text))
    return "recipe.yaml"


FIELDS = [
    # the data
    (ONLINE, {"dataset_name": "question.jsonl"}, "(it has question, answer): rename one to it"),
    (("dpo",), {"dataset_name": "data.jsonl"}, "no column 'chosen' (it has prompt, answer): rename one to it"),
    (
        ALL,
        {"dataset_name": "broken.jsonl"},
        "line 2 is not JSON, Expecting value at column 30: mend or remove the line",
    ),
    (ALL, {"dataset_name": "quotes.jsonl"}, "line 1 is not JSON, Expecting property name enclosed in double quotes at"),
    (ALL, {"dataset_name": "empty.jsonl"}, "empty.jsonl is empty: give it at least one row"),
    (ALL, {"dataset_name": "dat.jsonl"}, "(there is no such file): did you mean 'data.jsonl'?"),
    (ALL, {"dataset_name": "nowhere/x.jsonl"}, "(there is no such file); check the spelling."),
    (
        ALL,
        {"dataset_name": "rows.txt"},
        "is a file of an unknown format: give .jsonl, .json, .parquet, .csv, or a folder",
    ),
    (ALL, {"dataset_name": "latin.jsonl"}, "save them as UTF-8"),
    (
        ONLINE,
        {"dataset_name": "null.jsonl"},
        "row 1 (counted from 0) of the split 'train': its prompt is None: give it text",
    ),
    (ONLINE, {"dataset_name": "from.jsonl"}, "messages are dicts of role and content"),
    (ONLINE, {"dataset_name": "chat.jsonl"}, "has no chat template: take an instruct model, or prompts that are plain"),
    (("dpo",), {"dataset_name": "chat_pairs.jsonl"}, "has no chat template: take an instruct model"),
    (ONLINE, {"dataset_name": "long.jsonl"}, "its prompt has 1000 tokens, its answer up to 4"),
    (ALL, {"dataset_train_split": "training"}, "dataset_train_split='training' is not in"),
    # the reward
    (ONLINE, {"reward_funcs": None}, "are both missing: give reward functions"),
    (ONLINE, {"reward_funcs": "good.py"}, "names a file alone: add the function, as in good.py:my_reward"),
    (ONLINE, {"reward_funcs": "godo.py:f"}, "(there is no file godo.py)"),
    (ONLINE, {"reward_funcs": "other_name.py:f"}, "has no attribute 'f'): its functions are my_reward"),
    (ONLINE, {"reward_funcs": "colon.py:f"}, "raised SyntaxError: expected ':' (colon.py, line 1)"),
    (ONLINE, {"reward_funcs": "words.py:f"}, "returned 'good' for answer 0, which is not a number: return a list"),
    (ONLINE, {"reward_funcs": "nothing.py:f"}, "returned None for 2 answers: return a list with one number per answer"),
    (
        ONLINE,
        {"reward_funcs": "one.py:f"},
        "returned 1 rewards for 2 answers: return a list with one number per answer",
    ),
    (ONLINE, {"reward_funcs": "scalar.py:f"}, "returned 1.0 for 2 answers: return a list with one number per answer"),
    (ONLINE, {"reward_funcs": "no_kwargs.py:f"}, "has no **kwargs and is called with"),
    (ONLINE, {"reward_funcs": "column.py:f"}, "needs a column 'solution' and the split 'train' has prompt, answer"),
    (("dpo",), {"reward_funcs": "good.py:f"}, "has no effect in DPO"),
    # the model
    (ALL, {"model_name_or_path": "./modle"}, "model_name_or_path='./modle' is neither a local folder"),
    (ALL, {"model_name_or_path": "no_tokenizer"}, "(none of its files is there): put its files"),
    # numbers and names
    (ALL, {"learning_rate": [1e-4]}, "learning_rate=[0.0001] must be a finite number"),
    (ALL, {"learning_rate": "small"}, "learning_rate='small' must be a finite number"),
    (ALL, {"kl_controller": "pid", "kl_target": -0.1}, "kl_target=-0.1 must be a number, more than 0"),
    (
        ALL,
        {"kl_target": 0.1},
        "kl_target=0.1 has no effect with kl_controller='fixed': remove it, or set kl_controller",
    ),
    (ALL, {"KL_COEF": "high"}, "='high' must be a finite number"),
    (ALL, {"KL_COEF": -1}, "=-1 must be zero or more"),
    (ALL, {"kl_estimator": "K3"}, "kl_estimator='K3' does not exist; did you mean 'k3'?"),
    (ALL, {"kl_controller": "PID"}, "kl_controller='PID' does not exist; did you mean 'pid'?"),
    (ALL, {"optim": "adam"}, "optim='adam' does not exist; did you mean 'adamw_torch'?"),
    (ALL, {"max_steps": "ten"}, "max_steps='ten' must be a whole number"),
    (
        ("grpo",),
        {"per_device_train_batch_size": 3},
        "must be divisible by num_generations (2), and is per_device_train_ba",
    ),
    (ALL, {"report_to": "tensorbord"}, "did you mean 'tensorboard'?"),
    # the machine
    (ALL, {"use_cpu": None, "bf16": None}, "bf16=True, which is TRL's default, needs a GPU"),
    (ALL, {"deepspeed": "ds.json"}, "deepspeed names no file"),
    (ONLINE, {"use_vllm": True}, "use_vllm=True and vLLM is not installed: pip install 'trl_klx[vllm]'"),
    (ALL, {"output_dir": "a_file"}, "output_dir='a_file' cannot be written to"),
    (ALL, {"output_dir": "model"}, "the trained model would overwrite it; give another output_dir"),
]
WRONG = [
    pytest.param(algorithm, changes, sentence, id=f"{algorithm}-{str(changes)[:50]}")
    for algorithms, changes, sentence in FIELDS
    for algorithm in algorithms
]


@pytest.mark.situation("gets a field, a file, a row or a reward wrong", "refused")
@pytest.mark.parametrize(("algorithm", "changes", "sentence"), WRONG)
def test_a_wrong_field(
    folder: Path, algorithm: str, changes: dict, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {KL_COEF[algorithm] if name == "KL_COEF" else name: value for name, value in changes.items()}
    assert cli.main([algorithm, "--config", write(algorithm, named)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    message = error[error.index("error: ") :]
    assert "SyntaxError" in error or message.strip().count("\n") == 0  # the user's own code is quoted
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("max_steps: 1", "\tmax_steps: 1", "(indent by spaces, not tabs)"),
        ("max_steps: 1", "max_steps 1", "(write field: value, with a space after the colon)"),
        ("max_steps: 1", "max_steps:1", "(write field: value, with a space after the colon)"),
        ("max_steps: 1", "max_steps = 1", "(write field: value, with a space after the colon)"),
        ("max_steps: 1", "max_steps: 1,", "max_steps='1,' must be a whole number"),
        ("max_steps: 1", "max_steps: 1\nmax_steps: 2", "'max_steps' is given a second time"),
        ("max_steps: 1", "train: {max_steps: 1}", "the field 'train' does not exist"),
        ("", "", "recipe.yaml must be a YAML mapping of field: value, and is empty"),
    ],
)
def test_wrong_yaml(folder: Path, old: str, new: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("grpo", {}, lambda text: text.replace(old, new) if old else "")
    assert cli.main(["grpo", "--config", path]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0 or "FutureWarning" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gprp"], "the command 'gprp' does not exist: did you mean 'grpo'? use"),
        (["GRPO"], "did you mean 'grpo'?"),
        (["grpo"], "trl-klx grpo needs a recipe, --config RECIPE.yaml"),
        (["grpo", "recipe.yaml"], "'recipe.yaml' on the command line belongs to no field: write --config recipe.yaml."),
        (["grpo", "--config", "."], "--config . is a folder: give the path of a recipe"),
        (["grpo", "--config", "recipe.yml"], "--config recipe.yml does not exist"),
        (["grpo", "--config", "recipe.yaml", "max_steps=3"], "belongs to no field: write --field value"),
        (["grpo", "--config", "recipe.yaml", "--accelerate_config", "zero4"], "is neither a file nor one of cpu"),
        (["ppo", "--config", "recipe.yaml"], "GRPO bounds answers by max_completion_length, PPO by response_length"),
        (["new", "grpo", "--model_name_or_path", "./modle"], "check the spelling, for there is no such folder"),
    ],
)
def test_a_wrong_command(folder: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("grpo", {})
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ALL)
def test_without_the_mistake_a_model_is_loaded(folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise ConnectionAbortedError

    monkeypatch.setattr(train, "build_trainer", reached)
    with pytest.raises(ConnectionAbortedError):
        cli.main([algorithm, "--config", write(algorithm, {})])
