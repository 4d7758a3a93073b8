r"""How noisy, and off-policy how wrong, the gradient of a configuration is: enumerated exactly on small policies.

The family: answers of three tokens out of five, a table of logits for every state, and a reference whose logits are

    ref(s, a) = theta(s, a) + d cos(1.1 s + 0.6 a + 0.2),    theta(s, a) = sin(0.7 s + 1.3 a)

at three distances d, so that KL(policy || reference) is 0.94, 0.10 and 0.011 nats per answer. All 125 answers are
summed over in float64, through the loss and the credit that the trainers use; nothing is sampled.

Relative variance is the trace of the covariance of one answer's gradient, over the squared norm of the partial gradient
P: about the number of answers at which noise and signal are of one size. A KL in the reward has its mean at that
position as baseline, as GRPO's leave-one-out baseline has with many answers.

Off-policy, the answers are those of a sampler whose logits are

    theta(s, a) + d sin(0.5 s - 0.9 a + 0.4)

at the distance d at which KL(policy || sampler) is what is asked for, in nats per answer.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .exact import exact_kl
from .importance import importance_weights
from .reward import kl_credit
from .term import KLTerm

VOCAB, LENGTH = 5, 3
# Distance d of the reference, by the KL in nats per answer that it gives.
DISTANCES = {0.94: 1.61443431, 0.10: 0.49435146, 0.011: 0.16190663}
REUSED = (0.01, 0.10)  # KL(policy || sampler), in nats per answer, of answers that are used again


class World(NamedTuple):
    """All answers (N, T) as states and tokens, and the logits (S, V) of policy and reference."""

    states: Tensor
    actions: Tensor
    policy: Tensor
    ref: Tensor

    def logps(self, logits: Tensor) -> Tensor:
        """(N, T) log-probs of the tokens."""
        return logits.log_softmax(-1)[self.states, self.actions]

    def probs(self, logits: Tensor) -> Tensor:
        """(N,) probabilities of the answers."""
        return self.logps(logits).sum(-1).exp()


class Stale(NamedTuple):
    """What becomes of a gradient on the answers of another policy."""

    error: float  # distance of the expected gradient from that on the policy's own answers, in the unit of `bias`
    variance: float  # of one answer's gradient, over that on the policy's own answers


class Figures(NamedTuple):
    """What the enumeration finds for one configuration; see the module's docstring. The last two at KL 0.10."""

    variance: tuple[float, ...]  # relative, at the KLs of `DISTANCES`
    bias: float  # distance of the expected gradient from that of the sequence KL, as a part of the latter
    stale: tuple[Stale, ...]  # at `REUSED`


@functools.cache
def world(distance: float) -> World:
    """Policy, and a reference at `distance`."""
    actions = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    first, second = actions[:, 0], actions[:, 1]
    states = torch.stack([torch.zeros_like(first), 1 + first, 6 + 5 * first + second], dim=1)
    s = torch.arange(31, dtype=torch.float64)[:, None]
    a = torch.arange(VOCAB, dtype=torch.float64)[None, :]
    policy = torch.sin(0.7 * s + 1.3 * a)
    ref = policy + distance * torch.cos(1.1 * s + 0.6 * a + 0.2)
    return World(states, actions, policy, ref)


def sampler_behind(here: World, behind: float) -> Tensor:
    """(S, V) logits of the sampler at KL(policy || sampler) = `behind` nats per answer; the policy's own for 0."""
    return _moved(here.policy, _sampler_distance(behind))


def _moved(policy: Tensor, distance: float) -> Tensor:
    s = torch.arange(len(policy), dtype=torch.float64)[:, None]
    a = torch.arange(VOCAB, dtype=torch.float64)[None, :]
    return policy + distance * torch.sin(0.5 * s - 0.9 * a + 0.4)


@functools.cache
def _sampler_distance(behind: float) -> float:
    """By bisection; the policy is the same at every distance of the reference."""
    here, low, high = world(DISTANCES[0.10]), 0.0, 8.0
    logps = here.logps(here.policy)
    for _ in range(50 if behind else 0):
        middle = (low + high) / 2
        kl = (logps.sum(-1).exp()[:, None] * (logps - here.logps(_moved(here.policy, middle)))).sum()
        low, high = (middle, high) if kl < behind else (low, middle)
    return low


