"""The oracle: every sequence of a small autoregressive policy, enumerated in float64.

An expectation over samples is a finite sum here, so the expected gradient of any loss or reward is exact, and is
computed through the package's own functions. `World` holds the sequences and the three policies; the gradients that a
configuration ought to have (`targets`) are derived from the definition of the KL alone, by autograd.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support.device import DEVICE, made_here

VOCAB, LENGTH = 5, 3


@dataclass(eq=False)
class World:
    """All sequences `actions_NT`, the state before each token, the mask, and logits tables (S, V) as functions."""

    name: str
    actions_NT: Tensor
    states_NT: Tensor
    mask_NT: Tensor
    theta: Tensor  # parameters of the policy, requires grad
    policy_logits: Callable[[Tensor], Tensor]  # theta -> (S, V)
    ref_logits: Tensor
    sampler_logits: Tensor

    def token_logps(self, logits_SV: Tensor) -> Tensor:
        """(S, V) logits -> (N, T) log-probs of the enumerated tokens."""
        logps_SV = logits_SV.log_softmax(-1)
        return logps_SV[self.states_NT, self.actions_NT]

    def policy_logps(self) -> Tensor:
        return self.token_logps(self.policy_logits(self.theta))

    def ref_logps(self) -> Tensor:
        return self.token_logps(self.ref_logits)

    def sampler_logps(self) -> Tensor:
        return self.token_logps(self.sampler_logits)

    def sequence_probs(self, logps_NT: Tensor) -> Tensor:
        return (logps_NT * self.mask_NT).sum(-1).exp()

    def gradient(self, objective: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(objective, self.theta, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.theta).flatten() if grad is None else grad.flatten()


def sequences(with_eos: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All token strings (N, T), their masks, and for each position the index of its prefix.

    With EOS (token 0), a string ends at its first EOS: what follows is masked, and kept only once.
    """
    actions = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    mask = torch.ones_like(actions, dtype=torch.bool)
    if with_eos:
        ended_before = ((actions == 0).cumsum(-1) - (actions == 0).long()) > 0
        mask = ~ended_before
        keep = (actions.masked_fill(mask, 0) == 0).all(-1)  # after EOS only the all-zero continuation
        actions, mask = actions[keep], mask[keep]
    first = torch.zeros_like(actions[:, 0])
    states = torch.stack([first, 1 + actions[:, 0], 6 + 5 * actions[:, 0] + actions[:, 1]], dim=1)
    return actions, mask, states


def fixture_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and sampler tables of the random-free fixture, (31, 5) float64."""
    s = torch.arange(31, dtype=torch.float64)[:, None]
    a = torch.arange(5, dtype=torch.float64)[None, :]
    theta = torch.sin(0.7 * s + 1.3 * a)
    ref = theta + 0.5 * torch.cos(1.1 * s + 0.6 * a + 0.2)
    sampler = theta + 0.3 * torch.sin(0.5 * s - 0.9 * a + 0.4)
    return theta, ref, sampler


def fixture_world() -> World:
    actions, mask, states = sequences(with_eos=False)
    theta, ref, sampler = fixture_logits()
    return World("tabular", actions, states, mask, theta.requires_grad_(), lambda t: t, ref, sampler)


def eos_world() -> World:
    """The same tables with token 0 as EOS: sequences of 1 to 3 tokens."""
    actions, mask, states = sequences(with_eos=True)
    theta, ref, sampler = fixture_logits()
    return World("with EOS", actions, states, mask, theta.requires_grad_(), lambda t: t, ref, sampler)


def shared_world() -> World:
    """A two-layer network shared by all states, far from its reference: gradients of different states interfere."""
    actions, mask, states = sequences(with_eos=True)
    generator = torch.Generator(DEVICE).manual_seed(0)
    features = torch.randn(31, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4 * 6 + 6 * VOCAB, generator=generator, dtype=torch.float64) * 0.6
    drift = torch.randn(theta.shape, generator=generator, dtype=torch.float64)

    def logits(parameters: Tensor) -> Tensor:
        return torch.tanh(features @ parameters[:24].view(4, 6)) @ parameters[24:].view(6, VOCAB)

    ref, sampler = logits(theta + 0.7 * drift), logits(theta - 0.25 * drift.flip(0))
    return World("shared network", actions, states, mask, theta.requires_grad_(), logits, ref, sampler)


def all_worlds() -> list[World]:
    with made_here():
        return [fixture_world(), eos_world(), shared_world()]


def exact_token_kl(left_logits: Tensor, right_logits: Tensor) -> Tensor:
    """KL(left || right) of every state, (S,), written out independently of the package."""
    left, right = left_logits.log_softmax(-1), right_logits.log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)


def expected_token_kl(world: World, weights_N: Tensor, token_kl_S: Tensor) -> Tensor:
    """sum over sequences of probability times the per-state KL at each unmasked position."""
    return (weights_N[:, None] * token_kl_S[world.states_NT] * world.mask_NT).sum()


@functools.cache
def targets(world: World) -> dict[str, Tensor]:
    """The gradients that configurations are measured against, each from its definition.

    KLseq: gradient of the sequence KL(pi || ref), the policy's effect on later states included.
    P, P_mu: the same with the states held fixed, visited by pi or by the sampler.
    F, F_mu: gradient of the token-level forward KL(ref || pi), states fixed.
    M = KLseq - P: how today's token moves tomorrow's states.
    """
    policy = world.policy_logits(world.theta)
    probs_N = world.sequence_probs(world.policy_logps())
    sampler_probs_N = world.sequence_probs(world.sampler_logps())
    reverse_S = exact_token_kl(policy, world.ref_logits)
    forward_S = exact_token_kl(world.ref_logits, policy)

    def grad(weights: Tensor, token_kl: Tensor) -> Tensor:
        return torch.autograd.grad(expected_token_kl(world, weights, token_kl), world.theta, retain_graph=True)[
            0
        ].flatten()

    out = {
        "KLseq": grad(probs_N, reverse_S),
        "P": grad(probs_N.detach(), reverse_S),
        "P_mu": grad(sampler_probs_N, reverse_S),
        "F": grad(probs_N.detach(), forward_S),
        "F_mu": grad(sampler_probs_N, forward_S),
        "forward KLseq": grad(probs_N, forward_S),
    }
    out["M"] = out["KLseq"] - out["P"]
    out["0"] = torch.zeros_like(out["P"])
    return out


def relative_error(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Norm of the difference over the norm of the target (of `scale` where the target is zero)."""
    reference = wanted.norm() if wanted.norm() > 0 else scale.norm()
    return float((found - wanted).norm() / reference)
