"""Answers from a real vLLM engine (CPU, bfloat16): its log-probs are those it samples by, and they correct the KL.

The engine is behind the policy and in another precision. All 259 answers of at most three tokens are enumerated, so the
expected gradient under the engine's own distribution is a finite sum, with no sampling noise.
"""

import dataclasses

import pytest
import torch
import vllm_engine
from answers import ANSWERS, IN_SYNC, LENGTH, PROMPT, STALE, drawn_as_reported, engine_scores, error, truths
from torch import Tensor

from trl_klx import KLXGRPOTrainer
from trl_klx.trainers.grpo.batch import sampler_logps_of

ROWS = 512
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture(scope="module")
def trainer(model: str, tmp_path_factory: pytest.TempPathFactory) -> KLXGRPOTrainer:
    batch = {"per_device_train_batch_size": ROWS, "num_generations": ROWS}
    folder = tmp_path_factory.mktemp("out")
    made = vllm_engine.make_trainer(model, folder, [PROMPT] * ROWS, **batch, max_steps=2, learning_rate=1e-3)
    made.train()
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def rollout(trainer: KLXGRPOTrainer) -> dict:
    return trainer._generate_and_score_completions([{"prompt": PROMPT}] * ROWS)


def difference(batch: dict) -> Tensor:
    return (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[batch["completion_mask"].bool()]


def test_training_sends_the_weights_to_the_engine(trainer: KLXGRPOTrainer) -> None:
    """While it trains the engine stays within bfloat16's rounding of the policy, and one call brings it back."""
    logs = [row for row in trainer.state.log_history if "kl/sampler" in row]
    assert len(logs) == 2
    assert all(0 < row["kl/sampler"] < 2e-3 for row in logs)
    trainer._last_loaded_step = trainer.state.global_step  # TRL believes that the engine is up to date
    vllm_engine.move(trainer.model, 0.1, seed=1)
    before = float(difference(rollout(trainer)).abs().mean())
    trainer.vllm_generation.sync_weights()
    after = float(difference(rollout(trainer)).abs().mean())
    assert after < 0.05 < before, (after, before)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.05}], ids=str)
def test_the_engine_samples_by_the_log_probs_it_reports(trainer: KLXGRPOTrainer, settings: dict) -> None:
    engine, prompt = trainer.vllm_generation, trainer.processing_class(PROMPT)["input_ids"]
    kept = {name: getattr(engine, name) for name in settings}
    vars(engine).update(settings)
    answers, logps = [], []
    for _ in range(8):
        _, sampled, scores, _ = engine.generate([prompt] * ROWS, None, ROWS)
        answers += sampled
        logps += [[score[0] for score in row] for row in scores]
    vars(engine).update(kept)
    assert drawn_as_reported(answers, logps) > 1e-4


@pytest.fixture(scope="module")
def behind(trainer: KLXGRPOTrainer, request: pytest.FixtureRequest) -> tuple[dict, Tensor, dict[str, Tensor], float]:
    """All answers as one rollout, the engine's probability of each, the true gradients, and how far it is behind."""
    trainer.vllm_generation.sync_weights()
    trainer._last_loaded_step = trainer.state.global_step
    vllm_engine.move(trainer.model, request.param, seed=5)  # the engine does not get these
    prompt = trainer.processing_class(PROMPT)["input_ids"]
    logps, engine_probs = engine_scores(trainer.vllm_generation.llm, prompt)
    # The rollout is TRL's own, of these answers.
    rows = [*range(len(ANSWERS)), *range(ROWS - len(ANSWERS))]
    stock = trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda *_, **__: (
        [prompt] * ROWS,
        [list(ANSWERS[n]) for n in rows],
        [[[value] for value in logps[n]] for n in rows],
        None,
    )
    batch = rollout(trainer)
    trainer.vllm_generation.generate = stock
    rewards = torch.zeros(len(ANSWERS))
    truth = truths(trainer.model, trainer.ref_model, prompt, engine_probs, rewards)
    return batch, engine_probs, {name: gradient / LENGTH for name, gradient in truth.items()}, request.param


def expected_gradient(trainer: KLXGRPOTrainer, batch: dict, engine_probs: Tensor) -> Tensor:
    """Sum over all answers of the engine's probability times the gradient of the trainer's loss on that answer."""
    total = torch.zeros(())
    for n, prob in enumerate(engine_probs):
        row = {
            name: value if isinstance(value, Tensor) and not value.dim() else value[n : n + 1]
            for name, value in batch.items()
            if value is not None
        }
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, row).backward()
        total = total + prob * torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]).double()
    return total


