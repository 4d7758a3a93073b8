"""What users of PPO ran into: padded prompts, tokenizers of other sizes, answers without a reward, several ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ppo_tools import first_rollout, trainer
from tiny import tiny_model, tiny_tokenizer
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


@pytest.mark.situation("PPO: generation_config has several end tokens and stop_token_id names one", "right")
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
