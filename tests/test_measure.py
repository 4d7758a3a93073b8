"""`trl-klx measure` on tiny models: against brute force, invariance, interruption, bad input, several processes."""

import itertools
import json
import math
import shutil
import warnings
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.processes import end_ranks
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_klx.cli.commands import main
from trl_klx.kl import exact_kl
from trl_klx.measure import MeasureError, measure_kl
from trl_klx.measure.passes import measurement as measure_module
from trl_klx.measure.passes.divergence import TokenStatistics
from trl_klx.measure.passes.models import Scorer, Source, resolve
from trl_klx.measure.passes.responses import Response, RowError, encode, load_rows

TESTS = Path(__file__).parent
DIVERGENCES = ("kl_policy_ref", "kl_ref_policy", "js", "tv", "log_ratio")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reference, and checkpoints of which one is the reference itself"""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("reference", 0), ("run/checkpoint-5", 0), ("run/checkpoint-20", 1), ("run/checkpoint-100", 2)):
        save_tiny(folder / name, seed)
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("error", message="left out")


def rows(count: int = 11) -> list[dict]:
    """Uneven lengths, two responses to a prompt, right and wrong in turn."""
    texts = ["abc12", "7", "gh=+3456", "a", "12345678"]
    return [
        {
            "prompt": f"{i // 2}+{i // 2}=" if i % 4 else "12=",
            "response": texts[i % 5],
            "correct": i % 2 == 0,
            "id": f"r{i}",
        }
        for i in range(count)
    ]


def measure(models: Path, folder: Path, data=None, policies=("run/checkpoint-*",), **options) -> Dataset:
    names = [str(models / name) for name in policies]
    return measure_kl(rows() if data is None else data, str(models / "reference"), names, output_dir=folder, **options)


def assert_same(found: Dataset, expected: Dataset, tolerance: float = 2e-6) -> None:
    assert found["policy"] == expected["policy"]
    assert found["id"] == expected["id"]
    for name in ("token_ids", "tokens", "rank_policy", "rank_ref"):
        assert found[name] == expected[name], name
    for name in TokenStatistics._fields:
        for mine, theirs in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance, err_msg=name)


# --- truth ------------------------------------------------------------------------------------------------------------


def plain_logits(path: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def test_every_number_against_a_plain_computation(models: Path, tmp_path: Path) -> None:
    """Each response alone through the whole model, all logits at once."""
    found = measure(models, tmp_path, batch_size=3, chunk_size=4)
    tokenizer = tiny_tokenizer()
    assert found["policy"] == [f"checkpoint-{step}" for step in (5, 20, 100) for _ in range(11)]
    for row in found.select([12, 15, 24, 32]):
        source = rows()[row["response"]]
        prompt, response = tokenizer(source["prompt"])["input_ids"], [*tokenizer(source["response"])["input_ids"], 1]
        assert row["token_ids"] == response
        logits, ref_logits = (
            plain_logits(path, prompt + response)[len(prompt) - 1 : -1]
            for path in (models / "run" / row["policy"], models / "reference")
        )
        chosen = torch.tensor(response).unsqueeze(-1)
        expected = {
            "kl_policy_ref": exact_kl(logits, ref_logits),
            "kl_ref_policy": exact_kl(ref_logits, logits),
            "tv": (logits.softmax(-1) - ref_logits.softmax(-1)).abs().sum(-1) / 2,
            "logp_policy": logits.log_softmax(-1).gather(-1, chosen).squeeze(-1),
            "logp_ref": ref_logits.log_softmax(-1).gather(-1, chosen).squeeze(-1),
            "entropy_ref": torch.distributions.Categorical(logits=ref_logits).entropy(),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-6), name
        assert [top[0] for top in row["top_ids_policy"]] == logits.argmax(-1).tolist()
        assert row["teacher_forced_sum_kl_policy_ref"] == pytest.approx(
            float(expected["kl_policy_ref"].sum()), rel=1e-5
        )


def test_only_the_samplers_kl_is_a_sequence_kl(models: Path, tmp_path: Path) -> None:
    """All sequences of two tokens, weighted by the policy's probability: the expected sum of KL(policy || reference) is
    the sequence KL by enumeration; that of KL(reference || policy) on the same sequences is not its own."""
    vocab = range(23)
    data = [{"prompt": "1=", "response_ids": list(ids)} for ids in itertools.product(vocab, vocab)]
    found = measure(models, tmp_path, data, ["run/checkpoint-20"], sampled_from="checkpoint-20", batch_size=600)
    assert set(found["unbiased_sequence_kl_ref_policy"]) == {None}
    logp, ref_logp = (np.array([sum(values) for values in found[name]]) for name in ("logp_policy", "logp_ref"))
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-5)  # enumeration is complete
    sequence_kl = (np.exp(logp) * (logp - ref_logp)).sum()
    reverse_kl = (np.exp(ref_logp) * (ref_logp - logp)).sum()
    unbiased = (np.exp(logp) * np.array(found["unbiased_sequence_kl_policy_ref"])).sum()
    teacher_forced = (np.exp(logp) * np.array(found["teacher_forced_sum_kl_ref_policy"])).sum()
    assert unbiased == pytest.approx(sequence_kl, rel=1e-5)
    assert abs(teacher_forced - reverse_kl) > 0.005 * reverse_kl


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_equals_itself_exactly(models: Path, tmp_path: Path, dtype: str) -> None:
    found = measure(models, tmp_path, policies=["run/checkpoint-5"], batch_size=4, chunk_size=3, dtype=dtype)
    for name in DIVERGENCES:
        assert {value for values in found[name] for value in values} == {0.0}, name
    assert not any(found["spikes"])


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 5, "chunk_size": 1}, {"batch_size": 100, "chunk_size": 7}], ids=str
)
def test_batches_and_chunks_do_not_change_a_number(models: Path, tmp_path: Path, options: dict) -> None:
    assert_same(measure(models, tmp_path / "a", **options), measure(models, tmp_path / "b", batch_size=3))


def test_the_side_on_which_a_tokenizer_pads_does_not_change_a_number(models: Path, tmp_path: Path) -> None:
    other = shutil.copytree(models, tmp_path / "models")
    assert AutoTokenizer.from_pretrained(models / "reference").padding_side == "left"
    for folder in (other / "reference", *other.glob("run/*")):
        AutoTokenizer.from_pretrained(folder, padding_side="right").save_pretrained(folder)
    assert_same(measure(other, tmp_path / "a"), measure(models, tmp_path / "b"), tolerance=0)


def test_temperature_divides_the_logits_of_both(models: Path, tmp_path: Path) -> None:
    found = measure(models, tmp_path, rows(1), ["run/checkpoint-20"], temperature=2.0)[0]
    ids = tiny_tokenizer()("12=")["input_ids"] + found["token_ids"]
    logits, ref_logits = (plain_logits(models / name, ids)[2:-1] / 2 for name in ("run/checkpoint-20", "reference"))
    assert found["kl_policy_ref"] == pytest.approx(exact_kl(logits, ref_logits).tolist(), rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_architectures_that_transform_their_logits(tmp_path: Path, family: str) -> None:
    from support.tiny import tiny_family

    for name in ("reference", "policy"):
        model = tiny_family(family)
        if name == "policy":
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.3)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    found = measure(tmp_path, tmp_path / "out", rows(1), ["policy"])[0]
    ids = tiny_tokenizer()("12=")["input_ids"] + found["token_ids"]
    logits, ref_logits = (plain_logits(tmp_path / name, ids)[2:-1] for name in ("policy", "reference"))
    assert sum(found["kl_policy_ref"]) > 1e-3
    assert found["kl_policy_ref"] == pytest.approx(exact_kl(logits, ref_logits).tolist(), rel=1e-4, abs=1e-7)


def test_an_adapter_is_its_base_with_the_adapter(models: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "reference", dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    data = rows(4)
    found = [
        measure_kl(data, str(models / "reference"), str(tmp_path / name), output_dir=tmp_path / f"out-{name}")
        for name in ("adapter", "merged")
    ]
    assert sum(found[0]["kl_policy_ref"][0]) > 1e-3
    for name in DIVERGENCES:
        for mine, theirs in zip(found[0][name], found[1][name], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


# --- tokens -----------------------------------------------------------------------------------------------------------


def bpe_tokenizer(*, chat: bool = False):
    """Byte pairs with the merge "++", which may span the boundary of prompt and response."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {char: i for i, char in enumerate("_+ab=<>|")}
    vocab = {**letters, "++": 8, "ab": 9}
    tokenizer = Tokenizer(models.BPE(vocab, [("+", "+"), ("a", "b")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="_", pad_token="_")
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<{{ m['content'] }}{% if not loop.last or m['role'] == 'user' %}>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}|{% endif %}"
        )
    return fast