@pytest.mark.parametrize(
    ("behind", "estimator", "level", "target"),
    [
        (IN_SYNC, "k3", "token", "P_mu"),
        (IN_SYNC, "exact", "token", "P_mu"),
        (STALE, "k3", "token", "P_mu"),
        (STALE, "k3", "prefix", "P"),
        (STALE, "k3", "sequence", "P"),
        (STALE, "exact", "token", "P_mu"),
        (STALE, "exact", "prefix", "P"),
    ],
    indirect=["behind"],
)
def test_the_kl_in_the_loss_has_its_gradient_under_the_engine(
    trainer: KLXGRPOTrainer, behind: tuple, estimator: str, level: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, engine_probs, truth, moved = behind
    batch = {**batch, "advantages": torch.zeros(ROWS)}
    term = dataclasses.replace(trainer.kl_term, estimator=estimator, weight_level=level)
    monkeypatch.setattr(trainer, "kl_term", term)
    assert error(expected_gradient(trainer, batch, engine_probs), truth[target]) < 1e-4
    if estimator != "exact":
        rescored = {**batch, "sampling_per_token_logps": batch["old_per_token_logps"]}
        assert error(expected_gradient(trainer, rescored, engine_probs), truth[target]) > (0.1 if moved else 0.003)


@pytest.mark.parametrize("behind", [IN_SYNC, STALE], indirect=True)
def test_the_kl_in_the_advantages_has_its_gradient_under_the_engine(
    trainer: KLXGRPOTrainer, behind: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TRL's sequence ratio cuts nothing off: its default drops answers above 3, and with them their KL."""
    batch, engine_probs, truth, moved = behind
    term = dataclasses.replace(trainer.kl_term, estimator="k1", weight_level="none", placement="reward")
    monkeypatch.setattr(trainer, "kl_term", term)
    mask = batch["completion_mask"]
    log_ratio = ((batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask).sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    credit = term.credit(batch["old_per_token_logps"], batch["ref_per_token_logps"], mask)
    probs = torch.zeros(ROWS, 1, dtype=torch.double)
    probs[: len(engine_probs), 0] = engine_probs
    credit = credit - ((probs * credit).sum(0) / (probs * mask).sum(0)).float() * mask  # of many answers
    batch = {**batch, "advantages": torch.zeros(ROWS), "kl_credit": credit}

    def off_by(ratio: Tensor) -> float:
        with_ratio = {**batch, "importance_sampling_ratio": ratio}
        return error(expected_gradient(trainer, with_ratio, engine_probs), truth["KLseq"])

    default, uncorrected = off_by(batch["importance_sampling_ratio"]), off_by(torch.ones_like(ratio))
    kl = float((probs * ratio * log_ratio).sum())
    print(f"{kl:.2g} nats behind: default {default:.2g}, correction off {uncorrected:.2g}")
    assert (default > 0.05) == bool(moved) and uncorrected > 5e-4
    if moved:
        assert off_by(ratio) < 1e-4 and uncorrected > 0.1
    else:
        assert default < 1e-4


@pytest.mark.parametrize("behind", [STALE], indirect=True)
@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("k3", "both"), ("exact", "both")])
@pytest.mark.parametrize("level", ["prefix", "sequence"])
def test_the_kl_that_is_charged_at_the_update_has_its_gradient_whatever_trls_ratio(
    trainer: KLXGRPOTrainer,
    behind: tuple,
    estimator: str,
    placement: str,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, engine_probs, truth, _ = behind
    term = dataclasses.replace(trainer.kl_term, estimator=estimator, weight_level=level, placement=placement)
    monkeypatch.setattr(trainer, "kl_term", term)
    own = {"advantages": torch.zeros(ROWS), "kl_baseline": 0.3 * batch["completion_mask"]}
    own["importance_sampling_ratio"] = torch.full_like(batch["importance_sampling_ratio"], 0.2)
    assert error(expected_gradient(trainer, {**batch, **own}, engine_probs), truth["KLseq"]) < 1e-4


@pytest.mark.parametrize("correction", ["off", *MODES])
def test_the_engines_log_probs_are_taken_in_every_mode_and_nan_falls_back(
    trainer: KLXGRPOTrainer, correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", correction != "off")
    if correction != "off":
        monkeypatch.setattr(trainer, "vllm_importance_sampling_mode", correction)
    stock = vllm_engine.generation.extract_logprobs

    def with_gaps(outputs: list) -> tuple:
        logps, ids = stock(outputs)
        for answer in logps[::5]:
            answer[0][0] = None  # as TRL hands on a NaN of vLLM
        return logps, ids

    monkeypatch.setattr(vllm_engine.generation, "extract_logprobs", with_gaps)
    batch = rollout(trainer)
    engine, missing = batch["sampling_per_token_logps"], batch["sampling_per_token_logps"].isnan()
    assert missing.sum() == len(range(0, ROWS, 5))
    assert ("old_per_token_logps" in batch) == (correction != "off")
    policy = batch.get("old_per_token_logps", torch.full_like(engine, -7.0))
    torch.testing.assert_close(sampler_logps_of(policy, batch), torch.where(missing, policy, engine), rtol=0, atol=0)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in trainer.model.parameters())
