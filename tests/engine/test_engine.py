"""Answers from a real vLLM engine (CPU, bfloat16): its log-probs are those it samples by, and they correct the KL.

The engine is behind the policy and in another precision. All 259 answers of at most three tokens are enumerated, so the
expected gradient under the engine's own distribution is a finite sum, with no sampling noise.
"""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
import vllm_engine
from scipy.stats import chi2
from torch import Tensor
from transformers import PreTrainedModel
from vllm import SamplingParams

from trl_klx import KLXGRPOTrainer
from trl_klx.trainers.grpo.batch import sampler_logps_of

PROMPT, LENGTH, ROWS = "ab", 3, 512
OTHERS = [token for token in range(len(vllm_engine.TOKENS)) if token != 1]
ANSWERS = [
    *((*start, 1) for n in range(LENGTH - 1) for start in itertools.product(OTHERS, repeat=n)),
    *((*start, end) for start in itertools.product(OTHERS, repeat=LENGTH - 1) for end in range(7)),
]
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
    counts, probs = Counter(), {}
    for _ in range(8):
        _, answers, logps, _ = engine.generate([prompt] * ROWS, None, ROWS)
        for answer, scores in zip(answers, logps, strict=True):
            counts[tuple(answer)] += 1
            probs[tuple(answer)] = math.exp(sum(score[0] for score in scores))
    vars(engine).update(kept)
    drawn = counts.total()
    common = [answer for answer, prob in probs.items() if drawn * prob >= 5]
    rest, rest_prob = drawn - sum(counts[a] for a in common), max(1 - sum(probs[a] for a in common), 1e-9)
    distance = sum((counts[a] - drawn * probs[a]) ** 2 / (drawn * probs[a]) for a in common)
    distance += (rest - drawn * rest_prob) ** 2 / (drawn * rest_prob)
    assert chi2.sf(distance, len(common)) > 1e-4


IN_SYNC, STALE = 0.0, 0.16  # how far the policy moves once the engine has its weights


@pytest.fixture(scope="module")
def behind(trainer: KLXGRPOTrainer, request: pytest.FixtureRequest) -> tuple[dict, Tensor, dict[str, Tensor], float]:
    """All answers as one rollout, the engine's probability of each, the true gradients, and how far it is behind."""
    trainer.vllm_generation.sync_weights()
    trainer._last_loaded_step = trainer.state.global_step
    vllm_engine.move(trainer.model, request.param, seed=5)  # the engine does not get these
    prompt = trainer.processing_class(PROMPT)["input_ids"]
    asked = [{"prompt_token_ids": [*prompt, *answer]} for answer in ANSWERS]
    scored = trainer.vllm_generation.llm.generate(
        asked, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    logps = [
        [scored[n].prompt_logprobs[len(prompt) + t][token].logprob for t, token in enumerate(answer)]
        for n, answer in enumerate(ANSWERS)
    ]
    # The rollout is TRL's own, of these answers: the engine reports the same numbers while it samples.
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
    engine_probs = torch.tensor([math.exp(sum(values)) for values in logps], dtype=torch.double)
    assert float(engine_probs.sum()) == pytest.approx(1.0, abs=1e-5)
    return batch, engine_probs, truths(trainer, prompt, engine_probs), request.param


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, and without the head that TRL 1.16 puts in: a deepcopy's would still score the original."""
    copied = type(model)(model.config).double().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def truths(trainer: KLXGRPOTrainer, prompt: list[int], engine_probs: Tensor) -> dict[str, Tensor]:
    """The gradients by definition, in float64 by autograd (as `enumeration.targets`)."""
    policy, reference = (plain_copy(model) for model in (trainer.model, trainer.ref_model))
    ids = torch.tensor([prompt + list(answer) + [0] * (LENGTH - len(answer)) for answer in ANSWERS])
    mask = torch.tensor([[t < len(answer) for t in range(LENGTH)] for answer in ANSWERS])
    logps, ref_logps = (
        model(ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        for model in (policy, reference)
    )
    probs = (logps.gather(-1, ids[:, len(prompt) :, None])[..., 0] * mask).sum(-1).exp()
    token_kl = (logps.exp() * (logps - ref_logps.detach())).sum(-1) * mask

    def gradient(weights: Tensor) -> Tensor:
        objective = (weights[:, None] * token_kl).sum() / LENGTH
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)]
        )

    return {"P": gradient(probs.detach()), "P_mu": gradient(engine_probs), "KLseq": gradient(probs)}


def expected_gradient(trainer: KLXGRPOTrainer, batch: dict, engine_probs: Tensor) -> Tensor:
    """Sum over all answers of the engine's probability times the gradient of the trainer's loss on that answer."""
    total = torch.zeros(())
    for n, prob in enumerate(engine_probs):
        row = {
            name: value if isinstance(value, Tensor) and not value.dim() else value[n : n + 1]
            for name, value in batch.items()
        }
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, row).backward()
        total = total + prob * torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]).double()
    return total


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


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
@pytest.mark.parametrize("placement", ["reward", "both"])
def test_the_kl_in_the_reward_has_its_gradient_under_the_engine(
    trainer: KLXGRPOTrainer, behind: tuple, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TRL's sequence ratio cuts nothing off: its default drops answers above 3, and with them their KL."""
    batch, engine_probs, truth, moved = behind
    term = dataclasses.replace(trainer.kl_term, estimator="k1", weight_level="prefix", placement=placement)
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
    print(f"{placement}, {kl:.2g} nats behind: default {default:.2g}, correction off {uncorrected:.2g}")
    assert (default > 0.05) == bool(moved) and uncorrected > 5e-4
    if moved:
        assert off_by(ratio) < 1e-4 and uncorrected > 0.1
    else:
        assert default < 1e-4


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