def row(prompt, response=None, response_ids=None) -> Response:
    return Response(0, "0", "0", None, prompt, response, response_ids)


def test_the_boundary_is_where_the_response_begins() -> None:
    tokenizer = bpe_tokenizer()
    apart = encode(tokenizer, row("a+", "+b"), add_eos=True)
    assert (apart.prompt_ids, apart.response_ids) == ([2, 1], [1, 3, 0])  # not "++", which spans both
    together = encode(tokenizer, row("a=", "ab++"), add_eos=False)
    assert (together.prompt_ids, together.response_ids) == ([2, 4], [9, 8])
    given = encode(tokenizer, row("a=", None, [1, 1]), add_eos=True)
    assert given.response_ids == [1, 1]  # a sampler's own tokens are taken as they are


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = bpe_tokenizer(chat=True)
    prompt = [{"role": "user", "content": "a+"}]
    item = encode(tokenizer, row(prompt, [{"role": "assistant", "content": "+b"}]), add_eos=True)
    assert tokenizer.decode(item.prompt_ids, skip_special_tokens=False).replace(" ", "") == "<a+>|"
    assert item.response_ids == [1, 3, 0]
    assert encode(tokenizer, row(prompt, "+b"), add_eos=True).response_ids == item.response_ids
    begun = [*prompt, {"role": "assistant", "content": "a="}]
    continued = encode(tokenizer, row(begun, "ab"), add_eos=False)
    assert tokenizer.decode(continued.prompt_ids).replace(" ", "").endswith("<a=")


