"""What `dataset_name` and `datasets` may name: files, folders whatever they are called, and mixtures, as in TRL."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from trl_klx import KLXGRPOConfig
from trl_klx.run.recipe.arguments import BadInput, RunArguments
from trl_klx.run.recipe.parse import Parsed, parse
from trl_klx.run.sources.data import open_dataset, wanted_splits

ROWS = [{"prompt": f"{number}=", "answer": str(number)} for number in range(10)]
OTHERS = [{"prompt": f"{number}=", "answer": str(number)} for number in range(100, 130)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the rows in every format."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _asks_the_hub)
    lines("rows.jsonl", ROWS)
    lines("others.jsonl", OTHERS)
    Path("rows.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_parquet("rows.parquet")
    Dataset.from_list(ROWS).to_csv("rows.csv")
    return tmp_path


def _asks_the_hub(*_: Any, **__: Any) -> None:
    raise AssertionError("the Hub was asked about a path that exists")


def lines(path: str, rows: list[dict]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(*, streaming: bool = False, seed: int = 0, **fields: Any) -> Any:
    return open_dataset(RunArguments(**fields), streaming=streaming, seed=seed)


@pytest.mark.situation("names a file as dataset_name", "right")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_a_file(suffix: str, streaming: bool, folder: Path) -> None:
    for name in (f"rows.{suffix}", str(folder / f"rows.{suffix}")):
        dataset = opened(dataset_name=name, streaming=streaming)
        assert list(dataset) == ["train"]
        assert [{name: str(value) for name, value in row.items()} for row in dataset["train"]] == ROWS


@pytest.mark.situation("has a folder that is called like a format, or like a dataset on the Hub", "right")
@pytest.mark.parametrize("name", ["json", "csv", "gsm8k"])
def test_a_folder_is_a_folder_whatever_its_name(name: str) -> None:
    lines(f"{name}/train.jsonl", ROWS)
    lines(f"{name}/test.jsonl", OTHERS)
    dataset = opened(dataset_name=name)
    assert list(dataset["train"]) == ROWS
    assert list(dataset["test"]) == OTHERS


@pytest.mark.situation("names what save_to_disk has written", "right")
def test_a_saved_dataset() -> None:
    Dataset.from_list(ROWS).save_to_disk("one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(OTHERS)}).save_to_disk("two")
    assert list(opened(dataset_name="one")["train"]) == ROWS
    assert list(opened(dataset_name="two")["test"]) == OTHERS


@pytest.mark.situation("names a file of an unknown format, or evaluates on a file's test split", "refused")
def test_files_that_cannot_be_used() -> None:
    Path("rows.txt").write_text("1=")
    with pytest.raises(BadInput, match=r"dataset_name='rows.txt' is a file of an unknown format: give .jsonl, .json"):
        opened(dataset_name="rows.txt")
    with pytest.raises(BadInput, match=r"'./none.jsonl' cannot be loaded \(there is no such file\)"):
        opened(dataset_name="./none.jsonl")
    Path("wrong.jsonl").write_text('{"prompt": "1"}\nprompt: 2\n')
    with pytest.raises(BadInput, match=r"wrong.jsonl, line 2 is not JSON"):
        opened(dataset_name="wrong.jsonl")
    args = RunArguments(dataset_name="rows.jsonl")
    with pytest.raises(BadInput, match=r"has train alone: name a folder with train.jsonl and test.jsonl, or set eval_"):
        wanted_splits(opened(dataset_name="rows.jsonl"), args, needs_test=True)


# Mixtures

BOTH: list[dict[str, Any]] = [{"path": "rows.jsonl"}, {"path": "others.jsonl"}]


def parsed(folder: Path, **fields: Any) -> Parsed:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": "run", "use_cpu": True, "bf16": False, **fields}))
    return parse(KLXGRPOConfig, ["--config", str(folder / "recipe.yaml")])


@pytest.mark.trl
@pytest.mark.situation("gives TRL's mixture of datasets", "right")
@pytest.mark.parametrize("shares", [(None, None), (1, 1), (0.25, 0.75), (3, 1)])
def test_a_mixture_is_that_of_trl(folder: Path, shares: tuple) -> None:
    """Oracle: TRL's own function, which is given the files in its own form."""
    datasets = [
        {**entry, "columns": ["prompt"], **({} if share is None else {"fraction": share})}
        for entry, share in zip(BOTH, shares, strict=True)
    ]
    run = parsed(folder, datasets=datasets).whole().run
    plain = [
        DatasetConfig("json", data_files=entry["path"], columns=["prompt"], fraction=share)
        for entry, share in zip(BOTH, shares, strict=True)
    ]
    expected = list(get_dataset(DatasetMixtureConfig(datasets=plain))["train"])
    assert list(open_dataset(run, streaming=False, seed=0)["train"]) == expected
    assert {"prompt": "0="} in expected


