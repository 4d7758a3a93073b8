# %% [markdown]
# # Which KL estimator? Every answer of a tiny policy, enumerated
#
# A policy over five tokens that writes three of them has 125 answers, so every expectation is a finite sum. This prints
# the bias and the noise of each estimator's value, then the same for the gradient of each placement, near the reference
# and far from it. No training, no sampling, two seconds:
#
#     python examples/estimators_by_enumeration.py
#
# It opens as a notebook in Jupyter (with jupytext) and in VS Code.

# %%
import itertools

import torch

from trl_klx.kl import KLTerm, exact_kl, kl_estimate

answers = torch.tensor(list(itertools.product(range(5), repeat=3)))  # (N, T)
states = torch.stack([0 * answers[:, 0], 1 + answers[:, 0], 6 + 5 * answers[:, 0] + answers[:, 1]], dim=1)
mask = torch.ones_like(answers, dtype=torch.bool)

# One row of five logits for each of the 31 states that an answer passes through.
s, a = (torch.arange(size, dtype=torch.float64) for size in (31, 5))
s, a = s[:, None], a[None, :]
policy = torch.sin(0.7 * s + 1.3 * a).requires_grad_()


def reference_at(distance: float) -> torch.Tensor:
    """The reference's logits: the policy's and a wave of this height."""
    return policy.detach() + distance * torch.cos(1.1 * s + 0.6 * a + 0.2)


def scores(logits: torch.Tensor) -> torch.Tensor:
    """(N, T) log-probs of all answers' tokens."""
    return logits.log_softmax(-1)[states, answers]


# %% [markdown]
# ## The value
# The KL of the whole answer, in nats: the sum over its tokens, expected under the policy. k1 and k3 are unbiased, k2 is
# not; an exact KL, which sums over the vocabulary at each position, leaves only the noise of which states are visited.


# %%
def value_of(estimator: str, reference: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation, over the policy's answers, of the estimate of one answer's KL."""
    with torch.no_grad():
        logps = scores(policy)
        if estimator == "exact":
            per_token = exact_kl(policy, reference)[states]
        else:
            per_token = kl_estimate(logps, scores(reference), estimator)
        chance, estimate = logps.sum(-1).exp(), per_token.sum(-1)
        mean = (chance * estimate).sum()
        return float(mean), float((chance * (estimate - mean) ** 2).sum().sqrt())


DISTANCES = (0.15, 0.5, 1.6)
KLS = {distance: value_of("k1", reference_at(distance))[0] for distance in DISTANCES}  # E[k1] is the KL by definition
HEADER = "".join(f"{f'KL {kl:.3f}':>16}" for kl in KLS.values())
print(f"Value: bias and standard deviation of one answer's estimate, relative to the KL\n{'':<32}{HEADER}")
for estimator in ("k1", "k2", "k3", "exact"):
    moments = {distance: value_of(estimator, reference_at(distance)) for distance in DISTANCES}
    biases = {d: round(mean / KLS[d] - 1, 4) + 0.0 for d, (mean, _) in moments.items()}  # -0.0 becomes 0.0
    cells = [f"{biases[d]:+.1%}, {deviation / KLS[d]:.2f}" for d, (_, deviation) in moments.items()]
    print(f"{estimator:<32}" + "".join(f"{cell:>16}" for cell in cells))

# %% [markdown]
# ## The gradient
# What training sees is the gradient of one sampled answer. Its mean should be that of the KL, and its variance is what
# a batch has to average away. `KLTerm` is the function that the trainers use.


# %%
def gradients_of(term: KLTerm, reference: torch.Tensor) -> torch.Tensor:
    """(N, parameters): the gradient of the KL penalty that each answer alone would give."""
    logps, ref_logps = scores(policy), scores(reference)
    exact = exact_kl(policy, reference)[states]
    per_token = torch.zeros_like(logps)
    if term.in_loss:
        per_token = per_token + term.loss(logps, ref_logps, mask, exact=exact)
    if term.in_reward:  # a score-function gradient: grad log pi times what the token is charged for
        per_token = per_token + term.credit(logps, ref_logps, mask, exact=exact) * logps
    rows = [torch.autograd.grad(row.sum(), policy, retain_graph=True)[0].flatten() for row in per_token]
    return torch.stack(rows)


def mean_and_variance(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of the gradient of one answer that the policy samples; the variance is the trace of the covariance."""
    chance = scores(policy).detach().sum(-1).exp()
    mean = chance @ rows
    return mean, float(chance @ (rows - mean).square().sum(-1))


TERMS = {
    "k1 loss, no weight": KLTerm("k1", "loss", weight_level="none"),
    "k2 loss": KLTerm("k2", "loss", weight_level="none"),
    "k3 loss, no weight": KLTerm("k3", "loss", weight_level="none"),
    "k3 loss": KLTerm("k3", "loss"),
    "exact loss": KLTerm("exact", "loss"),
    "k1 reward": KLTerm("k1", "reward", weight_level="none"),
    "k3 both": KLTerm("k3", "both"),
    "exact both": KLTerm("exact", "both"),
}
print("\nGradient: what it is, and the variance of one answer's over the squared norm of the KL's own")
print(f"{'':<22}{'gradient':<10}{HEADER}")
variances = {}
for name, term in TERMS.items():
    for distance in DISTANCES:
        reference = reference_at(distance)
        whole, _ = mean_and_variance(gradients_of(TERMS["exact both"], reference))
        variances[name, distance] = mean_and_variance(gradients_of(term, reference))[1] / float(whole.square().sum())
    cells = "".join(f"{variances[name, distance]:>16.1f}" for distance in DISTANCES)
    print(f"{name:<22}{term.gradient.name:<10}{cells}")