@pytest.mark.parametrize(
    ("prompt", "response", "sentence"),
    [
        ("a", "", "its response is empty"),
        ("a", None, "its response is empty"),
        ("a", [], "its response is not one message"),
        ("a", [{"role": "user", "content": "b"}], "its response is not one message"),
        ("a", [{"role": "assistant", "content": None}], "its response is empty"),
        ("", "b", "its prompt is empty"),
        (None, "b", "it has no prompt"),
        ([{"role": "user", "content": "a"}], "b", "the tokenizer has no chat template"),
    ],
)
def test_rows_that_cannot_be_used_say_why(prompt, response, sentence: str) -> None:
    with pytest.raises(RowError, match=sentence):
        encode(bpe_tokenizer(), row(prompt, response), add_eos=True)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "dataset", "rows", "messages"])
def test_data_in_every_form(tmp_path: Path, kind: str) -> None:
    dataset = Dataset.from_list(rows(4))
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in rows(4)))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
    if kind == "messages":
        given = [
            {
                "messages": [
                    {"role": "user", "content": line["prompt"]},
                    {"role": "assistant", "content": line["response"]},
                ]
            }
            for line in rows(4)
        ]
        found = load_rows(given)
        assert [(row.prompt[0]["content"], row.response[0]["content"]) for row in found] == [
            (line["prompt"], line["response"]) for line in rows(4)
        ]
        assert [row.id for row in found] == list("0123")
        return
    found = load_rows({"dataset": dataset, "rows": rows(4)}.get(kind, str(path)))
    assert [(row.prompt, row.response, row.correct, row.id) for row in found] == [
        (line["prompt"], line["response"], line["correct"], line["id"]) for line in rows(4)
    ]


def test_right_and_wrong_in_every_form() -> None:
    values = [True, False, 1, 0.0, math.nan, None]
    found = [load_rows([{"prompt": "a", "response": "b", "correct": value}])[0].correct for value in values]
    assert found == [True, False, True, False, None, None]


