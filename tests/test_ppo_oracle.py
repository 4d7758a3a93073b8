"""A whole PPO step against a second implementation, written in plain loops from the definitions, in float64.

Three epochs of two minibatches in uneven micro-batches, tool tokens, temperature, clipping of ratio, value and
gradient, entropy bonus and both whitenings at once: policy and value model have to end at the same parameters.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import classifier, first_rollout, trainer
from support.tiny import tiny_model
from test_ppo import chosen, dense, with_tool_output
from torch import Tensor

pytestmark = pytest.mark.trl

BASE: dict[str, Any] = {
    "temperature": 0.7,
    "gamma": 0.95,
    "lam": 0.9,
    "kl_coef": 0.3,
    "cliprange": 0.1,
    "cliprange_value": 0.15,
    "vf_coef": 0.3,
    "entropy_coef": 0.05,
    "max_grad_norm": 1.0,
    "learning_rate": 0.05,
    "num_ppo_epochs": 3,
    "num_mini_batches": 2,
    "whiten_rewards": False,
    "whiten_advantages": True,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 4,
}
MASKED = {"kl_is_cap": 1.2, "kl_is_mode": "mask"}
LEFT_OUT = {"kl_is_answer_cap": 1.1, "kl_is_veto": 0.8}
CASES: list[dict[str, Any]] = [
    {"kl_estimator": "k1", "kl_placement": "reward"},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_credit": "immediate", "whiten_rewards": True},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_credit": "sequence"},
    {"kl_estimator": "k2", "kl_placement": "loss"},
    {"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "prefix", "whiten_rewards": True},
    {"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "sequence", "kl_is_cap": 1.1},
    {"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "none"},
    {"kl_estimator": "k3", "kl_placement": "both"},
    {"kl_estimator": "exact", "kl_placement": "both", "whiten_rewards": True},
    {"kl_estimator": "exact", "kl_placement": "loss", "kl_importance_sampling": "prefix"},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix", "whiten_rewards": True},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "sequence", "kl_is_cap": 1.1},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix", "kl_credit": "immediate"},
    {"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix", "kl_credit": "sequence"},
    {"kl_estimator": "k3", "kl_placement": "both", "kl_importance_sampling": "prefix", "kl_is_cap": 1.1},
    {"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix", "whiten_rewards": True},
    {"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix", **MASKED},
    {"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix", **LEFT_OUT},
    {"kl_estimator": "exact", "kl_placement": "loss", **LEFT_OUT},
]


def state_values(model: Any, rollout: Any) -> Tensor:
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "position_ids": positions}
    return model.score(model.model(**inputs).last_hidden_state)[:, -rollout.length - 1 : -1, 0]


def penalty(c: dict, log_ratio: Tensor, exact: Tensor) -> Tensor:
    return {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": torch.expm1(-log_ratio) + log_ratio,
        "exact": exact,
    }[c["kl_estimator"]]


def rewards_of(c: dict, rollout: Any, kl: Tensor, credit: str | None) -> tuple[Tensor, Tensor]:
    """Reward after each token, and what is charged without going through the value model."""
    rewards, direct = torch.zeros_like(kl), torch.zeros_like(kl)
    made = rollout.mask
    for row in range(len(kl)):
        places = [t for t in range(kl.size(1)) if made[row, t]]
        if places:
            rewards[row, places[-1]] += rollout.scores[row]
        for number, t in enumerate(places):
            if credit == "return_to_go":
                rewards[row, t] -= c["kl_coef"] * kl[row, t]
            if credit == "future" and number + 1 < len(places):
                rewards[row, t] -= c["kl_coef"] * c["gamma"] * kl[row, places[number + 1]]
    if credit in ("immediate", "sequence"):
        charged = kl * made if credit == "immediate" else (kl * made).sum(1, keepdim=True) * made
        direct = -c["kl_coef"] * (charged - of_others(charged, made))
    return rewards, direct


def advantages_of(
    c: dict, rollout: Any, rewards: Tensor, direct: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, float]:
    made, scale = rollout.mask, 1.0
    if c["whiten_rewards"]:
        scale = 1 / float((rewards[made].var() + 1e-8).sqrt())
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(len(rewards)):
        advantage = next_value = 0.0
        for t in reversed([t for t in range(rewards.size(1)) if made[row, t]]):
            delta = scale * rewards[row, t] + c["gamma"] * next_value - values[row, t]
            advantage = delta + c["gamma"] * c["lam"] * advantage
            advantages[row, t], returns[row, t], next_value = advantage, advantage + values[row, t], values[row, t]
    advantages = advantages + scale * direct
    if c["whiten_advantages"]:
        std = float((advantages[made].var() + 1e-8).sqrt())
        advantages, scale = torch.where(made, (advantages - advantages[made].mean()) / std, 0.0), scale / std
    return advantages, returns, scale


def kl_loss(
    c: dict, logps: Tensor, policy: Tensor, ref: Tensor, ref_logps: Tensor, sampler: Tensor, made: Tensor
) -> Tensor:
    level, own = c.get("kl_importance_sampling", "token"), token_weights(c, logps, sampler, made)
    weights = {
        "none": torch.ones_like(logps),
        "token": own if c["kl_estimator"] != "exact" else torch.ones_like(logps),
        "prefix": own.cumprod(1),
        "sequence": own.prod(1, keepdim=True).expand_as(logps),
    }[level]
    log_ratio, kept = logps - ref_logps, answers_kept(c, logps, sampler, made)
    if c["kl_estimator"] == "exact":
        if level == "prefix":  # of the state, without the token's own
            weights = torch.cat([torch.ones_like(own[:, :1]), own.cumprod(1)[:, :-1]], 1)
        return kept * weights * (policy.exp() * (policy - ref)).sum(-1)
    if level == "none":
        return penalty(c, log_ratio, log_ratio)
    return kept * weights * log_ratio**2 / 2  # the gradient that every weighted estimator has


def token_weights(c: dict, logps: Tensor, sampler: Tensor, made: Tensor) -> Tensor:
    ratios, cap = ((logps - sampler) * made).detach().exp(), c.get("kl_is_cap", math.inf)
    return torch.where(ratios <= cap, ratios, 0.0 if c.get("kl_is_mode") == "mask" else cap)


def answers_kept(c: dict, logps: Tensor, sampler: Tensor, made: Tensor) -> Tensor:
    log_ratios = ((logps - sampler) * made).detach()
    mean, smallest = log_ratios.sum(1) / made.sum(1), log_ratios.exp().amin(1)
    kept = (mean.abs() <= math.log(c.get("kl_is_answer_cap", math.inf))) & (smallest >= c.get("kl_is_veto", 0.0))
    return kept.unsqueeze(1)


def charged(c: dict, kl: Tensor, weights: Tensor, made: Tensor, credit: str) -> tuple[Tensor, Tensor]:
    """What each token is charged for at an update, times its own weight; and the weight of a baseline there."""
    total, own = torch.zeros_like(kl), torch.zeros_like(kl)
    for row in range(len(kl)):
        places = [t for t in range(kl.size(1)) if made[row, t]]
        for n, t in enumerate(places):
            whole = c["kl_importance_sampling"] == "sequence"
            own[row, t] = weights[row, places if whole else places[: n + 1]].prod()
            for m, s in enumerate(places):
                if {"return_to_go": m >= n, "future": m > n, "immediate": m == n, "sequence": True}[credit]:
                    after = m if c["kl_estimator"] == "exact" else m + 1  # the exact KL is that of a state
                    used = places if whole or credit == "sequence" else places[: max(after, n + 1)]
                    total[row, t] += weights[row, used].prod() * kl[row, s]
    return total, own


def of_others(values: Tensor, made: Tensor) -> Tensor:
    means = torch.zeros_like(values)
    for row, t in made.nonzero().tolist():
        others = [values[other, t] for other in range(len(values)) if other != row and made[other, t]]
        means[row, t] = sum(others) / len(others) if others else 0.0
    return means


def second_implementation(
    c: dict, rollout: Any, policy: Any, value: Any, ref: Any, steps: list, credit: str | None
) -> None:
    """Take the optimizer steps on `policy` and `value`, in place."""
    with torch.no_grad():
        start, ref_all = dense(policy, rollout, c["temperature"]), dense(ref, rollout, c["temperature"])
        sampler, ref_logps = chosen(start, rollout), chosen(ref_all, rollout)
        values = state_values(value, rollout) * rollout.mask
        kl = penalty(c, sampler - ref_logps, (start.exp() * (start - ref_all)).sum(-1))
        at_update = c.get("kl_importance_sampling") in ("prefix", "sequence") and credit is not None
        rewards, direct = rewards_of(c, rollout, kl, None if at_update else credit)
        if at_update:
            of_rollout, _ = charged(c, kl, torch.ones_like(kl), rollout.mask, credit)
            baseline = of_others(of_rollout, rollout.mask)
        advantages, returns, scale = advantages_of(c, rollout, rewards, direct, values)
    parameters = [*policy.parameters(), *value.parameters()]
    for rows in steps:
        part, a = rollout.rows(rows), advantages[rows]
        now, v = dense(policy, part, c["temperature"]), state_values(value, part)
        logps = chosen(now, part)
        ratio = (logps - sampler[rows]).exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - c["cliprange"], 1 + c["cliprange"]))
        near = torch.clamp(v, values[rows] - c["cliprange_value"], values[rows] + c["cliprange_value"])
        errors = torch.maximum((v - returns[rows]) ** 2, (near - returns[rows]) ** 2)
        loss = loss + c["vf_coef"] * 0.5 * errors + c["entropy_coef"] * (now.exp() * now).sum(-1)
        if c["kl_placement"] in ("loss", "both"):
            term = kl_loss(c, logps, now, ref_all[rows], ref_logps[rows], sampler[rows], part.mask)
            loss = loss + c["kl_coef"] * scale * term
        if at_update:
            of_policy = (now.exp() * (now - ref_all[rows])).sum(-1)
            kl = penalty(c, logps - ref_logps[rows], of_policy).detach()
            slope, own = charged(c, kl, token_weights(c, logps, sampler[rows], part.mask), part.mask, credit)
            kept = answers_kept(c, logps, sampler[rows], part.mask)
            loss = loss + c["kl_coef"] * scale * kept * (slope - own * baseline[rows]) * logps
        gradients = torch.autograd.grad((loss * part.mask).sum() / part.mask.sum(), parameters, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        norm = float(torch.sqrt(sum(g.square().sum() for g in found)))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= c["learning_rate"] * min(1.0, c["max_grad_norm"] / (norm + 1e-6)) * gradient


@pytest.mark.parametrize("options", CASES, ids=lambda c: "-".join(str(value) for value in c.values()))
def test_a_step_equals_the_second_implementation(tmp_path: Path, options: dict) -> None:
    c = {**BASE, **options}
    policy, value = tiny_model().double(), classifier(5).double()
    other_policy, other_value = copy.deepcopy(policy), copy.deepcopy(value)
    reference = tiny_model(1).double()
    arguments = {"rollout_func": with_tool_output, "local_rollout_forward_batch_size": 5}
    made = trainer(tmp_path, model=policy, value_model=value, ref_model=copy.deepcopy(reference), **arguments, **c)
    rollout = first_rollout(made)
    generator = torch.Generator().manual_seed(3)
    steps = [rows for _ in range(3) for rows in torch.randperm(12, generator=generator).chunk(2)]
    made._minibatches = lambda answers: iter(steps)  # type: ignore[method-assign]
    made.train()
    credit = made.kl_term.credit_kind if made.kl_term.in_reward else None
    before = [p.detach().clone() for p in (*other_policy.parameters(), *other_value.parameters())]
    second_implementation(c, rollout, other_policy, other_value, reference, steps, credit)
    after = [*other_policy.parameters(), *other_value.parameters()]
    size = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True)) ** 0.5
    ours = [*policy.parameters(), *value.parameters()]
    error = sum(float((b - a).square().sum()) for a, b in zip(ours, after, strict=True)) ** 0.5
    assert size > 0.1
    assert error < 2e-6 * size
    log = made.state.log_history[0]
    assert log["policy/clipfrac_avg"] > 0.02  # the clip is at work
    assert log.get("kl/weight_cut", 1.0) > 0.02 and log.get("kl/answers_left_out", 0.5) > 0.02