@pytest.mark.trl
def test_the_split_of_a_mixture_is_the_seeds(folder: Path) -> None:
    """All processes draw the same rows, and a resumed run those of the run that it continues."""
    run = parsed(folder, datasets=BOTH, test_split_size=0.25).whole().run
    first, again, other = (open_dataset(run, streaming=False, seed=seed) for seed in (1, 1, 2))
    assert (len(first["train"]), len(first["test"])) == (30, 10)
    assert list(first["test"]) == list(again["test"])
    assert list(first["test"]) != list(other["test"])
    every = [row["prompt"] for split in ("train", "test") for row in first[split]]
    assert sorted(every) == sorted(row["prompt"] for row in ROWS + OTHERS)


def test_a_mixture_of_streams_and_folders() -> None:
    lines("more/train.jsonl", OTHERS)
    mixed = opened(datasets=[{"path": "rows.jsonl"}, {"path": "more", "split": "train[:5]"}])
    assert list(mixed["train"]) == ROWS + OTHERS[:5]
    stream = opened(datasets=BOTH, streaming=True)["train"]
    assert not isinstance(stream, Dataset)
    assert list(stream) == ROWS + OTHERS


@pytest.mark.situation("gives a mixture that cannot be one", "refused")
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"datasets": BOTH, "dataset_name": "rows.jsonl"}, "dataset_name='rows.jsonl' and datasets are both given"),
        ({"datasets": [{"id": "rows.jsonl"}]}, "a field of datasets='id' does not exist; choose one of path, name"),
        ({"datasets": [{"split": "train"}]}, "without a path: give a file, a folder or a name on the Hub"),
        ({"datasets": [{**BOTH[0], "fraction": 0.5}, BOTH[1]]}, "give each of the 2 datasets one"),
        ({"datasets": [{**BOTH[0], "fraction": 1}], "streaming": True}, "cannot be streams: set streaming to false"),
        ({"datasets": BOTH, "streaming": True, "test_split_size": 0.1}, "test_split_size=0.1 cannot split a stream"),
        ({"datasets": [BOTH[0], {"path": "./none"}]}, "datasets with path='./none' cannot be loaded (there is no such"),
        ({"datasets": [{"path": "recipe.yaml"}]}, "datasets with path='recipe.yaml' is a file of an unknown format"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mixtures_that_cannot_be_read(folder: Path, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as refused:
        open_dataset(parsed(folder, **fields).whole().run, streaming=False, seed=0)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"datasets": "rows.jsonl"}, "datasets='rows.jsonl' must be a list of mappings"),
        ({"datasets": ["rows.jsonl"]}, "datasets=['rows.jsonl'] must be a list of mappings"),
        ({"datasets": BOTH, "test_split_size": 1.5}, "test_split_size=1.5 must be a number"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_fields_of_a_mixture_have_their_types(folder: Path, fields: dict[str, Any], sentence: str) -> None:
    assert [problem for problem in parsed(folder, **fields).problems if sentence in problem]


def test_what_is_local_is_known() -> None:
    assert RunArguments(datasets=BOTH).data_is_local
    assert not RunArguments(datasets=[*BOTH, {"path": "openai/gsm8k"}]).data_is_local
    assert RunArguments(dataset_name="rows.csv").data_is_local
