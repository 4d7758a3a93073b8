"""Where the trainers end on answers of another policy, with beta 1: the optimum, where the weights are those of states.

A bandit whose answers are used for four updates, and answers of two tokens, of three each, from an engine whose weights
never change, used for two. The optimum of E[r] - KL(pi || ref) is ref exp(r), normalised. The reward's own gradient is
right: nothing is clipped, and TRL's ratio weighs whole answers without a bound. What is found is what the KL's is.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as generation
from datasets import Dataset
from support import fake_vllm
from support.device import PLAIN
from support.fake_vllm import FakeLLM
from support.ppo_tools import settings
from support.tiny import tiny_model, tiny_tokenizer
from test_fixed_points import BANDIT_REWARD
from test_fixed_points import SHRINK as OF_BANDIT
from test_fixed_points import grpo as grpo_bandit
from test_fixed_points import optimum as bandit_optimum
from test_fixed_points import ppo as ppo_bandit
from torch import Tensor
from transformers import AutoModelForCausalLM

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.trainers.ppo.trainer import KLXPPOTrainer

ARMS, PROMPT = [3, 4, 5], 13  # the tokens "0" to "2", and "="
# Of the first token, and of the second after each of the first.
REFERENCE = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]]).double()
ENGINE = torch.tensor([[0.3, 0.4, 0.3], [0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.4, 0.3, 0.3]]).double()
REWARD = torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.5, 1.0], [0.5, -0.5, 0.0]]).double()
TOLERANCE = 0.01  # of an answer's probability
ANSWERS, GROUP = 512, 32
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": ANSWERS,
    "max_steps": 40,
    "optim": "sgd",
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.0,
    "temperature": 1.0,
    "logging_steps": 1000,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": None,
    "kl_health": False,
    **PLAIN,
}


class StaleLLM(FakeLLM):
    """Samples from a table, whatever weights come."""

    def load(self, named: list) -> None: ...

    def generate(self, prompts: list, sampling_params: Any, use_tqdm: bool) -> list:
        drawn = torch.multinomial(answers(ENGINE).flatten(), len(prompts), replacement=True)
        return [
            self._drawn(prompt["prompt_token_ids"], *divmod(int(n), 3))
            for prompt, n in zip(prompts, drawn, strict=True)
        ]

    def _drawn(self, prompt: list[int], first: int, second: int) -> SimpleNamespace:
        probs = {ARMS[first]: ENGINE[0, first]}, {ARMS[second]: ENGINE[1 + first, second]}
        logps = [
            {token: SimpleNamespace(logprob=float(p.log()), rank=1) for token, p in each.items()} for each in probs
        ]
        answer = SimpleNamespace(token_ids=[ARMS[first], ARMS[second]], logprobs=logps)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


def answers(table: Tensor) -> Tensor:
    """(3, 3) probabilities of the answers."""
    return table[0, :, None] * table[1:]


def save_table(folder: Path) -> str:
    """A language model whose next token depends on the one before, by a table: the reference's."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.fill_(-8.0)
        for state, token in enumerate([PROMPT, *ARMS]):
            model.model.embed_tokens.weight[token, state] = 1.0
            model.lm_head.weight[ARMS, state] = REFERENCE[state].float().log() / 4  # a state is 4 long, by its norm
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def found(model: Any) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[token] for token in (PROMPT, *ARMS)])).logits[:, -1]
    return answers(logits.softmax(-1)[:, ARMS].double())


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(REWARD[int(text[0]), int(text[1])]) for text in completions]


def optimum(rewards: Tensor) -> Tensor:
    weights = answers(REFERENCE) * rewards.exp()
    return weights / weights.sum()


def head_only(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    return model


def grpo(folder: str, options: dict) -> Tensor:
    model, data = head_only(folder), Dataset.from_dict({"prompt": ["="] * ANSWERS})
    fields = {"num_generations": GROUP, "max_completion_length": 2, "beta": 1.0, "scale_rewards": "none"}
    fields |= {"num_iterations": 2, "epsilon": 100.0, "learning_rate": 0.375}
    config = KLXGRPOConfig(f"{folder}/out", **{**SHARED, **fields, **options})
    KLXGRPOTrainer(model, reward, config, train_dataset=data, processing_class=tiny_tokenizer()).train()
    return found(model)


def ppo(folder: str, options: dict) -> Tensor:
    model, data = head_only(folder), Dataset.from_dict({"prompt": ["="] * ANSWERS})
    fields = {"response_length": 2, "kl_coef": 1.0, "whiten_advantages": False, "lam": 1.0, "stop_token": None}
    fields |= {"num_ppo_epochs": 2, "cliprange": 100.0, "learning_rate": 0.1875, "vf_coef": 0.0}
    config = settings(f"{folder}/out", **{**SHARED, **fields, **options})
    KLXPPOTrainer(config, tiny_tokenizer(), model, train_dataset=data, reward_funcs=reward).train()
    return found(model)


# GRPO's baseline is the group's mean with the answer itself in it, which shrinks rewards by (G - 1) / G against the KL.
SHRINK = {ppo: 1.0, grpo: (GROUP - 1) / GROUP}
PREFIX = {"kl_importance_sampling": "prefix"}
K1, EXACT = {"kl_estimator": "k1", "kl_placement": "reward"}, {"kl_estimator": "exact", "kl_placement": "both"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(generation, "LLM", StaleLLM)
    return save_table(tmp_path / "model")


def test_the_model_is_its_table(folder: str) -> None:
    torch.testing.assert_close(found(head_only(folder)), answers(REFERENCE), rtol=1e-4, atol=1e-6)
    assert float((answers(REFERENCE) - optimum(REWARD)).abs().max()) > 0.08
    assert float((answers(ENGINE) - optimum(REWARD)).abs().max()) > 0.08


@pytest.mark.parametrize("run", [grpo, ppo], ids=["grpo", "ppo"])
@pytest.mark.parametrize("kind", [K1, EXACT], ids=["k1 in the reward", "exact in both"])
def test_training_on_stale_answers_arrives_at_the_optimum(folder: str, run: Any, kind: dict) -> None:
    assert float((run(folder, kind | PREFIX) - optimum(REWARD * SHRINK[run])).abs().max()) < TOLERANCE


def test_without_the_weights_of_the_states_it_does_not(folder: str) -> None:
    """The loss's half has the KL in the states of the engine."""
    assert float((grpo(folder, EXACT) - optimum(REWARD * SHRINK[grpo])).abs().max()) > 3 * TOLERANCE


FOUR_UPDATES = {
    grpo_bandit: {"num_iterations": 4, "epsilon": 100.0, "max_steps": 100},
    ppo_bandit: {"num_ppo_epochs": 4, "cliprange": 100.0, "max_steps": 25},
}


@pytest.mark.parametrize("run", FOUR_UPDATES, ids=["grpo", "ppo"])
def test_the_bandit_whose_answers_are_used_again(tmp_path: Path, run: Any) -> None:
    wanted = bandit_optimum(BANDIT_REWARD * OF_BANDIT[run])
    assert float((run(tmp_path, K1 | PREFIX | FOUR_UPDATES[run]) - wanted).abs().max()) < TOLERANCE
