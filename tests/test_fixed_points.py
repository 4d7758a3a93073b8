"""Where the trainers end: a bandit whose fixed points are known, trained to the end through their real code paths.

One prompt, five arms of one token, reference and rewards as in the oracle, beta 1. Sampled training has to end where
the theory says. Only the output head is trained, from the reference itself, so the policy is a table; every step
samples 256 answers, and the learning rate falls to zero.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.device import DEVICE, PLAIN
from support.ppo_tools import settings
from support.tiny import tiny_model, tiny_tokenizer
from test_oracle import BANDIT_REF, BANDIT_REWARD
from torch import Tensor

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.trainers.ppo.trainer import KLXPPOTrainer

ARMS = list(range(3, 8))  # the tokens "0" to "4"
GROUP = 32
# Of a probability. The sampling error over five seeds of each case, run once: 0.010 at most, mostly below 0.004.
TOLERANCE = 0.02

PROMPTS = Dataset.from_dict({"prompt": ["="] * 256})
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 256,
    "max_steps": 80,
    "optim": "sgd",
    "learning_rate": 0.15,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.0,
    "temperature": 1.0,
    "logging_steps": 1000,
    **PLAIN,
}


def bandit_model() -> Any:
    """A real language model whose next-token distribution after the prompt is the reference's, to the last digit."""
    model = tiny_model().requires_grad_(False)
    logits = torch.full((23,), -30.0)
    logits[ARMS] = BANDIT_REF.float().log()
    with torch.no_grad():
        hidden = state(model).cpu()
        model.lm_head.weight.copy_(torch.outer(logits, hidden) / hidden.square().sum())
    model.lm_head.weight.requires_grad_()
    return model


def state(model: Any) -> Tensor:
    return model.base_model(**tiny_tokenizer()(text="=", return_tensors="pt").to(DEVICE)).last_hidden_state[0, -1]


def arms(model: Any) -> Tensor:
    with torch.no_grad():
        return model.lm_head(state(model)).softmax(-1)[ARMS].double().cpu()


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(BANDIT_REWARD[int(text)]) if text in "01234" and text else 0.0 for text in completions]


def optimum(rewards: Tensor) -> Tensor:
    """argmax E[r] - KL(pi || ref): ref exp(r), normalised."""
    return (BANDIT_REF * rewards.exp()) / (BANDIT_REF * rewards.exp()).sum()


def forward_optimum(rewards: Tensor) -> Tensor:
    """argmax E[r] - KL(ref || pi), where an unweighted k3 loss ends: ref / (c - r), c > max r so that it sums to 1."""
    low, high = float(rewards.max()), float(rewards.max()) + 1.0
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if float((BANDIT_REF / (c - rewards)).sum()) > 1 else (low, c)
    return BANDIT_REF / (c - rewards)


def ppo(folder: Path, options: dict, seed: int = 0) -> Tensor:
    model = bandit_model()
    config = settings(folder, **{**SHARED, "response_length": 1, "kl_coef": 1.0, "seed": seed, **options})
    KLXPPOTrainer(config, tiny_tokenizer(), model, train_dataset=PROMPTS, reward_funcs=reward).train()
    return arms(model)


def grpo(folder: Path, options: dict, seed: int = 0) -> Tensor:
    model = bandit_model()
    fields = {"num_generations": GROUP, "max_completion_length": 1, "beta": 1.0, "scale_rewards": "none", "seed": seed}
    config = KLXGRPOConfig(str(folder), **{**SHARED, **fields, **options})
    data = PROMPTS.select(range(64))
    KLXGRPOTrainer(model, reward, config, train_dataset=data, processing_class=tiny_tokenizer()).train()
    return arms(model)


# GRPO's baseline is the group's mean with the answer itself in it, which shrinks rewards by (G - 1) / G against the KL.
SHRINK = {ppo: 1.0, grpo: (GROUP - 1) / GROUP}
CASES = [
    ("k1 in the reward", {"kl_estimator": "k1", "kl_placement": "reward"}, optimum),
    ("k2 in the loss", {"kl_estimator": "k2", "kl_placement": "loss"}, optimum),
    ("k3 in the loss", {"kl_estimator": "k3", "kl_placement": "loss"}, optimum),
    ("exact in both", {"kl_estimator": "exact", "kl_placement": "both"}, optimum),
    (
        "k3 in the loss, unweighted",
        {"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "none"},
        forward_optimum,
    ),
]


def test_the_bandit_starts_at_its_reference() -> None:
    torch.testing.assert_close(arms(bandit_model()), BANDIT_REF, rtol=1e-5, atol=1e-6)


def test_the_fixed_points_are_those_of_exact_ascent() -> None:
    """Against the numbers that the oracle's test reaches by ascending the exact objective."""
    expected = torch.tensor([0.196194, 0.380936, 0.184839, 0.030932, 0.207098]).double()
    torch.testing.assert_close(optimum(BANDIT_REWARD), expected, rtol=0, atol=1e-6)
    expected = torch.tensor([0.165551, 0.224385, 0.123904, 0.048167, 0.437994]).double()
    torch.testing.assert_close(forward_optimum(BANDIT_REWARD), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", [ppo, grpo], ids=["ppo", "grpo"])
@pytest.mark.parametrize(("options", "theory"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_training_ends_where_theory_says(tmp_path: Path, run: Any, options: dict, theory: Any) -> None:
    found, rewards = run(tmp_path, options), BANDIT_REWARD * SHRINK[run]
    assert float((found - theory(rewards)).abs().max()) < TOLERANCE
    other = forward_optimum if theory is optimum else optimum
    assert float((found - other(rewards)).abs().max()) > 5 * TOLERANCE