def test_where_keeps_the_wrong_responses_of_one_model() -> None:
    data = [{**line, "model": "dpo" if i < 6 else "rl"} for i, line in enumerate(rows(8))]
    found = load_rows(data, where="model == 'dpo' and not correct")
    assert [row.id for row in found] == ["r1", "r3", "r5"]
    assert [row.index for row in found] == [1, 3, 5]


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        ("missing.jsonl", {}, "there is no such file"),
        ([{"prompt": "a"}], {}, "no column 'response' or 'completion'"),
        ([{"response": "a"}], {}, "no column 'prompt' or 'messages'"),
        (
            [{"prompt": "a", "response": "b", "correct": "false"}],
            {},
            "'correct' of row 0 is 'false': give true or false",
        ),
        (rows(2), {"where": "correkt"}, "cannot be evaluated"),
        (rows(2), {"where": "id == 'x'"}, "keeps none of the 2 rows"),
        (Dataset.from_dict({"prompt": [], "response": []}), {}, "the data have no rows"),
    ],
)
def test_wrong_data_are_refused(data, options: dict, sentence: str) -> None:
    with pytest.raises(MeasureError, match=sentence):
        load_rows(data, **options)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"\n')
    with pytest.raises(MeasureError, match="cannot be loaded"):
        load_rows(path)


# --- models -----------------------------------------------------------------------------------------------------------


def test_patterns_are_in_training_order_and_labels_are_short(models: Path) -> None:
    found = resolve([str(models / "run" / "checkpoint-*"), str(models / "reference") + "/"])
    assert [source.label for source in found] == ["checkpoint-5", "checkpoint-20", "checkpoint-100", "reference"]
    assert [source.label for source in resolve(["a/x/checkpoint-1", "a/y/checkpoint-1"])] == [
        "x/checkpoint-1",
        "y/checkpoint-1",
    ]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [(["nothing-*"], "matches no folder"), (["a", "a/"], "named twice"), ([], "policies is missing")],
)
def test_wrong_policies_are_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(MeasureError, match=sentence):
        resolve(names)


def test_revisions_of_the_hub() -> None:
    assert Source("m", "org/model@step-100").arguments == {
        "pretrained_model_name_or_path": "org/model",
        "revision": "step-100",
    }


def test_an_unknown_transform_of_the_logits_is_noticed() -> None:
    model = tiny_model()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs) | {"logits": 3 * forward(*args, **kwargs).logits}
    with pytest.raises(MeasureError, match="changes its logits in a way"):
        Scorer(model, temperature=1.0, name="tiny")


