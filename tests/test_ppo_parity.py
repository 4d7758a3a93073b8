"""Stock TRL as an oracle where it is right, and its faults shown where it is not.

Stock PPO is right where an answer has its full length (it pays the score one token late otherwise), in one minibatch of
one micro-batch, in one process, in float32. There the update of every parameter equals ours.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.device import PLAIN
from support.ppo_tools import classifier, moved, trainer, weights
from support.tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch import Tensor

pytest.importorskip("trl.experimental.ppo", reason="TRL has a PPO trainer up to 1.12")
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

pytestmark = pytest.mark.trl
ROWS, LENGTH = 8, 5
PROMPTS = tiny_dataset(ROWS)


def answers(end: bool) -> list[list[int]]:
    """Answers of full length; with `end`, every second one ends early."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 23, (ROWS, LENGTH), generator=generator).tolist()
    return [[*row[:2], 1] if end and number % 2 else row for number, row in enumerate(ids)]


def stock_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, end: bool = False, copies: int = 1, **changes: Any
) -> dict[str, Any]:
    """One rollout of stock PPO on the given answers: how each parameter moved, and what was logged."""
    tokenizer, model, value = tiny_tokenizer(), tiny_model(), classifier()
    fixed = [row + [0] * (LENGTH - len(row)) for row in answers(end)]
    order = {tuple(tokenizer(text=prompt)["input_ids"]): fixed[i] for i, prompt in enumerate(PROMPTS["prompt"])}

    def given(policy: Any, queries: Tensor, _size: int, pad: int, config: Any) -> tuple[Tensor, Tensor]:
        responses = torch.tensor([order[tuple(t for t in row.tolist() if t != pad)] for row in queries])
        query_responses = torch.cat([queries, responses], dim=1)
        logits = ppo_trainer.forward(policy, query_responses, pad).logits[:, queries.size(1) - 1 : -1]
        return query_responses, logits / config.temperature

    monkeypatch.setattr(ppo_trainer, "batch_generation", given)
    fields: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "num_ppo_epochs": 1,
        "response_length": LENGTH,
        "total_episodes": ROWS,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "temperature": 1.0,
        "stop_token": "eos",
        "num_sample_generations": 0,
        "logging_steps": 1,
        **PLAIN,
    }
    data = Dataset.from_dict({"input_ids": [list(ids) for ids in order] * copies})
    stock = PPOTrainer(
        PPOConfig(str(folder / "stock"), **{**fields, **changes}),
        tokenizer,
        model,
        tiny_model(1),
        classifier(7),
        data,
        value,
        eval_dataset=data,
    )
    before = weights(model) | {f"value.{name}": tensor for name, tensor in weights(value).items()}
    stock.train()
    after = weights(model) | {f"value.{name}": tensor for name, tensor in weights(value).items()}
    return {"step": moved(before, after), "logs": stock.state.log_history[0]}


def our_step(folder: Path, *, end: bool = False, **changes: Any) -> dict[str, Any]:
    model, value = tiny_model(), classifier()

    def given(prompts: list, made: Any) -> dict[str, list]:
        ids = [made.processing_class(text=prompt)["input_ids"] for prompt in prompts]
        texts = list(PROMPTS["prompt"])
        return {"prompt_ids": ids, "completion_ids": [answers(end)[texts.index(prompt)] for prompt in prompts]}

    made = trainer(
        folder / "ours",
        model=model,
        value_model=value,
        ref_model=tiny_model(1),
        reward_model=classifier(7),
        train_dataset=PROMPTS,
        rollout_func=given,
        response_length=LENGTH,
        **changes,
    )
    before = weights(model) | {f"value.{name}": tensor for name, tensor in weights(value).items()}
    made.train()
    after = weights(model) | {f"value.{name}": tensor for name, tensor in weights(value).items()}
    return {"step": moved(before, after), "logs": made.state.log_history[0]}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative size of the difference between two updates."""
    total = sum(float(step.square().sum()) for step in theirs.values())
    return (sum(float((ours[name] - step).square().sum()) for name, step in theirs.items()) / total) ** 0.5


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_update_equals_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, gamma: float) -> None:
    options = {"temperature": temperature, "gamma": gamma, "lam": 0.8, "kl_coef": 0.3}
    theirs, ours = stock_step(tmp_path, monkeypatch, **options), our_step(tmp_path, **options)
    assert difference(ours["step"], theirs["step"]) < 1e-4
    for name in ("objective/kl", "objective/scores", "objective/rlhf_reward", "policy/entropy_avg", "loss/value_avg"):
        assert ours["logs"][name] == pytest.approx(theirs["logs"][name], rel=1e-4, abs=1e-6), name


def test_several_epochs_equal_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One optimizer step per epoch; the ratio moves, and clips."""
    options = {"num_ppo_epochs": 4, "learning_rate": 0.3, "cliprange": 0.05, "cliprange_value": 0.05}
    theirs, ours = stock_step(tmp_path, monkeypatch, **options), our_step(tmp_path, **options)
    assert difference(ours["step"], theirs["step"]) < 1e-3
    for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/clipfrac_avg", "loss/policy_avg"):
        assert ours["logs"][name] == pytest.approx(theirs["logs"][name], rel=2e-2, abs=1e-5), name
    assert ours["logs"]["policy/clipfrac_avg"] > 0.05


def test_stock_differs_where_answers_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score lands behind the answer, on a token that is not the policy's; statistics count the padding."""
    theirs, ours = stock_step(tmp_path, monkeypatch, end=True), our_step(tmp_path, end=True)
    assert difference(ours["step"], theirs["step"]) > 0.03
    assert ours["logs"]["objective/kl"] == pytest.approx(theirs["logs"]["objective/kl"], rel=1e-4)
    assert ours["logs"]["policy/entropy_avg"] != pytest.approx(theirs["logs"]["policy/entropy_avg"], rel=3e-3)


def test_stock_takes_one_step_where_two_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    # Two rollouts' worth of data: at the end of its dataloader, accelerate steps at every micro-batch.
    taken = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: (taken.append(1), step(self, *a, **k))[1])
    stock_step(tmp_path, monkeypatch, copies=2, **options)
    stock = len(taken)
    our_step(tmp_path, **options)
    assert (stock, len(taken) - stock) == (1, 2)


def test_stock_does_not_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for step in (stock_step(tmp_path, monkeypatch, max_grad_norm=1e-3), our_step(tmp_path, max_grad_norm=1e-3)):
        sizes.append(sum(float(delta.square().sum()) for delta in step["step"].values()) ** 0.5)
    assert sizes[0] > 1e-2
    assert sizes[1] <= 1.001e-4
