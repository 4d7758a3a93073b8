import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from trl_klx.tasks import starter
from trl_klx.tasks.answers import Accuracy, preference_pairs, sampled_answers
from trl_klx.tasks.starter import StarterError, StarterReport, accuracy, is_held_out, main, make_problems, make_starter


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starter of two training steps: complete, but unable to sort."""
    folder = tmp_path_factory.mktemp("quick") / "starter"
    with pytest.MonkeyPatch.context() as patch:
        few_prompts(patch)
        make_starter(folder, steps=2, progress=False)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> StarterReport:
    """The starter as a user gets it, with fewer preference pairs."""
    with pytest.MonkeyPatch.context() as patch:
        few_prompts(patch, test=512, train_pairs=128, test_pairs=64)
        return make_starter(tmp_path_factory.mktemp("full") / "starter", progress=False)


@pytest.fixture(autouse=True)
def most_tests_are_about_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not about what is sampled, which takes longest."""
    few_prompts(monkeypatch)


def few_prompts(patch: pytest.MonkeyPatch, *, test: int = 16, train_pairs: int = 4, test_pairs: int = 4) -> None:
    patch.setattr(starter, "TEST_PROMPTS", test)
    patch.setattr(starter, "PAIR_TRAIN_PROMPTS", train_pairs)
    patch.setattr(starter, "PAIR_TEST_PROMPTS", test_pairs)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def rows(folder: str | Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (Path(folder) / f"{split}.jsonl").read_text().splitlines()]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_full_starter_is_imperfect_on_purpose(full: StarterReport, tmp_path: Path) -> None:
    report = full
    assert 0.5 <= report.greedy_accuracy < 0.9
    assert 0.2 <= report.sampled_accuracy <= 0.5
    assert 0.005 < report.sampled_standard_error < 0.03
    assert 300_000 < report.parameters < 400_000

    model = AutoModelForCausalLM.from_pretrained(report.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(report.model_dir)
    assert sum(parameter.numel() for parameter in model.parameters()) == report.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    test = load_dataset(report.data_dir, cache_dir=str(tmp_path / "cache"))["test"]
    assert accuracy(model, tokenizer, list(test), sample=False).mean == pytest.approx(report.greedy_accuracy, abs=0.01)


def test_completions_end_with_the_end_of_text(full: StarterReport) -> None:
    model = AutoModelForCausalLM.from_pretrained(full.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(full.model_dir)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    inputs = tokenizer(["53331=", "201=", "4096="], padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    completions = tokens[:, inputs["input_ids"].shape[1] :]
    assert (completions == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1]


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(quick: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the caller's random state must not matter
    make_starter(tmp_path / "same", steps=2, progress=False)
    make_starter(tmp_path / "other", seed=1, steps=2, progress=False)
    assert weights(tmp_path / "same") == weights(quick)
    assert weights(tmp_path / "other") != weights(quick)
    for split in ("train", "test"):
        texts = {(folder / "data" / f"{split}.jsonl").read_text() for folder in (tmp_path / "same", tmp_path / "other")}
        assert len(texts) == 1


def test_preference_pairs_are_right_and_wrong_answers(full: StarterReport, tmp_path: Path) -> None:
    """Against the task, not against the data: chosen is the sorted prompt, rejected is not."""
    data = load_dataset(full.preferences_dir, cache_dir=str(tmp_path / "cache"))
    assert {split: len(pairs) for split, pairs in data.items()} == {"train": full.train_pairs, "test": full.test_pairs}
    assert full.train_pairs > 64
    assert full.test_pairs > 32
    for split, pairs in data.items():
        assert pairs.column_names == ["prompt", "chosen", "rejected"]
        assert {feature.dtype for feature in pairs.features.values()} == {"string"}
        for pair in pairs:
            assert pair["chosen"] == "".join(sorted(pair["prompt"].removesuffix("=")))
            assert pair["rejected"] != pair["chosen"]
            assert set(pair["rejected"]) <= set("0123456789=")  # no end of text: TRL appends it
            assert is_held_out(pair["prompt"]) == (split == "test")
        assert len(set(pairs["prompt"])) == len(pairs)
        assert set(pairs["prompt"]) <= {row["prompt"] for row in rows(full.data_dir, split)}


def test_preference_pairs_are_the_models_own_samples(full: StarterReport) -> None:
    """The written model, sampled again with the starter's seed, gives the written pairs; with another seed, others."""
    model = AutoModelForCausalLM.from_pretrained(full.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(full.model_dir)
    problems = rows(full.data_dir, "train")[:128]
    state = torch.get_rng_state()
    answers = [sampled_answers(model, tokenizer, problems, seed=seed) for seed in (0, 1)]
    assert preference_pairs(problems, answers[0]) == rows(full.preferences_dir, "train")
    assert preference_pairs(problems, answers[1]) != rows(full.preferences_dir, "train")
    assert torch.equal(torch.get_rng_state(), state)


def test_pairs_follow_the_seed_of_the_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr(starter, "sampled_answers", lambda *args, seed: seeds.append(seed))
    monkeypatch.setattr(starter, "preference_pairs", lambda *args: [])
    report = make_starter(tmp_path / "starter", seed=7, steps=1, progress=False)
    assert seeds == [7, 7]
    assert (report.train_pairs, report.test_pairs) == (0, 0)


def test_unfinished_and_odd_answers_are_in_no_pair() -> None:
    """They would be tokenised as something that the model never sampled."""
    tokenizer = starter._make_tokenizer()
    texts = {
        "1=": ["12345678", "<unk>0<eos>", "<pad>1<eos>", "2<eos>", "3<eos>", "1<eos><pad>", "1<eos>"],
        "2=": ["12345678", "2<eos>", "2<eos>", "<unk><eos>", "2<eos>", "2<eos>", "2<eos>"],  # no wrong one that counts
        "3=": ["33333333", "4<eos>", "<eos>", "333<eos>", "4<eos>", "4<eos>", "4<eos>"],  # no right one
        "4=": ["<eos>", "4<eos>", "4<eos>", "4<eos>", "4<eos>", "4<eos>", "4<eos>"],  # nothing, said on purpose
    }
    problems = [{"prompt": prompt, "answer": prompt[0]} for prompt in texts]
    model = Recites(tokenizer, [text for own in texts.values() for text in own])
    answers = sampled_answers(model, tokenizer, problems, samples_per_problem=7, batch_size=5)
    assert [answer.text for answer in answers[0]] == [None, None, None, "2", "3", "1", "1"]
    assert [answer.reward for answer in answers[0]] == [0, 0, 0, 0, 0, 1, 1]
    model = Recites(tokenizer, ["12345678", "1<eos>"])
    everything = sampled_answers(
        model, tokenizer, problems[:1], reward=lambda completions, **_: [1.0] * len(completions), samples_per_problem=2
    )
    assert [answer.reward for answer in everything[0]] == [0, 1]  # an answer without an end earns nothing at all
    assert preference_pairs(problems, answers) == [
        {"prompt": "1=", "chosen": "1", "rejected": "2"},
        {"prompt": "4=", "chosen": "4", "rejected": ""},
    ]


def test_in_dpo_the_end_follows_the_answer_directly(full: StarterReport, tmp_path: Path) -> None:
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 8}
    trainer = DPOTrainer(
        full.model_dir,
        args=DPOConfig(str(tmp_path / "run"), **settings),
        train_dataset=load_dataset(full.preferences_dir, cache_dir=str(tmp_path / "cache"))["train"],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(full.model_dir)
    answers = [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    pairs = rows(full.preferences_dir, "train")
    assert set(answers[:8]) <= {f"{pair['chosen']}<eos>" for pair in pairs}
    assert set(answers[8:]) <= {f"{pair['rejected']}<eos>" for pair in pairs}


def test_random_state_and_threads_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state()
        make_starter(tmp_path / "starter", steps=1, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_tokenizer_reloads_identically(quick: Path) -> None:
    made = starter._make_tokenizer()
    reloaded = AutoTokenizer.from_pretrained(quick / "model")
    text = "53331=13335<eos>"
    assert reloaded.get_vocab() == made.get_vocab()
    assert reloaded(text).input_ids == made(text).input_ids
    assert len(reloaded(text).input_ids) == 12
    assert reloaded.decode(reloaded(text).input_ids) == text
    assert reloaded.decode(reloaded(text).input_ids, skip_special_tokens=True) == "53331=13335"
    assert reloaded("1x 2").input_ids.count(reloaded.unk_token_id) == 2
    assert reloaded.padding_side == "left"
    assert set(reloaded("1=")) == {"input_ids", "attention_mask"}


def test_only_the_answer_and_the_end_are_in_the_loss() -> None:
    tokenizer = starter._make_tokenizer()
    model = starter._make_model(tokenizer)
    batches = []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
    problems = [{"prompt": "53331=", "answer": "13335"}, {"prompt": "201=", "answer": "012"}]
    starter._train(model, tokenizer, problems, steps=1, progress=False)
    in_loss = {tokenizer.decode(labels[labels != -100]) for labels in batches[0]["labels"]}
    assert in_loss == {"13335<eos>", "012<eos>"}
    texts = {tokenizer.decode(ids[mask == 1]) for ids, mask in zip(*list(batches[0].values())[:2], strict=True)}
    assert texts == {"53331=13335<eos>", "201=012<eos>"}


def test_data_load_as_splits_of_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "TEST_PROMPTS", 512)
    monkeypatch.setattr(starter, "accuracy", lambda *args, **kwargs: Accuracy(0.0, 0.0))
    report = make_starter(tmp_path / "starter", steps=1, progress=False)
    data = load_dataset(report.data_dir, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4096, "test": 512}
    prompts = [*data["train"]["prompt"], *data["test"]["prompt"]]
    assert len(set(prompts)) == 4096 + 512
    for row in [*data["train"], *data["test"]]:
        assert row["prompt"] == row["prompt"].strip()
        assert row["prompt"].endswith("=")
        assert 3 <= len(row["answer"]) <= 6
        assert row["answer"] == "".join(sorted(row["prompt"][:-1]))


def test_held_out_prompts_follow_a_hash_that_never_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "TEST_PROMPTS", 512)
    train, test = make_problems()
    assert all(is_held_out(problem["prompt"]) for problem in test)
    assert not any(is_held_out(problem["prompt"]) for problem in train)
    assert sum(is_held_out(f"{number}=") for number in range(100_000, 110_000)) == pytest.approx(1000, abs=100)
    assert [number for number in range(100, 160) if is_held_out(f"{number}=")] == [
        105,
        113,
        116,
        120,
        144,
        145,
        152,
        154,
        156,
    ]


def test_accuracy_counts_exact_answers_and_its_standard_error() -> None:
    problems = [{"prompt": "1=", "answer": answer} for answer in ("11", "11", "11", "0")]
    result = accuracy(CopyTwice(), starter._make_tokenizer(), problems, sample=False, batch_size=3)
    assert result.mean == 0.75
    assert result.standard_error == pytest.approx(0.25)  # sqrt(0.25) / sqrt(4)


def test_samples_of_a_problem_count_as_one_in_the_standard_error() -> None:
    problems = [{"prompt": "1=", "answer": "11"}, {"prompt": "1=", "answer": "0"}]
    result = accuracy(CopyTwice(), starter._make_tokenizer(), problems, sample=True, samples_per_problem=50)
    assert result.mean == 0.5
    assert result.standard_error == pytest.approx(0.5)  # sqrt(0.5) / sqrt(2), however many samples


def test_sampled_accuracy_depends_on_its_seed_only(quick: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quick / "model").train()
    tokenizer = AutoTokenizer.from_pretrained(quick / "model")
    problems = [{"prompt": "1=", "answer": str(i % 10)} for i in range(40)]

    def measure(seed: int) -> float:
        return accuracy(
            model, tokenizer, problems, sample=True, samples_per_problem=8, max_new_tokens=1, seed=seed
        ).mean

    first = measure(0)
    torch.manual_seed(99)
    assert measure(0) == first
    assert len({measure(seed) for seed in range(4)}) > 1
    assert model.training


def test_more_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples_per_problem is 2: give 1, or more with sample=True"):
        accuracy(CopyTwice(), starter._make_tokenizer(), [], sample=False, samples_per_problem=2)


def test_a_complete_starter_is_kept_unless_forced(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_starter(quick, steps=2, progress=False)
    made = []
    real_make = starter._make
    monkeypatch.setattr(starter, "_make", lambda *args: made.append(args) or real_make(*args))
    assert make_starter(quick, steps=2, progress=False) == first
    assert made == []
    before = weights(quick)
    make_starter(quick, steps=2, force=True, progress=False)
    assert len(made) == 1
    assert weights(quick) == before


def test_other_settings_need_force(tmp_path: Path) -> None:
    folder = tmp_path / "starter"
    make_starter(folder, steps=1, progress=False)
    before = weights(folder)
    with pytest.raises(StarterError, match="holds a starter of other settings"):
        make_starter(folder, seed=1, steps=1, progress=False)
    assert weights(folder) == before
    make_starter(folder, seed=1, steps=1, force=True, progress=False)
    assert weights(folder) != before
    assert json.loads((folder / "starter.json").read_text())["settings"]["seed"] == 1
    assert leftovers(tmp_path) == ["starter"]


@pytest.mark.parametrize("missing", ["model", "data", "preferences"])
def test_a_starter_with_a_missing_part_is_made_anew(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "starter"
    make_starter(folder, steps=1, progress=False)
    (folder / missing).rename(tmp_path / "taken")
    make_starter(folder, steps=1, progress=False)
    assert leftovers(folder) == ["data", "model", "preferences", "starter.json"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("record", [None, "not json", '{"mine": 1}'])
def test_a_folder_that_is_not_a_starter_is_never_replaced(tmp_path: Path, force: bool, record: str | None) -> None:
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "precious.txt").write_text("precious")
    if record is not None:
        (folder / "starter.json").write_text(record)
    with pytest.raises(StarterError, match=r"output_dir .*mine holds data, not from a starter: choose another"):
        make_starter(folder, steps=1, force=force, progress=False)
    assert (folder / "data" / "precious.txt").read_text() == "precious"


def test_a_starter_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "starter"
    make_starter(folder, steps=1, progress=False)
    (folder / "notes.txt").write_text("precious")
    make_starter(folder, steps=1, progress=False)
    with pytest.raises(StarterError, match=r"holds notes\.txt"):
        make_starter(folder, steps=1, force=True, progress=False)
    assert (folder / "notes.txt").read_text() == "precious"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "starter"
    folder.mkdir()
    make_starter(folder, steps=1, progress=False)
    assert leftovers(folder) == ["data", "model", "preferences", "starter.json"]


@pytest.mark.parametrize("interrupted", ["_train", "accuracy"])
def test_an_interrupted_run_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    old = tmp_path / "old"
    make_starter(old, steps=1, progress=False)
    before = weights(old)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starter, interrupted, interrupt)
    for folder in (tmp_path / "new", old):
        with pytest.raises(KeyboardInterrupt):
            make_starter(folder, steps=1, force=True, progress=False)
    assert leftovers(tmp_path) == ["old"]
    assert weights(old) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -3}, "seed is -3: give a whole number from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616: give a whole number from 0"),
        ({"steps": 0}, "steps is 0: give a whole number from 1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(StarterError, match=message):
        make_starter(tmp_path / "starter", **arguments)
    assert leftovers(tmp_path) == []


def test_command_prints_where_things_are_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "_train", lambda *args: None)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "330,240 parameters" in out
    assert "runs/starter/model" in out
    assert "runs/starter/data" in out
    assert "runs/starter/preferences (for DPO: 0 pairs of its own answers to train on, 0 held out)" in out
    assert out.endswith(
        "\n  OMP_NUM_THREADS=1 trl-klx grpo --accelerate_config cpu --config recipes/starter/grpo_exact_both_pid.yaml\n"
    )
    assert main(["--output_dir", "my runs", "--seed", "1", "--force"]) == 0
    assert capsys.readouterr().out.endswith("--model_name_or_path 'my runs/model' --dataset_name 'my runs/data'\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "-3"], "error: seed is -3: give a whole number from 0 to 2**63 - 1.\n"),
        (["--seed", "abc"], "error: argument --seed: invalid int value: 'abc'; see `trl-klx starter --help`.\n"),
        (["--sed", "3"], "error: unrecognized arguments: --sed 3; see `trl-klx starter --help`.\n"),
        (["--output_dir", "file"], "error: output_dir file is a file: choose another --output_dir.\n"),
        (["--output_dir", "file/x"], "error: output_dir file/x: File exists; choose a folder to write to.\n"),
    ],
)
def test_command_refuses_bad_input_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


def test_the_module_imports_neither_trl_nor_torch() -> None:
    code = "import sys, trl_klx.tasks.starter; sys.exit(bool({'trl', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class CopyTwice(torch.nn.Module):
    """Stands in for a model: continues every prompt with `11` and the end of the text."""

    device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        one, end = 4, 1
        return torch.cat([input_ids, torch.tensor([[one, one, end]] * len(input_ids))], dim=1)


class Recites(torch.nn.Module):
    """Stands in for a model: gives the next of its texts for each prompt, padded to one length."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        super().__init__()
        self.rows = [tokenizer(text)["input_ids"] for text in texts]

    def generate(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        batch, self.rows = self.rows[: len(input_ids)], self.rows[len(input_ids) :]
        padded = [row + [0] * (8 - len(row)) for row in batch]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)
