"""The KL's gradient on answers of another policy, through the trainers' losses: enumerated, it is that of the KL.

All 507 answers of at most two tokens, by GRPO's batch and PPO's rollout. `tests/test_oracle.py` has the maths alone,
`tests/test_fixed_points.py` where training ends.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import digit_reward, drift, tiny_dataset, tiny_model, tiny_tokenizer
from test_grpo import SETTINGS, rollout
from test_ppo import chosen, dense
from test_ppo_vllm import ANSWERS_OF_2, Enumerated, error, gradient
from torch import Tensor

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl.term import KLTerm
from trl_klx.trainers.ppo.rollout import padded

pytestmark = pytest.mark.trl

KINDS = {
    "k1 reward": {"kl_estimator": "k1", "kl_placement": "reward"},
    "k1 both": {"kl_estimator": "k1", "kl_placement": "both"},
    "k3 both": {"kl_estimator": "k3", "kl_placement": "both"},
    "exact both": {"kl_estimator": "exact", "kl_placement": "both"},
}
PREFIX, SEQUENCE = ({"kl_importance_sampling": level} for level in ("prefix", "sequence"))


class AllAnswers:
    """A batch of GRPO's that holds every answer to one prompt once, by a policy that is none of the trainer's."""

    length = 2

    def __init__(self, folder: Path, **options: Any) -> None:
        policy, self.reference, self.sampler = (tiny_model(seed).double() for seed in (0, 1, 2))
        with torch.no_grad():  # near enough that all of its answers are the policy's, too
            for own, weight in zip(self.sampler.parameters(), policy.parameters(), strict=True):
                own.copy_(weight + 0.15 * (own - weight))
        config = KLXGRPOConfig(str(folder), **{**SETTINGS, "max_completion_length": 2, "beta": 1.0, **options})
        data = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
        self.made = KLXGRPOTrainer(policy, digit_reward, config, **data)
        self.made.model.train()
        self.made.ref_model.load_state_dict(self.reference.state_dict())
        self.made.current_gradient_accumulation_steps = 1
        prompt = torch.tensor(tiny_tokenizer()(text="1+2=")["input_ids"]).expand(len(ANSWERS_OF_2), -1)
        ids, self.mask = padded([list(answer) for answer in ANSWERS_OF_2], 0, "right", "cpu")
        self.input_ids = torch.cat([prompt, ids], 1)
        self.attention_mask = torch.ones_like(self.input_ids)
        self.probs = self.of(self.sampler).detach().sum(1).exp()
        assert float(self.probs.sum()) == pytest.approx(1.0, abs=1e-9)
        self.batch: dict[str, Any] = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": ids,
            "completion_mask": self.mask,
            "advantages": torch.zeros(len(ids)),  # the KL alone
            "num_items_in_batch": self.mask.sum(),
            "kl_prompts": torch.zeros(len(ids), dtype=torch.long),
            "kl_baseline": torch.tensor([[0.7, -0.4]]) * self.mask,  # whatever it is, as long as no answer moves it
        }
        self.made._score_reference(self.batch)

    def of(self, model: Any) -> Tensor:
        """(B, T) log-probs of the answers."""
        return chosen(dense(model, self), self) * self.mask

    def found(self, **batch: Any) -> Tensor:
        """Expected gradient of the trainer's loss over the sampler's answers, its averaging aside."""
        self.made._aggregate = lambda values, mask, _: (self.probs[:, None] * values * mask).sum()
        return gradient(self.made._compute_loss(self.made.model, {**self.batch, **batch}), self.made.model)

    def wanted(self) -> Tensor:
        """Gradient of the policy's KL per answer, by definition."""
        policy, ref = dense(self.made.model, self), dense(self.reference, self).detach()
        probs = (chosen(policy, self) * self.mask).sum(1).exp()
        kl = ((policy.exp() * (policy - ref)).sum(-1) * self.mask).sum(1)
        return gradient((probs * kl).sum(), self.made.model)


