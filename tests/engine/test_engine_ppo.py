"""PPO with answers from a real vLLM engine (CPU, bfloat16): its weights, its log-probs, and a run beside one without.

Gradients are sums over all 259 answers, as in test_engine.py; imitations of vLLM (tests/test_ppo_vllm.py) do the rest.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_engine
from answers import ANSWERS, IN_SYNC, PROMPT, STALE, drawn_as_reported, engine_scores, error, truths
from peft import LoraConfig
from torch import Tensor

from trl_klx import KLXPPOTrainer
from trl_klx.trainers.ppo import trainer as ppo_trainer
from trl_klx.trainers.ppo.rollout import Rollout
from trl_klx.trainers.shared.engine import policy_ratio

PROMPTS = [first + second for first in "abcd" for second in "abcd"]
COEF = 0.7
PLAIN = {"whiten_advantages": False, "vf_coef": 0.0, "lam": 1.0, "gamma": 1.0, "kl_coef": COEF}
NO_BOUND = {"vllm_importance_sampling_clip_max": None}


def make(model: str, folder: Path, **settings: Any) -> KLXPPOTrainer:
    return vllm_engine.make_ppo_trainer(model, folder, PROMPTS * 8, **settings)


@pytest.fixture(scope="module")
def trainer(model: str, tmp_path_factory: pytest.TempPathFactory) -> KLXPPOTrainer:
    made = make(model, tmp_path_factory.mktemp("out"), **PLAIN, **NO_BOUND)
    made.model.train()
    vllm_engine.move(made.policy, 0.1, seed=1)  # away from the reference
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engine_samples_by_the_log_probs_it_reports(trainer: KLXPPOTrainer, temperature: float) -> None:
    """Up to and with the end token, which the answers of PPO keep."""
    prompt, engine = trainer.processing_class(PROMPT)["input_ids"], trainer.engine.generation
    engine.temperature, kept = temperature, engine.temperature
    sampled, logps = trainer.engine.sample([prompt] * 4096)
    engine.temperature = kept
    assert {tuple(answer) for answer in sampled} <= set(ANSWERS)
    assert drawn_as_reported(sampled, logps) > 1e-4


@pytest.fixture(scope="module")
def behind(
    trainer: KLXPPOTrainer, request: pytest.FixtureRequest
) -> Iterator[tuple[Rollout, Tensor, dict[str, Tensor], float]]:
    """All answers as one rollout, the engine's probability of each, the true gradients, and how far it is behind."""
    before = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    trainer.engine.begin()
    trainer.engine.update()
    vllm_engine.move(trainer.policy, request.param, seed=5)  # the engine does not get these
    prompt, engine = trainer.processing_class(PROMPT)["input_ids"], trainer.engine.generation
    logps, probs = engine_scores(engine.llm, prompt)
    stock = engine.generate
    engine.generate = lambda *_, **__: (
        None,
        [*map(list, ANSWERS)],
        [[[value] for value in row] for row in logps],
        None,
    )
    with torch.no_grad():
        rollout = trainer.sampler.rollout([{"prompt": PROMPT}] * len(ANSWERS))
    engine.generate = stock
    rewards = torch.tensor(
        vllm_engine.letters(trainer.processing_class.batch_decode(ANSWERS, skip_special_tokens=True)),
        dtype=torch.double,
    )
    torch.testing.assert_close(rollout.scores.double(), rewards)
    yield rollout, probs, truths(trainer.policy, trainer.ref_model, prompt, probs, rewards), request.param
    trainer.policy.load_state_dict(before)


def gradient(trainer: KLXPPOTrainer, rollout: Rollout, probs: Tensor) -> Tensor:
    """Of the first update's loss: the sum over all answers of the engine's probability times that of the answer."""
    experience = trainer._shape(rollout)
    if experience.kl_baseline is not None:  # others of all answers there are would tell which this one is
        of_places = experience.kl_baseline.mean(0) * rollout.mask
        experience = dataclasses.replace(experience, kl_baseline=of_places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer, "masked_sum", lambda values, mask: (probs[:, None] * values * mask).sum())
        loss = trainer._loss(trainer.model, experience, torch.arange(len(ANSWERS))).loss
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*trainer.policy.parameters()])]).double()


