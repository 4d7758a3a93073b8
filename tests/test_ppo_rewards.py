"""Prompts and rewards as GRPO's users give them."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.device import DEVICE
from support.ppo_tools import ANSWERS, classifier, first_rollout, messages, trainer
from support.tiny import CHARACTERS, digit_reward, tiny_dataset, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from trl_klx.trainers.rewarding.functions import RewardFunctions

pytestmark = pytest.mark.trl

TEXTS = tiny_tokenizer().batch_decode(ANSWERS, skip_special_tokens=True)
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def length(completions: list, **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def slow_length(completions: list, **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def only_even(completions: list, **_: Any) -> list[float | None]:
    return [1.0 if number % 2 == 0 else None for number in range(len(completions))]


def chat_tokenizer(template: str = CHAT) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def reversed_tokenizer() -> PreTrainedTokenizerBase:
    """Another vocabulary than the policy's: the same characters under other numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: number for number, char in enumerate(reversed(CHARACTERS))} | {"<p>": 20, "<e>": 21, "<u>": 22}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<p>", eos_token="<e>", unk_token="<u>")


def test_several_rewards_are_weighted_and_none_does_not_apply(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=[length, slow_length, only_even], reward_weights=[1.0, 0.5, 10.0])
    rollout = first_rollout(made)
    expected = [1.5 * len(text) + (10.0 if row % 2 == 0 else 0.0) for row, text in enumerate(TEXTS)]
    assert rollout.scores.tolist() == pytest.approx(expected)
    pooled = made.metrics.ratios[made.mode]
    assert pooled["rewards/only_even/mean"] == (4.0, 4.0)  # over the answers that it applies to
    assert pooled["rewards/slow_length/mean"] == pytest.approx((sum(map(len, TEXTS)), 8))
    assert made.metrics.means[made.mode]["reward_std"] == pytest.approx([float(torch.tensor(expected).std())])