def test_what_cannot_be_measured_is_left_out_and_the_rest_goes_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other vocabulary, other tokenizer, no such folder, no model in the folder; and rows without a response."""
    save_tiny(tmp_path / "vocabulary", vocab=29)
    save_tiny(tmp_path / "tokenizer")
    other = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / name) for name in ("vocabulary", "tokenizer", "empty", "nowhere")]
    data = tmp_path / "data.jsonl"
    lines = [*rows(3), {"prompt": "1=", "response": "", "correct": True, "id": "blank"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["measure", "--reference", str(models / "reference"), "--data", str(data)]
    command += ["--output_dir", str(tmp_path / "out"), "--policies", *names, str(models / "run" / "checkpoint-20")]
    assert main(command) == 1
    printed = capsys.readouterr()
    for sentence in (
        "has a vocabulary of 29 and the reference of 23",
        "has another tokenizer than the reference (23 and 23 tokens, the first that differs is 'a'",
        "empty' cannot be loaded",
        "nowhere' does not exist",
        "left out 1 of the rows (blank): its response is empty.",
    ):
        assert sentence in printed.err, sentence
    assert "checkpoint-20" in printed.out
    found = measure_kl_quietly(
        lines, str(models / "reference"), str(models / "run" / "checkpoint-20"), tmp_path / "out"
    )
    assert found["id"] == ["r0", "r1", "r2"]


def measure_kl_quietly(data, reference: str, policies, folder: Path) -> Dataset:
    with pytest.warns(UserWarning, match="left out"):
        return measure_kl(data, reference, policies, output_dir=folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"chunk_size": 0}, "chunk_size=0 is too small"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"dtype": "int4"}, "dtype='int4' is not one of"),
        ({"sample": "reference", "sampled_from": "reference"}, "exclude each other"),
        ({"where": "correct", "sampled_from": "reference"}, "rows that a condition keeps are not a sample"),
        (
            {"sampled_from": "nobody"},
            "sampled_from='nobody' is not one of the models: name one of reference, checkpoint-5",
        ),
        ({"max_length": 1}, "none of the 11 rows can be used; of 'r0', it has 9 tokens"),
    ],
)
def test_wrong_options_are_refused(models: Path, tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises(MeasureError, match=sentence):
        measure(models, tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "data is missing"),
        (["--data", "x.jsonl"], "reference is missing"),
        (["--data", "x.jsonl", "--reference", "nowhere", "--policies", "a"], "there is no such file"),
        (["--nonsense", "1"], "'--nonsense' on the command line is not an option"),
        (["--batch_size", "many"], "invalid int value"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", *arguments]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


# --- interruption -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first part of the second policy: what was finished is neither computed again nor changed."""
    seen: list[tuple[int, ...]] = []
    forward, add = Scorer.hidden_states, measure_module.Store.add

    def counted(self, batch):
        seen.append(tuple(item.row.index for item in batch))
        return forward(self, batch)

    def killed(self, source, new):
        add(self, source, new)
        if source.label == "checkpoint-20":
            raise Killed

    monkeypatch.setattr(Scorer, "hidden_states", counted)
    monkeypatch.setattr(measure_module.Store, "add", killed)
    with pytest.raises(Killed):
        measure(models, tmp_path, batch_size=3, pairwise=0)
    assert len(seen) == 4 + 4 + 1  # the reference, checkpoint-5, a batch of checkpoint-20
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*.parquet")}
    assert len(before) == 5
    (tmp_path / "tokens" / "checkpoint-20" / "part-00000099.unfinished").write_bytes(b"half of a par")

    monkeypatch.setattr(measure_module.Store, "add", add)
    first = seen.pop()
    seen.clear()
    found = measure(models, tmp_path, batch_size=3, pairwise=0)
    assert len(seen) == 3 + 4
    assert first not in seen[:3]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_same(found, measure(models, tmp_path / "whole", batch_size=3, pairwise=0), tolerance=0)
    seen.clear()
    measure(models, tmp_path, batch_size=3, pairwise=0)
    assert not seen


