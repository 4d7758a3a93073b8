"""What users of PPO ran into: padded prompts, tokenizers of other sizes, answers without a reward, several ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.ppo_tools import ANSWERS, classifier, first_rollout, given_answers, trainer, weights
from support.tiny import tiny_dataset, tiny_model, tiny_tokenizer
from test_ppo_rewards import reversed_tokenizer
from test_situations_vocabulary import bert, with_added_padding
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_klx.trainers.errors import RunError
from trl_klx.trainers.ppo.model import value_model_like
from trl_klx.trainers.ppo.prompts import PromptReader
from trl_klx.trainers.rewarding.models import model_rewards
from trl_klx.trainers.shared.generation import end_tokens

pytestmark = pytest.mark.trl

END, TURN = 1, 7  # the tokenizer's end token, and one more of the model's


def chat_model() -> Any:
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[TURN, END], pad_token_id=0)
    return model


@pytest.mark.parametrize(
    ("own", "ends"), [(None, [1]), (1, [1]), (7, [1, 7]), ([9, 7], [1, 7, 9]), ([7, 1], [1, 7])], ids=str
)
def test_the_ends_of_a_policy(own: Any, ends: list[int]) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = own
    assert end_tokens(model, tiny_tokenizer()) == ends


@pytest.mark.situation("PPO: generation_config has several end tokens", "right")
def test_an_answer_ends_at_any_of_the_models_end_tokens(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 16, "response_length": 24}
    made = trainer(tmp_path, model=chat_model(), given=False, **sizes)
    rollout = first_rollout(made)
    lengths = rollout.mask.sum(1).tolist()
    answers = [row[: int(n)] for row, n in zip(rollout.input_ids[:, -rollout.length :].tolist(), lengths, strict=True)]
    assert all(not {END, TURN} & set(ids[:-1]) for ids in answers)
    assert {ids[-1] for ids in answers} >= {END, TURN}
    cut = sum(ids[-1] not in (END, TURN) for ids in answers)
    assert made.metrics.ratios["train"]["completions/clipped_ratio"] == (cut, 16)


def test_a_stop_token_of_the_users_own_is_the_only_end(tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 16, "response_length": 24, "stop_token_id": TURN}
    rollout = first_rollout(trainer(tmp_path, model=chat_model(), given=False, **sizes))
    answers = rollout.input_ids[:, -rollout.length :].masked_fill(~rollout.mask, -1).tolist()
    assert any(END in ids for ids in answers)
    assert all(TURN not in ids or ids[ids.index(TURN) + 1 :] == [-1] * (23 - ids.index(TURN)) for ids in answers)


@pytest.mark.situation("PPO: missing_eos_penalty where generation_config has several end tokens", "right")
def test_an_answer_with_another_end_is_not_penalised(tmp_path: Path) -> None:
    """Nor is one saved by an end token that a tool wrote."""
    answers = [[5, END], [5, TURN], [5, 6], [5, TURN, 9]]
    made_by_policy = [[1, 1], [1, 1], [1, 1], [1, 0, 1]]

    def rollout_func(prompts: list, _: Any) -> dict:
        return {"prompt_ids": [[3]] * len(prompts), "completion_ids": answers, "env_mask": made_by_policy}

    changes = {"rollout_func": rollout_func, "per_device_train_batch_size": 4, "missing_eos_penalty": 1.5}

    def no_reward(completions: list, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    rollout = first_rollout(trainer(tmp_path, model=chat_model(), reward_funcs=no_reward, **changes))
    assert rollout.scores.tolist() == [0, 0, -1.5, -1.5]


def test_a_policy_without_a_generation_config_ends_with_the_tokenizer() -> None:
    assert end_tokens(SimpleNamespace(generation_config=None), tiny_tokenizer()) == [1]  # type: ignore[arg-type]


# Answers to which no reward applies

PLACEMENTS = {
    "k1-reward": {},
    "k1-immediate": {"kl_credit": "immediate"},
    "k3-both": {"kl_estimator": "k3", "kl_placement": "both"},
    "exact-loss": {"kl_estimator": "exact", "kl_placement": "loss"},
    "rewards-whitened": {"whiten_rewards": True},
}
UNSCORED = (2, 5)


def length_or_none(completion_ids: list, **_: Any) -> list[float | None]:
    return [None if row in UNSCORED else float(len(ids)) for row, ids in enumerate(completion_ids)]


def length(completion_ids: list, **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def without(rows: tuple[int, ...]) -> Any:
    """Rollout function: the given answers, and an empty one in the place of each of `rows`."""

    def rollout_func(prompts: list, made: Any) -> dict:
        given = given_answers(prompts, made)
        kept = [[] if row in rows else ids for row, ids in enumerate(given["completion_ids"])]
        return {**given, "completion_ids": kept}

    return rollout_func


@pytest.mark.situation("PPO: no reward applies to an answer (None)", "right")
@pytest.mark.parametrize("changes", PLACEMENTS.values(), ids=PLACEMENTS)
def test_an_unscored_answer_is_not_learnt_from(tmp_path: Path, changes: dict) -> None:
    """The update is that of a rollout in which the answer has no token, in every placement."""
    settings = {**changes, "kl_coef": 0.3, "num_mini_batches": 2, "num_ppo_epochs": 2, "ref_model": tiny_model(3)}
    runs = [
        trainer(tmp_path, reward_funcs=length_or_none, **settings),
        trainer(tmp_path, reward_funcs=length, rollout_func=without(UNSCORED), **settings),
    ]
    for made in runs:
        torch.manual_seed(0)  # the same minibatches
        made.train()
    unscored, empty = (weights(made.model) for made in runs)
    for name, value in unscored.items():
        torch.testing.assert_close(value, empty[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(unscored["policy.lm_head.weight"], tiny_model().lm_head.weight)


@pytest.mark.situation("PPO: no reward applies to any answer of a minibatch", "right")
def test_a_minibatch_without_a_reward_moves_nothing(tmp_path: Path) -> None:
    """Neither by momentum nor by weight decay: the update is that of the one answer that is scored."""

    def first_only(completions: list, **_: Any) -> list[float | None]:
        return [1.0, *[None] * (len(completions) - 1)]

    changes: dict[str, Any] = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}
    runs = [trainer(tmp_path, reward_funcs=first_only, num_mini_batches=number, **changes) for number in (8, 1)]
    for made in runs:
        made.train()
    many, one = (weights(made.model) for made in runs)
    for name, value in many.items():
        torch.testing.assert_close(value, one[name], msg=name)


@pytest.mark.situation("PPO: the logged reward where no reward applies to some answers", "right")
def test_an_unscored_answer_is_in_no_mean_of_rewards(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=length_or_none, missing_eos_penalty=1.5, ref_model=tiny_model(3))
    made.train()
    log = made.state.log_history[0]
    lengths = [len(ids) for ids in ANSWERS]
    scored = torch.tensor([float(n) for row, n in enumerate(lengths) if row not in UNSCORED])
    for name in ("reward", "objective/scores"):
        assert log[name] == pytest.approx(float(scored.mean()))
    assert log["reward_std"] == pytest.approx(float(scored.std()))
    assert log["objective/rlhf_reward"] == pytest.approx(log["reward"] + log["objective/non_score_reward"])
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)  # a fact about all answers
    assert log["kl/sequences"] == 8  # and so is the policy's KL


@pytest.mark.situation("PPO: no reward applies to an answer of an evaluation", "right")
def test_an_unscored_answer_of_an_evaluation(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=length_or_none, eval_dataset=tiny_dataset(8), per_device_eval_batch_size=8)
    scored = [len(ids) for row, ids in enumerate(ANSWERS) if row not in UNSCORED]
    assert made.evaluate()["eval_reward"] == pytest.approx(sum(scored) / len(scored))


@pytest.mark.situation("PPO: no reward applies to any answer of a rollout", "warned")
def test_a_rollout_without_a_reward_is_skipped(tmp_path: Path) -> None:
    def none(completions: list, **_: Any) -> list[None]:
        return [None] * len(completions)

    made = trainer(tmp_path, reward_funcs=none)
    before = weights(made.model)
    made.train()
    assert made.guard.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(made.model).items())
    assert "reward" not in made.state.log_history[0]


# Prompts that come as tokens


def tokenised(side: str, width: int, fill: int, *, mask: bool = True, form: str | None = None) -> Dataset:
    """The prompts of the tiny dataset as tokens, padded to `width` with `fill` on one side."""
    columns: dict[str, list] = {"input_ids": [], "attention_mask": []}
    for text in tiny_dataset(16)["prompt"]:
        ids = tiny_tokenizer()(text=text)["input_ids"]
        gap = width - len(ids)
        columns["input_ids"].append([fill] * gap + ids if side == "left" else ids + [fill] * gap)
        columns["attention_mask"].append([0] * gap + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * gap)
    columns["labels"] = [[-100] * width] * 16
    if not mask:
        del columns["attention_mask"]
    return Dataset.from_dict(columns).with_format(form)


def assert_same_rollout(rollout: Any, other: Any) -> None:
    """The same real tokens with the same log-probs, however the rows are padded."""
    for mine, theirs in zip(_rows(rollout), _rows(other), strict=True):
        assert mine[0] == theirs[0]
        torch.testing.assert_close(mine[1], theirs[1])


def _rows(rollout: Any) -> list:
    tokens = zip(rollout.input_ids, rollout.attention_mask.bool(), strict=True)
    measured = zip(rollout.old_logps, rollout.values, rollout.ref_logps, rollout.mask, strict=True)
    numbers = [torch.cat([row[mask] for row in rows]) for *rows, mask in measured]
    return list(zip([ids[kept].tolist() for ids, kept in tokens], numbers, strict=True))


@pytest.mark.situation("PPO: input_ids padded to one length, with attention_mask", "right")
@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_input_ids_is_no_part_of_a_prompt(tmp_path: Path, side: str, form: str | None) -> None:
    data = tokenised(side, 9, fill=5, form=form)  # a token that a prompt may hold
    plain = first_rollout(trainer(tmp_path, given=False))
    assert_same_rollout(first_rollout(trainer(tmp_path, given=False, train_dataset=data)), plain)


@pytest.mark.situation("PPO: input_ids padded with the padding token, without attention_mask", "right")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("added", [False, True], ids=["known", "added"])
def test_padding_tokens_at_the_ends_are_padding(tmp_path: Path, side: str, added: bool) -> None:
    tokenizer = with_added_padding() if added else tiny_tokenizer()
    data = tokenised(side, 9, fill=tokenizer.pad_token_id, mask=False)
    made = trainer(tmp_path, given=False, train_dataset=data, processing_class=tokenizer)
    assert_same_rollout(first_rollout(made), first_rollout(trainer(tmp_path, given=False)))


def test_a_padding_token_within_a_prompt_stays(tmp_path: Path) -> None:
    """Where padding and end are one token, the ends of the turns of a conversation are no padding."""
    assert PromptReader(tiny_tokenizer(), {}, 0, 23).read([{"input_ids": [0, 0, 5, 0, 6, 0]}])[1] == [[5, 0, 6]]


@pytest.mark.situation("PPO: [PAD] added to the tokenizer, the model not resized (as in TRL's examples)", "right")
@pytest.mark.parametrize("data", ["text", "masked"])
def test_a_padding_token_without_an_embedding(tmp_path: Path, data: str) -> None:
    """Generation, scores, values, exact KL and a reward model are those of a tokenizer whose padding has one."""
    changes: dict[str, Any] = {"given": False, "kl_estimator": "exact", "kl_placement": "both", "response_length": 12}
    changes |= {"ref_model": tiny_model(3), "num_ppo_epochs": 2}
    if data == "masked":
        changes["train_dataset"] = tokenised("left", 9, fill=23)
    runs = [
        trainer(
            tmp_path,
            processing_class=tokenizer,
            reward_model=classifier(7),
            value_model=classifier(5),
            **changes,
        )
        for tokenizer in (with_added_padding(), tiny_tokenizer())
    ]
    for made in runs:
        torch.manual_seed(0)
        made.train()
    added, known = (weights(made.model) for made in runs)
    for name, value in added.items():
        torch.testing.assert_close(value, known[name], msg=name)
    assert runs[0].state.log_history[0]["completions/clipped_ratio"] < 1  # some rows were filled up


@pytest.mark.situation("PPO: a policy saved with a tokenizer whose [PAD] the model does not know", "right")
def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    given = with_added_padding()
    made = trainer(tmp_path, processing_class=given)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.pad_token_id < loaded.config.vocab_size == 23
    assert given.pad_token == "[PAD]"  # the user's own tokenizer stays as it is


@pytest.mark.situation("PPO: prompts tokenised with another tokenizer, of more tokens", "refused")
def test_tokens_that_the_model_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset.from_dict({"input_ids": [[3, 4]] * 15 + [[3, 40]]})
    with pytest.raises(ValueError, match="a prompt holds the token 40 and the model's vocabulary has 23 entries"):
        trainer(tmp_path, given=False, train_dataset=data)
    monkeypatch.setattr("trl_klx.trainers.ppo.prompts._LOOKED_AT", 10)
    with pytest.raises(RunError, match="a prompt holds the token 40"):  # beyond the prompts that are looked at before
        trainer(tmp_path, given=False, train_dataset=data, max_steps=2).train()


@pytest.mark.situation("PPO: a rollout function returns tokens that the model does not know", "refused")
@pytest.mark.parametrize("token", [23, -100])
def test_tokens_of_a_rollout_function_that_the_model_does_not_know(tmp_path: Path, token: int) -> None:
    def rollout_func(prompts: list, made: Any) -> dict:
        return {**given_answers(prompts, made), "completion_ids": [[5, token, 1]] * len(prompts)}

    with pytest.raises(RunError, match=f"what rollout_func returned holds the token {token}"):
        trainer(tmp_path, rollout_func=rollout_func).train()


@pytest.mark.situation("PPO: attention_mask and input_ids of different lengths", "refused")
def test_a_mask_of_another_length(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 16, "attention_mask": [[1, 1]] * 16})
    with pytest.raises(ValueError, match="a row has 3 input_ids and 2 entries of attention_mask"):
        trainer(tmp_path, given=False, train_dataset=data)


@pytest.mark.situation("PPO: input_ids of padding alone", "refused")
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
def test_a_prompt_of_padding_alone(tmp_path: Path, mask: bool) -> None:
    rows = {"input_ids": [[3, 4, 5]] * 15 + [[0, 0, 0]], "attention_mask": [[1, 1, 1]] * 15 + [[0, 0, 0]]}
    data = Dataset.from_dict(rows if mask else {"input_ids": rows["input_ids"]})
    with pytest.raises(ValueError, match="the input_ids of a row are padding alone"):
        trainer(tmp_path, given=False, train_dataset=data)


# Value and reward models


@pytest.mark.situation("PPO: a value model of a smaller vocabulary", "refused")
@pytest.mark.parametrize("way", ["memory", "path"])
def test_a_value_model_of_a_smaller_vocabulary(tmp_path: Path, way: str) -> None:
    value: Any = value_model_like(tiny_model(vocab=20))
    if way == "path":
        value.save_pretrained(tmp_path / "value")
        value = str(tmp_path / "value")
    with pytest.raises(ValueError, match="value model has a vocabulary of 20 entries and the policy one of 23"):
        trainer(tmp_path, value_model=value)


@pytest.mark.situation("PPO: a value model of a larger vocabulary, of which nothing is known", "refused")
def test_a_value_model_of_a_larger_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"30 entries .* not known whether its tokens are the policy's"):
        trainer(tmp_path, value_model=value_model_like(tiny_model(vocab=30)))


@pytest.mark.situation("PPO: a value model with another tokenizer, of one size or not", "refused")
@pytest.mark.parametrize("vocab", [23, 30])
def test_a_value_model_with_another_tokenizer(tmp_path: Path, vocab: int) -> None:
    value_model_like(tiny_model(vocab=vocab)).save_pretrained(tmp_path / "value")
    reversed_tokenizer().save_pretrained(tmp_path / "value")
    with pytest.raises(ValueError, match=r"the value model \(.*value\) has another tokenizer than the policy"):
        trainer(tmp_path, value_model=str(tmp_path / "value"))


def test_a_value_model_with_rows_beyond_the_same_tokenizer(tmp_path: Path) -> None:
    """A classifier that was resized for a padding token of its own, say."""
    value_model_like(tiny_model(vocab=30)).save_pretrained(tmp_path / "value")
    with_added_padding().save_pretrained(tmp_path / "value")
    assert first_rollout(trainer(tmp_path, value_model=str(tmp_path / "value"))).values.eq(0).all()


@pytest.mark.situation("PPO: a reference of a smaller vocabulary", "refused")
def test_a_reference_of_a_smaller_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference has a vocabulary of 20 entries and the policy one of 23"):
        trainer(tmp_path, ref_model=tiny_model(vocab=20))


@pytest.mark.situation("PPO: a reward model with several labels", "refused")
@pytest.mark.parametrize("way", ["memory", "path", "among reward_funcs", "path among reward_funcs", "adapter"])
def test_a_reward_model_with_several_labels(tmp_path: Path, way: str) -> None:
    model: Any = classifier(labels=3)
    if "path" in way:
        model.save_pretrained(tmp_path / "reward")
        model = str(tmp_path / "reward")
    if way == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    argument = {"reward_funcs": [length, model]} if "among" in way else {"reward_model": model}
    with pytest.raises(ValueError, match=r"the reward model .* has 3 outputs: a reward is one number per answer"):
        trainer(tmp_path, **argument)


@pytest.mark.situation("PPO: a value model by path with several labels", "refused")
def test_a_value_model_by_path_with_several_labels(tmp_path: Path) -> None:
    classifier(labels=3).save_pretrained(tmp_path / "value")
    with pytest.raises(ValueError, match=r"the value model .* has 3 outputs: a value is one number"):
        trainer(tmp_path, value_model=str(tmp_path / "value"))


@pytest.mark.situation("PPO: a language model given as reward model", "refused")
def test_a_language_model_as_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reward model is a Qwen3ForCausalLM, which gives no number per answer"):
        trainer(tmp_path, reward_model=tiny_model())


@pytest.mark.situation("PPO: a reward model of the user's own that gives several numbers", "refused")
def test_a_model_of_the_users_own_with_several_outputs(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier(labels=2)
            self.config = self.inner.config

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    with pytest.raises(RunError, match=r"the reward model Own gives outputs \(2,\)"):
        trainer(tmp_path, reward_funcs=[Own()]).train()


@pytest.mark.situation("PPO: a reward model whose tokenizer begins a text with [CLS]", "right")
@pytest.mark.parametrize("way", ["memory", "path"])
def test_a_reward_model_that_needs_cls(tmp_path: Path, way: str) -> None:
    model, tokenizer = bert()
    given: Any = {"reward_funcs": [model], "reward_processing_classes": [tokenizer]}
    if way == "path":
        model.save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        given = {"reward_model": str(tmp_path / "reward")}
    rollout = first_rollout(trainer(tmp_path, **given))
    texts = tiny_tokenizer().batch_decode(ANSWERS, skip_special_tokens=True)
    for prompt, text, score in zip(tiny_dataset(16)["prompt"], texts, rollout.scores, strict=False):
        ids = tokenizer(text=prompt + text, return_tensors="pt")
        assert ids["input_ids"][0, 0] == tokenizer.cls_token_id
        with torch.no_grad():
            assert float(score) == pytest.approx(float(model(**ids).logits), abs=1e-5)


@pytest.mark.parametrize("given", [["1=", "2="], ["<bos>1=", "<bos>2="]], ids=["plain", "begun"])
def test_a_text_begins_with_one_bos_token(given: list[str]) -> None:
    """Prompts that a chat template has already been put on hold it themselves."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 23)])
    seen: list[Any] = []

    class Look(torch.nn.Module):
        def forward(self, input_ids: Any, **_: Any) -> Any:
            seen.append(input_ids)
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 1))

    model_rewards(Look(), tokenizer, given, ["1", "2"], {}, "cpu")
    assert seen[0].tolist() == [[23, 4, 13, 4], [23, 5, 13, 5]]


@pytest.mark.situation("PPO: the reward model's tokenizer has a [PAD] that the model does not know", "right")
def test_a_reward_model_whose_padding_has_no_embedding(tmp_path: Path) -> None:
    added, known = (
        first_rollout(trainer(tmp_path, reward_funcs=[classifier(7)], reward_processing_classes=[tokenizer])).scores
        for tokenizer in (with_added_padding(), tiny_tokenizer())
    )
    torch.testing.assert_close(added, known)


@pytest.mark.situation("PPO: a reward model's folder without a tokenizer", "refused")
def test_a_reward_model_without_a_tokenizer(tmp_path: Path) -> None:
    classifier(7).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"the reward model .*reward comes without a tokenizer"):
        trainer(tmp_path, reward_model=str(tmp_path / "reward"))
