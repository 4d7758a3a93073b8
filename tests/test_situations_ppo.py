"""What users of PPO ran into: padded prompts, tokenizers of other sizes, answers without a reward, several ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_tools import ANSWERS, first_rollout, given_answers, trainer, weights
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from trl_klx.trainers.generation import end_tokens

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
    assert made._pooled["train"]["completions/clipped_ratio"] == (cut, 16)


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