def sequence_kl(distance: float) -> float:
    """KL(policy || reference) in nats per answer."""
    here = world(distance)
    log_ratio = here.logps(here.policy) - here.logps(here.ref)
    return float((here.probs(here.policy)[:, None] * log_ratio).sum())


@functools.cache
def figures(term: KLTerm) -> Figures:
    """Relative variance, bias, and what becomes of a configuration's gradient off-policy."""
    middle = DISTANCES[0.10]
    whole, mine = expected(world(middle), KLTerm("exact", "both")), expected(world(middle), term)
    variance = tuple(relative_variance(term, distance) for distance in DISTANCES.values())
    return Figures(variance, float((mine - whole).norm() / whole.norm()), tuple(stale(term, kl) for kl in REUSED))


@functools.cache
def stale(term: KLTerm, behind: float) -> Stale:
    """Error and variance on the answers of a sampler so far `behind`, at a KL of 0.10 to the reference."""
    here = world(DISTANCES[0.10])
    whole = expected(here, KLTerm("exact", "both"))
    error = (expected(here, term, behind) - expected(here, term)).norm() / whole.norm()
    on_policy, off_policy = (relative_variance(term, DISTANCES[0.10], behind=kl) for kl in (0.0, behind))
    return Stale(float(error), off_policy / on_policy)


def relative_variance(term: KLTerm, distance: float, *, baseline: bool = True, behind: float = 0.0) -> float:
    """Trace of the covariance of one answer's gradient over the squared norm of P, which is never zero here."""
    here = world(distance)
    samples, probs = _samples(here, term, behind, baseline=baseline), here.probs(sampler_behind(here, behind))
    mean = answers_mean(here, samples, probs)
    # An answer visits three different states: its gradient's norm is that of its three rows.
    second_moment = (probs * samples.square().sum((1, 2))).sum()
    partial = expected(here, KLTerm("exact", "loss"))
    return float((second_moment - mean.square().sum()) / partial.square().sum())


def expected(here: World, term: KLTerm, behind: float = 0.0) -> Tensor:
    """(S, V) expected gradient with respect to the policy's logits, on the answers of a sampler so far `behind`."""
    probs = here.probs(sampler_behind(here, behind))
    return answers_mean(here, _samples(here, term, behind), probs)


def answers_mean(here: World, samples: Tensor, probs: Tensor) -> Tensor:
    """Add up (N, T, V) gradients of answers at their states, by their probabilities."""
    total = torch.zeros_like(here.policy)
    return total.index_put((here.states,), probs[:, None, None] * samples, accumulate=True)


def _samples(here: World, term: KLTerm, behind: float, *, baseline: bool = True) -> Tensor:
    """(N, T, V) gradient of every answer's loss with respect to the logits at its own three states.

    Off-policy, answers are the sampler's, and so are the values of a KL in the reward, as where answers are used again
    after the policy has moved (the policy gradient carries the token's ratio, as GRPO's and PPO's do) - except where
    the credit is made at the update.
    """
    logits = here.policy[here.states].clone().requires_grad_()
    logps = logits.log_softmax(-1).gather(-1, here.actions[..., None]).squeeze(-1)
    ref_logps, mask = here.logps(here.ref), torch.ones_like(here.actions, dtype=torch.bool)
    sampler = sampler_behind(here, behind)
    sampler_logps = here.logps(sampler)
    ratio = importance_weights(logps, sampler_logps, mask, level="token")
    ref_logits = here.ref[here.states]
    exact, mean = exact_kl(logits, ref_logits, term.direction), None
    if term.reward_at_update and baseline:
        mean = (here.probs(sampler)[:, None] * term.credit(logps, ref_logps, mask, exact=exact)).sum(0)
    losses = term.at_update(logps, ref_logps, mask, sampler_logps=sampler_logps, exact=exact, baseline=mean)
    objective = sum((loss.sum() for loss in losses.values()), torch.zeros((), dtype=torch.float64))
    if term.in_reward and not term.reward_at_update:
        exact = exact_kl(sampler[here.states], ref_logits, term.direction)
        penalty = term.penalty(sampler_logps, ref_logps, mask, exact=exact)
        credit = kl_credit(penalty, mask, credit=term.credit_kind)
        if baseline:
            credit = credit - (here.probs(sampler)[:, None] * credit).sum(0)
        objective = objective + (ratio * credit * logps).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    return gradient