def test_reward_functions_get_columns_state_and_logging(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(
        prompts: list, completions: list, completion_ids: list, answer: list, trainer_state: Any, **rest: Any
    ) -> list:
        seen.update(prompts=prompts, ids=completion_ids, answer=answer, step=trainer_state.global_step)
        rest["log_metric"]("my/metric", 3)
        rest["log_extra"]("note", ["x"] * len(prompts))
        return [0.0] * len(prompts)

    made = trainer(tmp_path, reward_funcs=look)
    made.train()
    data = tiny_dataset(16)
    assert seen["prompts"] == data["prompt"][:8]
    assert seen["answer"] == data["answer"][:8]
    assert seen["ids"] == ANSWERS
    assert seen["step"] == 0
    assert made.state.log_history[0]["my/metric"] == 3.0


def test_no_reward_applies(caplog: pytest.LogCaptureFixture) -> None:
    rewards = RewardFunctions([lambda completions, **_: [None, 1.0]], None, None, tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr("trl_klx.trainers.rewarding.functions.logger.warning", warned.append)
        values = rewards(["a", "b"], ["c", "d"], [[1], [2]], {}, "cpu")
    assert rewards.total(values).tolist() == [0.0, 1.0]
    assert "No reward applies to 1 of 2 answers" in warned[0]


def test_wrong_number_of_rewards_is_named() -> None:
    def short(**_: Any) -> list[float]:
        return [1.0]

    rewards = RewardFunctions([short], None, None, tiny_tokenizer())
    with pytest.raises(ValueError, match="'short' returned 1 rewards for 2 answers"):
        rewards(["a", "b"], ["c", "d"], [[1], [2]], {}, "cpu")
    with pytest.raises(ValueError, match="reward_weights has 2 entries and there are 1 rewards"):
        RewardFunctions([length], [1.0, 2.0], None, tiny_tokenizer())


def test_whatever_can_be_awaited_is(tmp_path: Path) -> None:
    """Objects with an async __call__, partials of coroutine functions, functions that return a coroutine."""

    class Scorer:
        async def __call__(self, completions: list, **_: Any) -> list[float]:
            return [1.0] * len(completions)

    async def scaled(completions: list, factor: float, **_: Any) -> list[float]:
        return [factor] * len(completions)

    given = [Scorer(), functools.partial(scaled, factor=2.0), lambda **columns: scaled(factor=4.0, **columns)]
    rewards = RewardFunctions(given, None, None, tiny_tokenizer())
    assert rewards.total(rewards(["a", "b"], ["c", "d"], [[1], [2]], {}, "cpu")).tolist() == [7.0, 7.0]


def test_a_column_does_not_hide_the_answers() -> None:
    rewards = RewardFunctions([length], None, None, tiny_tokenizer())
    found = rewards(["a"], ["1234"], [[1]], {"completions": ["x"]}, "cpu")
    assert found.tolist() == [[4.0]]


@pytest.mark.parametrize("returned", [None, 1.0])
def test_a_reward_that_is_no_list_is_named(returned: Any) -> None:
    rewards = RewardFunctions([lambda **_: returned], None, None, tiny_tokenizer())
    with pytest.raises(ValueError, match=f"returned {returned} for 1 answers: return a list"):
        rewards(["a"], ["b"], [[1]], {}, "cpu")


def test_a_reward_model_with_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(classifier(7), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    plain, adapted = (first_rollout(trainer(tmp_path, reward_model=m)).scores for m in (classifier(7), model))
    torch.testing.assert_close(plain, adapted)  # a fresh adapter changes nothing


def test_async_rewards_run_inside_a_running_loop_and_together() -> None:
    """In a notebook there is an event loop already; ten rewards of 50 ms take little more than one."""

    async def wait(completions: list, **_: Any) -> list[float]:
        started.append(1)
        await asyncio.sleep(0.05)
        assert len(started) == 10  # all had begun before any had ended
        return [1.0] * len(completions)

    async def in_a_notebook() -> Any:
        return rewards(["a"], ["b"], [[1]], {}, "cpu")

    started: list[int] = []
    rewards = RewardFunctions([wait] * 10, None, None, tiny_tokenizer())
    assert rewards.total(asyncio.run(in_a_notebook())).tolist() == [10.0]


@pytest.mark.parametrize("side", ["reward_model", "reward_funcs"])
def test_a_reward_model_reads_the_text_with_its_own_tokenizer(tmp_path: Path, side: str) -> None:
    model, tokenizer = classifier(7), reversed_tokenizer()
    tokenizers = {"reward_processing_classes": [tokenizer]} if side == "reward_funcs" else {}
    if side == "reward_model":  # a model with a path brings its tokenizer
        model.save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        made = trainer(tmp_path / "run", reward_model=str(tmp_path / "reward"))
    else:
        made = trainer(tmp_path / "run", reward_funcs=[model], **tokenizers)
    rollout = first_rollout(made)
    texts = [prompt + text for prompt, text in zip(tiny_dataset(16)["prompt"][:8], TEXTS, strict=True)]
    for text, score in zip(texts, rollout.scores, strict=True):
        ids = tokenizer(text=text, return_tensors="pt").to(DEVICE)
        with torch.no_grad():
            expected = model.base_model(**ids).last_hidden_state[:, -1] @ model.score.weight.T
        assert float(score) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_conversational_prompts(tmp_path: Path) -> None:
    """The chat template makes the tokens; reward functions get messages."""
    seen: dict[str, Any] = {}

    def look(prompts: list, completions: list, **_: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [float(len(completion[-1]["content"])) for completion in completions]

    made = trainer(
        tmp_path, reward_funcs=look, train_dataset=messages(), processing_class=chat_tokenizer(), given=False
    )
    rollout = first_rollout(made)
    assert seen["prompts"][3] == [{"role": "user", "content": "3+3="}]
    assert seen["completions"][3][0]["role"] == "assistant"
    prompt = rollout.input_ids[3, : -rollout.length]
    kept = prompt[rollout.attention_mask[3, : -rollout.length].bool()]
    assert tiny_tokenizer().decode(kept) == "3+3=="  # the template's own sign for the answer's beginning


def test_a_reward_model_reads_messages_through_its_own_template(tmp_path: Path) -> None:
    model, tokenizer = classifier(7), chat_tokenizer("{% for m in messages %}{{ m['content'] }}a{% endfor %}")

    def given(prompts: list, trainer: Any) -> dict[str, list]:
        return {"prompt_ids": [[3]] * len(prompts), "completion_ids": [ANSWERS[row] for row in range(len(prompts))]}

    made = trainer(
        tmp_path,
        reward_funcs=[model],
        reward_processing_classes=[tokenizer],
        train_dataset=messages(),
        processing_class=chat_tokenizer(),
        rollout_func=given,
    )
    rollout = first_rollout(made)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text=f"{row}+{row}=a{text}a", return_tensors="pt").to(DEVICE)
        with torch.no_grad():
            expected = model.base_model(**ids).last_hidden_state[:, -1] @ model.score.weight.T
        assert float(rollout.scores[row]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_tokenised_prompts_as_in_trl(tmp_path: Path) -> None:
    tokenizer, seen = tiny_tokenizer(), []

    def look(prompts: list, completions: list, **_: Any) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(prompts)

    texts = tiny_dataset(16)["prompt"]
    data = Dataset.from_dict({"input_ids": [tokenizer(text=text)["input_ids"] for text in texts]})
    rollout = first_rollout(trainer(tmp_path, train_dataset=data, given=False, reward_funcs=look))
    assert seen == texts[:8]
    plain = first_rollout(trainer(tmp_path, given=False))
    assert torch.equal(rollout.input_ids[:, : -rollout.length], plain.input_ids[:, : -plain.length])


def test_columns_of_a_rollout_function_reach_the_rewards(tmp_path: Path) -> None:
    from support.ppo_tools import given_answers

    def rollout_func(prompts: list, made: Any) -> dict[str, list]:
        return {**given_answers(prompts, made), "logprobs": [[0.0]] * len(prompts), "turns": list(range(len(prompts)))}

    def reward(turns: list, **rest: Any) -> list[float]:
        assert "logprobs" not in rest
        return [float(turn) for turn in turns]

    rollout = first_rollout(trainer(tmp_path, rollout_func=rollout_func, reward_funcs=reward))
    assert rollout.scores.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": [[3]]}, "returned 1 completion_ids for 8 prompts"),
        ({"prompt_ids": torch.zeros(2, 3)}, "returned 2 prompt_ids for 8 prompts"),
        ({"env_mask": [[1]] * 8}, "returned 1 entries of env_mask for the 4 tokens of answer 0"),
    ],
)
def test_lists_of_a_rollout_function_have_to_fit(tmp_path: Path, changes: dict, message: str) -> None:
    from support.ppo_tools import given_answers

    made = trainer(tmp_path, rollout_func=lambda prompts, trainer: {**given_answers(prompts, trainer), **changes})
    with pytest.raises(ValueError, match=message):
        first_rollout(made)


def test_one_function_without_a_list(tmp_path: Path) -> None:
    assert trainer(tmp_path, reward_funcs=digit_reward).sampler.rewards.names == ["digit_reward"]


def test_samples_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, num_sample_generations=1, max_steps=2).train()
    printed = capsys.readouterr().out
    assert "digit_reward" in printed
    assert "Completion" in printed