def test_a_smaller_batch_goes_on_too(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after running out of memory."""
    add = measure_module.Store.add
    monkeypatch.setattr(measure_module.Store, "add", lambda *args: (add(*args), exec("raise KeyboardInterrupt")))
    with pytest.raises(KeyboardInterrupt):
        measure(models, tmp_path, batch_size=4)
    monkeypatch.setattr(measure_module.Store, "add", add)
    assert_same(measure(models, tmp_path, batch_size=2), measure(models, tmp_path / "whole"))


def test_more_checkpoints_later_run_the_reference_no_more(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(models, tmp_path, policies=["run/checkpoint-20"])
    monkeypatch.setattr(
        measure_module.Store, "save_hidden", lambda _store, name, *_: pytest.fail(name) if name == "reference" else None
    )
    found = measure(models, tmp_path, policies=["run/checkpoint-20", "run/checkpoint-100"], pairwise=0)
    assert len(found) == 22


def test_a_folder_of_another_measurement_is_refused(models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    measure(copy, tmp_path / "out")
    with pytest.raises(MeasureError, match=r"holds a measurement with temperature=1.0, and this one has 2.0"):
        measure(copy, tmp_path / "out", temperature=2.0)
    with pytest.raises(MeasureError, match="holds a measurement with tokens="):
        measure(copy, tmp_path / "out", rows(3))
    save_tiny(copy / "run/checkpoint-20", 7)
    with pytest.raises(MeasureError, match="from before its files changed"):
        measure(copy, tmp_path / "out")


# --- sampled responses ------------------------------------------------------------------------------------------------


def test_sampled_responses_have_an_unbiased_kl(models: Path, tmp_path: Path) -> None:
    """By the model's own samples, the mean sum of its KL and of its log-ratio estimate one number."""
    data = [{"prompt": f"{i}="} for i in range(10)]
    options = {"sample": "checkpoint-20", "num_samples": 40, "max_new_tokens": 6, "pairwise": 0, "batch_size": 64}
    found = measure(models, tmp_path, data, ["run/checkpoint-20"], **options)
    assert len(found) == 400
    assert max(found["num_tokens"]) == 6
    assert all(1 not in ids[:-1] for ids in found["token_ids"])  # nothing after the end of text
    exact, sampled = (np.array(found[name]) for name in ("unbiased_sequence_kl_policy_ref", "sum_log_ratio"))
    error = np.std(sampled - exact) / math.sqrt(len(found))
    assert abs((sampled - exact).mean()) < 3 * error
    assert exact.mean() > 10 * error
    assert set(found["unbiased_sequence_kl_ref_policy"]) == {None}
    by_reference = measure(models, tmp_path / "reference", data, ["run/checkpoint-20"], sample="reference")
    assert by_reference["unbiased_sequence_kl_ref_policy"] == by_reference["teacher_forced_sum_kl_ref_policy"]
    assert set(by_reference["unbiased_sequence_kl_policy_ref"]) == {None}
    again = measure(models, tmp_path / "again", data, ["run/checkpoint-20"], **options)
    assert again["token_ids"] == found["token_ids"]


def test_the_samples_are_those_of_the_models_distribution_whatever_its_generation_config(
    models: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(models / "reference", tmp_path / "reference")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "eos_token_id": 1}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    data = [{"prompt": "1="}]
    ids = [
        measure_kl(
            data, str(path), str(models / "run/checkpoint-20"), sample="reference", num_samples=50, max_new_tokens=3
        )["token_ids"]
        for path in (copy, models / "reference")
    ]
    assert ids[0] == ids[1]
    assert len({tuple(row) for row in ids[0]}) > 10


def test_rows_left_out_make_a_sample_none(models: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="more than max_length"):
        found = measure(models, tmp_path, sampled_from="reference", max_length=10)
    assert set(found["unbiased_sequence_kl_ref_policy"]) == {None}


# --- several processes ------------------------------------------------------------------------------------------------


def two_processes(models: Path, folder: Path, *options: str) -> str:
    """The command in two processes, on the rows, with the reference and all checkpoints; returns their stderr."""
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows()))
    argv = ["measure", "--reference", str(models / "reference"), "--data", str(folder / "data.jsonl")]
    argv += ["--output_dir", str(folder / "two"), *options]
    statuses, errors = end_ranks(folder, 2, main, argv, ACCELERATE_USE_CPU="true")
    assert (folder / "two" / "report.html").is_file(), (statuses, errors)
    return errors


@pytest.mark.processes
def test_two_processes_give_the_numbers_of_one(models: Path, tmp_path: Path) -> None:
    """With a policy that cannot be loaded among the others, which both must leave out."""
    policies = [str(models / "run" / "checkpoint-*"), str(tmp_path / "nowhere")]
    complaints = two_processes(models, tmp_path, "--batch_size", "3", "--policies", *policies)
    assert complaints.count("nowhere' does not exist") == 1
    assert len(list((tmp_path / "two" / "tokens" / "checkpoint-20").glob("*.parquet"))) == 4
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "two" / "tokens").rglob("*.parquet"))
    found = measure(models, tmp_path / "two", str(tmp_path / "data.jsonl"), batch_size=3)
    # Nothing was left for this process to do: the two had shared out all of it.
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "two" / "tokens").rglob("*.parquet"))
    assert_same(found, measure(models, Path(mkdtemp()), batch_size=3))


