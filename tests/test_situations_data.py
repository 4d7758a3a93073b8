"""What users give as recipes and data: documented snippets, mappings, rows that no model can read."""

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, IterableDataset
from support.commands import PAGES, ROOT, fenced
from support.fault_tools import ALGORITHMS, make
from support.tiny import save_tiny, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import preferences
from transformers import GPT2Config

from trl_klx import KLXDPOConfig, KLXGRPOConfig
from trl_klx.run import grpo, train
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.recipe.parse import parse
from trl_klx.trainers.checks.inputs import split_problems
from trl_klx.trainers.checks.lengths import length_problems
from trl_klx.trainers.checks.rows import PAIRS, PROMPTS, PROMPTS_OR_TOKENS

QUIET = {"output_dir": "runs/x", "use_cpu": True, "bf16": False, "report_to": []}
GROUPS = {"beta": 0.1, "kl_controller": "pid", "kl_group_column": "task", "kl_target": 1.0}


def parsed(tmp_path: Path, fields: dict[str, Any], *words: str, config: type = KLXGRPOConfig) -> Any:
    """A recipe with these fields and these words on the command line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**QUIET, **fields}))
    return parse(config, ["--config", str(path), *words]).whole()


# Recipes

SNIPPETS = [(page, text) for page in PAGES for text in fenced(page, "yaml")]


SAME = {"report_to": [], "lora_target_modules": "all-linear"}  # what "none" and a list of this one word become


@pytest.mark.situation("copies a recipe out of the documentation", "right")
@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[p.relative_to(ROOT).as_posix() for p, _ in SNIPPETS])
def test_snippets_of_the_docs_are_recipes(page: Path, text: str, tmp_path: Path) -> None:
    fields = yaml.safe_load(text)
    recipe = parsed(tmp_path, fields)
    for name, value in fields.items():
        given = [getattr(part, name) for part in (recipe.run, recipe.args, recipe.model) if hasattr(part, name)]
        assert given[0] in (value, [value], SAME.get(name, value)), name


@pytest.mark.situation("gives the groups' targets as a mapping in YAML", "right")
def test_targets_by_group_as_a_mapping(tmp_path: Path) -> None:
    args = parsed(tmp_path, {**GROUPS, "kl_group_targets": {"math": 2, "chat": 0.5}}).args
    assert args.kl_group_targets == {"math": 2.0, "chat": 0.5}
    assert args.kl_target_of("chat") == 0.5


MAPPINGS = [
    ("kl_group_targets", {"math": 2.0}),
    ("model_init_kwargs", {"use_cache": False}),
    ("generation_kwargs", {"top_k": 5}),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("lr_scheduler_kwargs", {"num_cycles": 2}),
    ("liger_kernel_config", {"rope": True}),
    ("gradient_checkpointing_kwargs", {"use_reentrant": False}),
]


@pytest.mark.situation("gives an option that is a mapping, in YAML or as JSON", "right")
@pytest.mark.parametrize(("name", "value"), MAPPINGS, ids=[name for name, _ in MAPPINGS])
@pytest.mark.parametrize("on_command_line", [False, True], ids=["yaml", "json"])
def test_mappings(name: str, value: dict, on_command_line: bool, tmp_path: Path) -> None:
    words = [f"--{name}", " " + json.dumps(value)] if on_command_line else []
    args = parsed(tmp_path, GROUPS if words else {**GROUPS, name: value}, *words).args
    assert getattr(args, name) == value


@pytest.mark.situation("gives an option that is a mapping as something else", "refused")
@pytest.mark.parametrize("config", [KLXGRPOConfig, KLXDPOConfig])
@pytest.mark.parametrize("given", ["dtype: float32", "[1]", '{"dtype": ', 3, ["dtype"]])
def test_no_mapping(given: Any, config: type, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model_init_kwargs=.* (is not JSON|must be a mapping)"):
        parsed(tmp_path, {"model_init_kwargs": given}, config=config)


@pytest.mark.situation("gives a mapping for an option that is a plain value", "refused")
@pytest.mark.parametrize("name", ["beta", "dataset_config", "accelerate_config"])
def test_mapping_for_a_plain_value(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{name} must be a plain value, not a mapping"):
        parsed(tmp_path, {name: {"start": 0.1}})


# Rows

KINDS = {"grpo": PROMPTS, "ppo": PROMPTS_OR_TOKENS, "dpo": PAIRS}
CHAT = [{"role": "user", "content": "1+1="}]
ANSWER = [{"role": "assistant", "content": "2"}]
OTHER = [{"role": "assistant", "content": "3"}]


def problems(algorithm: str, rows: list[dict], *, as_stream: bool = False) -> list[str]:
    """What is said about a dataset of these rows."""
    if as_stream:
        return list(split_problems(KINDS[algorithm], "train", IterableDataset.from_generator(lambda: iter(rows))))
    names = {name: None for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    return list(split_problems(KINDS[algorithm], "train", Dataset.from_dict(columns)))


GOOD_ROWS = {
    "text": ("grpo", [{"prompt": "1"}, {"prompt": "2"}]),
    "messages": ("grpo", [{"prompt": CHAT}]),
    "parts": ("grpo", [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]}]),
    "tokens": ("ppo", [{"input_ids": [4, 5]}]),
    "pairs": ("dpo", [{"prompt": "1", "chosen": "2", "rejected": "3"}]),
    "an answer that ends at once": ("dpo", [{"prompt": "1", "chosen": "2", "rejected": ""}]),
    "whole pairs": ("dpo", [{"chosen": "1+1=2", "rejected": "1+1=3"}]),
    "chats": ("dpo", [{"prompt": CHAT, "chosen": ANSWER, "rejected": OTHER}]),
    "whole chats": ("dpo", [{"chosen": CHAT + ANSWER, "rejected": CHAT + OTHER}]),
}


@pytest.mark.situation("gives data in any of the documented forms", "right")
@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("kind", GOOD_ROWS)
def test_good_rows(kind: str, as_stream: bool) -> None:
    assert problems(*GOOD_ROWS[kind], as_stream=as_stream) == []


PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}
BAD_ROWS = {
    "prompt None": ("grpo", [{"prompt": "1"}, {"prompt": None}], "row 1 (counted from 0).*its prompt is None"),
    "prompt number": ("grpo", [{"prompt": 5}], "its prompt is 5, of type int: give it text or messages"),
    "prompt dict": ("ppo", [{"prompt": {"text": "1"}}], "its prompt is {'text': '1'}, of type dict"),
    "prompt list": ("grpo", [{"prompt": ["1", "2"]}], "its prompt holds '?the text|holds '1'"),
    "prompt []": ("grpo", [{"prompt": CHAT}, {"prompt": []}], "row 1 .*its prompt is an empty list"),
    "no content": ("ppo", [{"prompt": [{"role": "user", "content": None}]}], "give it a role and a content"),
    "no role": ("grpo", [{"prompt": [{"content": "1"}]}], "messages are dicts of role and content"),
    "no tokens": ("ppo", [{"input_ids": [4]}, {"input_ids": []}], "row 1 .*its input_ids is \\[\\]"),
    "tokens None": ("ppo", [{"input_ids": [4]}, {"input_ids": None}], "row 1 .*its input_ids is None"),
    "tokens text": ("ppo", [{"input_ids": "45"}], "its input_ids is the text '45'"),
    "tokens fractions": ("ppo", [{"input_ids": [0.5]}], "holds 0.5: tokens are whole numbers"),
    "chosen None": ("dpo", [PAIR, {**PAIR, "chosen": None}], "row 1 .*its chosen is None"),
    "rejected number": ("dpo", [{**PAIR, "rejected": 3}], "its rejected is 3, of type int"),
    "pair prompt None": ("dpo", [PAIR, {**PAIR, "prompt": None}], "row 1 .*its prompt is None"),
    "text and chat": ("dpo", [{"chosen": "1", "rejected": CHAT + ANSWER}], "make both text, or both messages"),
    "chat prompt": ("dpo", [{**PAIR, "prompt": CHAT}], "its prompt is messages, and chosen and rejected are text"),
    "all equal": ("dpo", [{**PAIR, "rejected": "2"}] * 2, "in every row .* chosen and rejected are equal"),
    "both empty": ("dpo", [{**PAIR, "chosen": "", "rejected": ""}], "chosen and rejected are equal"),
    "whole empty": ("dpo", [{"chosen": "", "rejected": "1"}], "no column prompt, and an answer that is empty"),
    "whole chats of two": (
        "dpo",
        [{"chosen": CHAT + ANSWER, "rejected": [{"role": "user", "content": "2"}, *OTHER]}],
        "do not begin with the same message",
    ),
    "one message": ("dpo", [{"chosen": CHAT, "rejected": CHAT + OTHER}], "has one message only"),
    "no prompt": ("grpo", [{"question": "1"}], "has no column 'prompt' \\(it has question\\)"),
    "no rejected": ("dpo", [{"prompt": "1", "chosen": "2"}], "has no column 'rejected'"),
    "no rows": ("dpo", [], "is empty: give it at least one row"),
}


@pytest.mark.situation(
    "gives prompts, tokens or pairs that are None, empty, equal, numbers or of mixed kinds", "refused"
)
@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(kind: str, as_stream: bool) -> None:
    algorithm, rows, said = BAD_ROWS[kind]
    found = problems(algorithm, rows, as_stream=as_stream)
    assert len(found) == 1
    assert re.search(said.replace("(counted from 0)", r"\(counted from 0\)"), found[0]), found
    assert found[0].endswith(".")


@pytest.mark.situation("mixes text and messages in a stream", "refused")
def test_mixed_rows() -> None:
    (found,) = problems("grpo", [{"prompt": "1"}, {"prompt": CHAT}], as_stream=True)
    assert "row 1 (counted from 0) of the split 'train': its prompt is messages, and that of row 0 is the text" in found


@pytest.mark.situation("gives some pairs that are equal", "warned")
def test_some_equal_pairs() -> None:
    with pytest.warns(UserWarning, match=r"in 1 of 2 rows of the split 'train' chosen and rejected are equal .* row 1"):
        assert problems("dpo", [PAIR, {**PAIR, "rejected": "2"}]) == []


# Lengths: the tiny model reads 64 tokens, one a character


def lengths(algorithm: str, rows: list[dict], model_config: Any = None, **settings: Any) -> list[str]:
    args = {
        "max_completion_length": 8,
        "response_length": 8,
        "max_length": None,
        "kl_probe_steps": None,
        "truncation_mode": "keep_start",
        **settings,
    }
    data = Dataset.from_list(rows)
    found = length_problems(
        KINDS[algorithm], SimpleNamespace(**args), "train", data, tiny_tokenizer(), model_config or tiny_model().config
    )
    return list(found)


@pytest.mark.situation("gives prompts as long as the model reads, and pairs that max_length cuts", "right")
def test_what_just_fits() -> None:
    assert lengths("grpo", [{"prompt": "1"}, {"prompt": "1" * 63}]) == []
    assert lengths("ppo", [{"prompt": "ä" * 60}]) == []  # two bytes each, one token
    assert lengths("dpo", [{"prompt": "1" * 60, "chosen": "2" * 4, "rejected": "3"}]) == []
    assert lengths("dpo", [{**PAIR, "chosen": "2" * 99}], max_length=64) == []
    assert lengths("dpo", [{**PAIR, "prompt": ""}]) == []  # nothing is sampled


@pytest.mark.situation("gives prompts that are empty, or rows longer than the model reads", "refused")
def test_too_long_or_empty() -> None:
    (found,) = lengths("grpo", [{"prompt": "1"}, {"prompt": "1" * 64}])
    assert "row 1 (counted from 0) of the split 'train': its prompt has 64 tokens" in found
    assert "the model reads 64 (max_position_embeddings)" in found
    learnt = GPT2Config(n_positions=64, vocab_size=23, n_embd=8, n_layer=1, n_head=1)
    assert "its answer up to 8 (response_length)" in lengths("ppo", [{"prompt": "1" * 57}], learnt)[0]
    assert lengths("ppo", [{"prompt": "1" * 56}], learnt) == []
    assert "set max_length to 64 or less" in lengths("dpo", [{**PAIR, "chosen": "2" * 64}])[0]
    assert "set max_length to 64 or less" in lengths("dpo", [{**PAIR, "chosen": "2" * 64}], max_length=100)[0]
    assert "every prompt alone fills max_length=2" in lengths("dpo", [{**PAIR, "prompt": "12"}] * 2, max_length=2)[0]
    assert lengths("dpo", [{**PAIR, "prompt": "12"}, PAIR], max_length=2) == []
    for algorithm, settings in (("grpo", {}), ("ppo", {}), ("dpo", {"kl_probe_steps": 1})):
        (found,) = lengths(algorithm, [{**PAIR, "prompt": "1"}, {**PAIR, "prompt": ""}], **settings)
        assert "row 1 (counted from 0) of the split 'train': its prompt is empty" in found


@pytest.mark.situation("gives conversations that the chat template refuses, or without a template", "refused")
def test_templates() -> None:
    assert "has no chat template" in lengths("grpo", [{"prompt": CHAT}])[0]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    args = SimpleNamespace(max_completion_length=8)
    data = Dataset.from_list([{"prompt": CHAT}])
    (found,) = length_problems(PROMPTS, args, "train", data, tokenizer, tiny_model().config)
    assert "the tokenizer cannot read it (TemplateError: roles must alternate)" in found


# Python


@pytest.mark.situation("passes such data to a trainer in Python", "refused")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_trainers_refuse_it(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tiny_dataset() if algorithm != "dpo" else preferences()
    column = "prompt" if algorithm != "dpo" else "chosen"
    for value, said in ((None, "row 15 .*is None"), ("1" * 99, "row 15 .*(99|10[0-9]) tokens")):
        rows = Dataset.from_list([*good.select(range(15)), {**good[15], column: value}])
        for name in ("tiny_dataset", "preferences"):
            monkeypatch.setattr(f"support.fault_tools.{name}", lambda *_, rows=rows: rows)
        with pytest.raises(ValueError, match=said):
            make(algorithm, tmp_path)


@pytest.mark.situation("gives pairs whose prompts alone fill max_length", "refused")
def test_no_pair_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 of 16 pairs are left out, because their prompts alone fill max_length=2"):
        make("dpo", tmp_path, max_length=2)


@pytest.mark.situation("gives some pairs whose prompts alone fill max_length", "warned")
def test_some_pairs_are_left_out(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"\d+ of 16 pairs are left out, because their prompts alone fill max_length=4"
    ):
        make("dpo", tmp_path, max_length=4)


# Files, on the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


GOOD_LINE = '{"prompt": "1+1=", "answer": "2"}\n'
FILES = {
    "malformed": ({"train.jsonl": GOOD_LINE + '{"prompt": "1+\n'}, "train.jsonl, line 2 is not JSON"),
    "a list": ({"train.jsonl": GOOD_LINE + "[1, 2]\n"}, "train.jsonl, line 2 is a list and no object"),
    "mixed": (
        {"train.jsonl": GOOD_LINE + '{"prompt": 5, "answer": "2"}\n'},
        "line 2: prompt is a number, and text in |split 'train': its prompt is 5, of type int",
    ),
    "empty": ({"train.jsonl": ""}, "train.jsonl is empty"),
    "header": ({"train.csv": "prompt,answer\n"}, "is empty: give it at least one row"),
    "None": ({"train.jsonl": GOOD_LINE + '{"prompt": null, "answer": "2"}\n'}, "row 1 (counted from 0)"),
    "binary": ({"train.jsonl": b"\xff\xfe\x00\x01"}, "cannot be read"),
    "numbers": ({"train.jsonl": '{"prompt": "1+1=", "answer": 2}\n'}, "store the answers as strings"),
    "a split lacks a column": (
        {"train.jsonl": GOOD_LINE, "test.jsonl": '{"prompt": "1+1="}\n'},
        "'exact_match' needs a column 'answer', which is None in every row of the split 'test'",
    ),
    "another column": (
        {"a.jsonl": GOOD_LINE, "b.jsonl": '{"prompt": "1", "answer": "2", "label": "3"}\n'},
        "b.jsonl, line 1 has the column 'label', which the files before it lack",
    ),
    "pictures": ({"train.jsonl": '{"prompt": "1", "answer": "2", "image": "3"}\n'}, "the model reads no pictures"),
    "trainers' names": (
        {"train.jsonl": '{"prompt": "1", "answer": "2", "completions": "3"}\n'},
        "has a column 'completions'",
    ),
    "too long": ({"train.jsonl": json.dumps({"prompt": "1" * 99, "answer": "2"}) + "\n"}, "its prompt has 99 tokens"),
}


@pytest.mark.situation("gives a file that is empty, malformed, mixed, or holds what cannot be used", "refused")
@pytest.mark.parametrize("kind", FILES)
def test_files(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run and a dry run say the same, in one sentence, before a model is loaded."""
    files, said = FILES[kind]
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fields = {
        "model_name_or_path": model,
        "dataset_name": str(tmp_path / "data"),
        "reward_funcs": ["trl_klx.rewards.exact_match"],
        "num_generations": 4,
        "max_completion_length": 8,
        "eval_strategy": "steps" if "test.jsonl" in files else "no",
        "eval_steps": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**QUIET, **fields}))
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    assert grpo.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    sentence = error[error.index("error: ") + 7 :].splitlines()[0]
    assert re.search(re.escape(said).replace(r"\|", "|"), sentence), sentence
    assert grpo.main(["--config", str(path), "--dry_run"]) == 1
    printed = capsys.readouterr().out
    assert sentence in printed
    assert str(Path(tempfile.gettempdir(), "tmp")) not in printed


@pytest.mark.situation("asks for a dry run of a recipe that does not even parse", "refused")
@pytest.mark.parametrize(
    "fields", [{"beta": {"start": 1}}, {"model_init_kwargs": "{"}, {"kl_estimator": "k9", "beta": {"start": 1}}]
)
def test_a_dry_run_shows_no_file_of_its_own(
    fields: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run says first, a dry run says too, of the file that was given."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump({**QUIET, **fields}))
    assert grpo.main(["--config", "recipe.yaml"]) == 2
    error = capsys.readouterr().err
    sentence = error[error.index("error: ") + 7 :].splitlines()[0]
    assert grpo.main(["--config", "recipe.yaml", "--dry_run"]) == 1
    printed = capsys.readouterr().out
    assert sentence.removeprefix("in recipe.yaml, ") in printed
    assert "/tmp" not in printed.replace(str(tmp_path), "")