@pytest.mark.parametrize(
    ("behind", "placement", "estimator", "level", "target"),
    [
        (moved, *case)
        for moved in (IN_SYNC, STALE)
        for case in (
            ("reward", "k1", "token", "KLseq"),
            ("reward", "k1", "prefix", "KLseq"),
            ("both", "exact", "prefix", "KLseq"),
            ("loss", "exact", "token", "P_mu"),
            ("loss", "exact", "prefix", "P"),
            ("loss", "k3", "token", "P_mu"),
            ("loss", "k3", "prefix", "P"),
        )
    ],
    indirect=["behind"],
)
def test_reward_and_kl_have_their_gradient_under_the_engine(
    trainer: KLXPPOTrainer,
    behind: tuple,
    placement: str,
    estimator: str,
    level: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout, probs, truth, moved = behind
    term = dataclasses.replace(trainer.kl_term, estimator=estimator, weight_level=level, placement=placement)
    changed = {"kl_term": term, "kl_in_loss": term.in_loss, "kl_in_reward": term.in_reward}
    changed["kl_at_update"] = term.reward_at_update
    for name, value in changed.items():
        monkeypatch.setattr(trainer, name, value)
    wanted = COEF * truth[target] - truth["reward"]
    assert error(gradient(trainer, rollout, probs), wanted) < 1e-4
    rescored = dataclasses.replace(rollout, engine_logps=rollout.old_logps)
    uncorrected = error(gradient(trainer, rescored, probs), wanted)
    monkeypatch.setattr(trainer.args, "vllm_importance_sampling_clip_max", 3.0)
    default = error(gradient(trainer, rollout, probs), wanted)
    log_ratio = ((rollout.old_logps - rollout.engine_logps) * rollout.mask).sum(1)
    kl = float((probs * log_ratio.exp() * log_ratio).sum())
    print(f"{placement} {estimator} {level}, {kl:.2g} nats behind: default {default:.2g}, off {uncorrected:.2g}")
    assert uncorrected > (0.05 if moved else 0.003)
    assert (default > 0.005) == bool(moved)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off"])
def test_nan_counts_as_the_policys_own(trainer: KLXPPOTrainer, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.args, "vllm_importance_sampling_correction", mode != "off")
    monkeypatch.setattr(trainer.args, "vllm_importance_sampling_clip_max", 1.01)
    if mode != "off":
        monkeypatch.setattr(trainer.args, "vllm_importance_sampling_mode", mode)
    stock = vllm_engine.generation.extract_logprobs

    def with_gaps(outputs: list) -> tuple:
        logps, ids = stock(outputs)
        for answer in logps[::5]:
            answer[0][0] = None  # as TRL hands on a NaN of vLLM
        return logps, ids

    monkeypatch.setattr(vllm_engine.generation, "extract_logprobs", with_gaps)
    rollout = trainer._make_rollout([{"prompt": prompt} for prompt in PROMPTS])
    engine, missing = rollout.engine_logps, rollout.engine_logps.isnan()
    assert missing.sum() == len(range(0, len(PROMPTS), 5))
    expected = torch.where(missing, rollout.old_logps, engine)
    torch.testing.assert_close(rollout.sampler_logps, expected, rtol=0, atol=0)
    ratio = policy_ratio(rollout.old_logps, engine, rollout.mask, trainer.args)
    assert ratio.isfinite().all()
    if not mode.startswith("sequence"):
        assert (ratio[missing] == 1).all()
    loss = trainer._loss(trainer.model, trainer._shape(rollout), torch.arange(len(PROMPTS))).loss
    assert loss.isfinite()


LEARNS = {
    "kl_placement": "both",
    "kl_coef": 0.05,
    "learning_rate": 1e-3,
    "num_ppo_epochs": 2,
    "per_device_train_batch_size": 128,
}


def logs(trainer: KLXPPOTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "reward" in row]


def test_a_run_learns_as_one_without_an_engine(model: str, tmp_path: Path) -> None:
    """Its reward and its KL, within the noise of another seed."""
    rows = {}
    for use_vllm in (False, True):
        rows[use_vllm] = logs(make(model, tmp_path, use_vllm=use_vllm, max_steps=14, **LEARNS))
    for name, noise in {"reward": 0.05, "kl/sequence": 0.1}.items():
        without, through = ([row[name] for row in rows[use_vllm]] for use_vllm in (False, True))
        print(name, *(f"{v:.2f}" for v in without), "through the engine", *(f"{v:.2f}" for v in through))
        assert through[-1] > through[0] + 0.5
        assert sum(through[-4:]) == pytest.approx(sum(without[-4:]), rel=noise)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear", r=4)], ids=["whole", "lora"])
def test_the_engine_has_the_weights_of_the_policy(model: str, tmp_path: Path, peft_config: Any) -> None:
    """Of every step, and with its adapter; without them it soon is far behind, and an alarm says so."""
    settings = {"max_steps": 8, **LEARNS, "learning_rate": 1e-3 if peft_config is None else 1e-2}
    rows = logs(make(model, tmp_path, peft_config=peft_config, **settings))
    assert rows[-1]["kl/sequence"] > 0.5
    for row in rows:
        assert 0 < row["kl/sampler"] < 5e-3 and row["kl/ess"] > 0.95 and abs(row["kl/weight_mean"] - 1) < 0.03
    made = make(model, tmp_path, peft_config=peft_config, **settings)
    made.engine.update()
    made.engine.generation.sync_weights = lambda: None
    assert logs(made)[-1]["kl/sampler"] > 0.02
    alarms = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert "old weights" in {event["alarm"]: event for event in alarms}["stale_sampler"]["cause"]