@pytest.mark.processes
def test_two_processes_sample_what_one_samples(models: Path, tmp_path: Path) -> None:
    options = {"sample": "checkpoint-20", "num_samples": 2, "max_new_tokens": 5}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    two_processes(models, tmp_path, *given, "--policies", str(models / "run" / "checkpoint-20"))
    found = measure(models, tmp_path / "two", policies=["run/checkpoint-20"], **options)
    assert_same(found, measure(models, tmp_path / "one", policies=["run/checkpoint-20"], **options))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_on_disk(models: Path, tmp_path: Path) -> None:
    """Means, sums, right and wrong, pairs: from the tokens, and for pairs from measuring one against the other."""
    import pandas as pd

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in rows()))
    command = ["measure", "--reference", str(models / "reference"), "--policies", str(models / "run" / "checkpoint-*")]
    assert main([*command, "--data", str(data), "--output_dir", str(tmp_path / "out"), "--report", "false"]) == 0
    assert not (tmp_path / "out" / "report.html").exists()
    tables = {path.stem: pd.read_parquet(path) for path in (tmp_path / "out" / "tables").glob("*.parquet")}
    assert set(tables) == {"responses", "checkpoints", "right_wrong", "classes", "positions", "moved", "pairwise"}
    found = measure(models, tmp_path / "out").to_pandas()
    mine = found[found["policy"] == "checkpoint-20"]
    tokens = np.concatenate(mine["kl_policy_ref"].to_list())
    checkpoints = tables["checkpoints"].set_index(["policy", "subset"])
    line = checkpoints.loc["checkpoint-20", "all"]
    assert line["teacher_forced_mean_kl_policy_ref"] == pytest.approx(tokens.mean())
    assert line["teacher_forced_sum_kl_policy_ref"] == pytest.approx(tokens.sum() / 11)
    assert line["kl_policy_ref_p90"] == pytest.approx(np.quantile(tokens, 0.9))
    assert math.isnan(line["unbiased_sequence_kl_policy_ref"])
    wrong = np.concatenate(mine[~mine["correct"].astype(bool)]["kl_policy_ref"].to_list())
    assert checkpoints.loc["checkpoint-20", "wrong"]["teacher_forced_mean_kl_policy_ref"] == pytest.approx(wrong.mean())
    gap = tables["right_wrong"].set_index(["policy", "measure"]).loc["checkpoint-20", "kl_policy_ref"]
    right = np.concatenate(mine[mine["correct"].astype(bool)]["kl_policy_ref"].to_list())
    assert gap["difference"] == pytest.approx(wrong.mean() - right.mean())
    assert gap["low"] < gap["difference"] < gap["high"]
    pairs = tables["pairwise"].set_index(["policy", "other"])["kl"]
    swapped = measure_kl(rows(), str(models / "run/checkpoint-100"), str(models / "run/checkpoint-20"))
    expected = np.concatenate(swapped.to_pandas()["kl_policy_ref"].to_list()).mean()
    assert pairs["checkpoint-20", "checkpoint-100"] == pytest.approx(expected, rel=1e-5)
    expected = np.concatenate(swapped.to_pandas()["kl_ref_policy"].to_list()).mean()
    assert pairs["checkpoint-100", "checkpoint-20"] == pytest.approx(expected, rel=1e-5)
    assert pairs["checkpoint-5", "checkpoint-5"] == 0
    moved = tables["moved"][tables["moved"]["policy"] == "checkpoint-20"]
    assert moved["kl_policy_ref"].tolist() == pytest.approx(sorted(tokens, reverse=True)[: len(moved)])
    first = moved.iloc[0]
    texts = mine[mine["id"] == first["id"]]["tokens"].iloc[0]
    assert first["before"] + first["token"] + first["after"] == "".join(texts)
    classes = tables["classes"][tables["classes"]["policy"] == "checkpoint-20"]
    assert classes["tokens"].sum() == len(tokens)
    assert classes["share_of_kl_policy_ref"].sum() == pytest.approx(1)
    curve = tables["positions"][tables["positions"]["policy"] == "checkpoint-20"].set_index("position")
    assert curve.loc[0, "teacher_forced_mean_kl_policy_ref"] == pytest.approx(
        np.mean([values[0] for values in mine["kl_policy_ref"]])
    )