# What acts on TRL's advantages does not act on a KL that is a loss of its own.
TRLS = [
    {},
    {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    {"loss_type": "cispo", "epsilon_high": 0.2},
    {"top_entropy_quantile": 0.3},
    {"off_policy_mask_threshold": 1e-6},
    {"epsilon": 1e-6, "delta": 1.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [PREFIX, SEQUENCE], ids=["prefix", "sequence"])
def test_grpos_kl_is_whole_on_answers_of_another_policy(tmp_path: Path, kind: str, level: dict) -> None:
    world = AllAnswers(tmp_path, **KINDS[kind], **level)
    wanted, sampler_logps = world.wanted(), world.of(world.sampler).detach()
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        assert error(world.found(**{name: sampler_logps}), wanted) < 1e-6, name
    assert error(world.found(), wanted) > 0.1  # taken for the policy's own answers


@pytest.mark.parametrize("options", TRLS, ids=str)
def test_nothing_of_trls_acts_on_it(tmp_path: Path, options: dict) -> None:
    world = AllAnswers(tmp_path, **KINDS["exact both"], **PREFIX, **options)
    logps = world.of(world.sampler).detach()
    ratio = torch.full((len(logps), 1), 0.5)
    found = world.found(old_per_token_logps=logps, sampling_per_token_logps=logps, importance_sampling_ratio=ratio)
    assert error(found, world.wanted()) < 1e-6


@pytest.mark.parametrize("kind", ["k1 reward", "exact both"])
def test_each_group_has_its_own_beta(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = AllAnswers(tmp_path, **KINDS[kind], **PREFIX)
    logps, probs, groups = world.of(world.sampler).detach(), world.probs, torch.arange(len(ANSWERS_OF_2)) % 2
    parts = []
    for group in (0, 1):
        world.probs = probs * (groups == group)
        parts.append(world.found(old_per_token_logps=logps))
    world.probs, betas = probs, torch.tensor([0.5, 3.0], dtype=torch.double)
    monkeypatch.setattr(world.made.kl, "coef_of", lambda numbers: betas[numbers].unsqueeze(1))
    found = world.found(old_per_token_logps=logps, kl_groups=groups)
    assert error(found, 0.5 * parts[0] + 3.0 * parts[1]) < 1e-6


@pytest.mark.parametrize("mode", ["off", "token_truncate", "sequence_mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_ppos_kl_is_whole_on_answers_of_another_policy(tmp_path: Path, kind: str, mode: str) -> None:
    correction = {"vllm_importance_sampling_correction": False} if mode == "off" else {}
    correction |= {} if mode == "off" else {"vllm_importance_sampling_mode": mode}
    world = Enumerated(tmp_path, **KINDS[kind], **PREFIX, **correction, cliprange=1e-3)
    rollout = world.rollout
    nothing = {"scores": torch.zeros_like(rollout.scores), "values": torch.zeros_like(rollout.values)}
    wanted = world.wanted("both", has_reward=False)
    assert error(world.found(replace(rollout, **nothing)), wanted) < 1e-6
    # Used again, after the policy that sampled has moved.
    again = {"engine_logps": None, "old_logps": world.of(world.engine).detach(), **nothing}
    assert error(world.found(replace(rollout, **again)), wanted) < 1e-6
    assert error(world.found(replace(rollout, engine_logps=None, **nothing)), wanted) > 0.02


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("kind", ["k1 reward", "k3 both", "exact both"])
def test_grpos_first_update_is_that_of_a_kl_in_the_advantages(tmp_path: Path, kind: str, iterations: int) -> None:
    found = []
    for level in ({}, PREFIX, SEQUENCE):
        torch.manual_seed(0)
        options = {**SETTINGS, "num_iterations": iterations, **KINDS[kind], **level}
        config = KLXGRPOConfig(str(tmp_path / str(len(found))), **options)
        data = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
        made = KLXGRPOTrainer(tiny_model().double(), digit_reward, config, **data)
        drift(made.model)
        inputs = rollout(made)
        assert ("kl_baseline" in inputs, "kl_credit" in inputs) == (bool(level), not level)
        found.append(gradient(made._compute_loss(made.model, inputs), made.model))
    in_advantages, *at_update = found
    assert max(error(other, in_advantages) for other in at_update) < 1e-6


@pytest.mark.parametrize("level", ["token", "prefix", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_as_if_not_there(kind: str, level: str) -> None:
    """Whatever lies on them."""
    term = KLTerm(KINDS[kind]["kl_estimator"], KINDS[kind]["kl_placement"], weight_level=level, weight_cap=1.5)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]]).bool()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 6, generator=generator, dtype=torch.double) for _ in range(5)]
    alone = [values[mask].view(2, 4) for values in given]
    spoilt = [torch.where(mask, values, torch.inf) for values in given]

    def losses(values: list[Tensor], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        logps, exact = values[0].requires_grad_(), values[3].requires_grad_()
        known = {"sampler_logps": values[2], "exact": exact, "baseline": values[4]}
        out = term.at_update(logps, values[1], mask, **known)
        sources = [exact if part == "loss" and term.estimator == "exact" else logps for part in out]
        pairs = zip(out.values(), sources, strict=True)
        return [(loss, torch.autograd.grad(loss.sum(), source)[0]) for loss, source in pairs]

    for part, other in zip(losses(spoilt, mask), losses(alone, torch.ones(2, 4).bool()), strict=True):
        for found, wanted in zip(part, other, strict=True):
            torch.testing.assert_close(found[mask].view(2, 4), wanted)
            assert not found[~mask].any()


@pytest.mark.parametrize("bounds", [{}, {"weight_cap": 2.0}, {"weight_cap": 2.0, "weight_mode": "mask"}], ids=str)
@pytest.mark.parametrize("level", ["prefix", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_answers_stay_finite(kind: str, level: str, bounds: dict) -> None:
    """4000 tokens whose ratios are up to e^5 and down to e^-5, in float32."""
    term = KLTerm(KINDS[kind]["kl_estimator"], KINDS[kind]["kl_placement"], weight_level=level, **bounds)
    generator = torch.Generator().manual_seed(0)
    away = torch.rand(3, 4000, generator=generator) * 10 - 5
    away[0], away[1] = away[0].abs(), -away[1].abs()
    logps, exact = (torch.full((3, 4000), value, requires_grad=True) for value in (-1.0, 0.3))
    ref_logps = -1.0 + 1.5 * torch.randn(3, 4000, generator=generator)
    losses = term.at_update(logps, ref_logps, torch.ones(3, 4000), sampler_logps=logps.detach() - away, exact=exact)
    total = torch.stack(list(losses.values())).sum()
    sources = [logps, exact] if term.estimator == "exact" else [logps]
    assert total.isfinite()
    assert all(found.isfinite().all() for found in torch.autograd.grad(total, sources))
