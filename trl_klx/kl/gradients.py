r"""Which gradient a KL configuration has in expectation: the table that refusals, docs and `explain` read.

Every expectation of a supported loss or reward is a sum of three pieces; a configuration is their three coefficients:

    P   E sum_t g_t l_t           partial gradient of the reverse KL(pi || ref), visited states held fixed
    M   KLseq - P                 prefix term: how today's token moves tomorrow's states
    F   gradient of the token-level *forward* KL(ref || pi), states held fixed

with l = log pi - log ref and g = grad log pi. KLseq = P + M is the gradient of the whole sequence KL(pi || ref).
The table is proven by enumeration in `tests/test_oracle.py`. No torch here.
"""

from typing import NamedTuple


class Gradient(NamedTuple):
    """Coefficients of P, M and F; `known` is False where the expectation is not a combination of them."""

    partial: int = 0
    prefix: int = 0
    forward: int = 0
    known: bool = True

    def __add__(self, other: "Gradient") -> "Gradient":  # type: ignore[override]
        return Gradient(
            self.partial + other.partial,
            self.prefix + other.prefix,
            self.forward + other.forward,
            self.known and other.known,
        )

    @property
    def name(self) -> str:
        """Short name as used in the tables of the docs: KLseq, P, F, M, 0, KLseq - F, P - F, P + KLseq or biased."""
        if not self.known:
            return "biased"
        return _NAMES.get(self[:3], "biased")


NONE = Gradient()
PARTIAL = Gradient(partial=1)
PREFIX = Gradient(prefix=1)
FORWARD = Gradient(forward=1)
SEQUENCE = PARTIAL + PREFIX
BIASED = Gradient(known=False)

_NAMES = {
    NONE[:3]: "0",
    PARTIAL[:3]: "P",
    PREFIX[:3]: "M",
    FORWARD[:3]: "F",
    SEQUENCE[:3]: "KLseq",
    (1, 1, -1): "KLseq - F",
    (1, 0, -1): "P - F",
    (2, 1, 0): "P + KLseq",
    (2, 0, 0): "2 P",
    (2, 1, -1): "P + KLseq - F",
    (2, 0, -1): "2 P - F",
}

SOUND = (PARTIAL, SEQUENCE, FORWARD)

EXPLANATION = {
    "0": "has zero expected gradient: it adds noise and no pull to the reference",
    "P": "has the partial gradient of the reverse KL(policy || reference): each visited state pulled to the reference",
    "M": "has the prefix term alone: it moves the policy towards states with less KL and never towards the reference",
    "F": "has the gradient of the forward KL(reference || policy), which covers the reference's modes",
    "KLseq": "has the whole gradient of the sequence KL(policy || reference)",
    "KLseq - F": "vanishes to first order near the reference and diverges far from it",
    "P - F": "vanishes to first order near the reference and diverges far from it",
    "P + KLseq": "counts each token's own KL twice",
    "2 P": "counts each token's own KL twice",
    "P + KLseq - F": "counts each token's own KL twice and subtracts the forward KL",
    "2 P - F": "counts each token's own KL twice and subtracts the forward KL",
    "biased": "does not have a KL's gradient: the square of the log-ratio in the reward vanishes near the reference",
}


def loss_gradient(estimator: str, weighted: bool) -> Gradient:
    """Expected gradient of the KL loss; `weighted` means an importance weight of any level, 1 on-policy included."""
    if estimator == "exact":
        return PARTIAL
    if weighted:
        return PARTIAL  # value of the estimator, gradient w * l * g, for k1, k2 and k3 alike
    return {"k1": NONE, "k2": PARTIAL, "k3": FORWARD}[estimator]


def reward_gradient(estimator: str, credit: str) -> Gradient:
    """Expected gradient of the KL as a penalty in the reward, on-policy, gamma = 1."""
    if estimator == "k2":
        return BIASED
    if credit == "future":  # E[k_s] = D_s for the unbiased estimators
        return PREFIX
    own = {"k1": PARTIAL, "k3": Gradient(partial=1, forward=-1), "exact": NONE}[estimator]
    return own if credit == "immediate" else own + PREFIX


def credit_in_use(estimator: str, placement: str, credit: str, weighted: bool) -> str:
    """The credit that the reward uses. With `both`, return_to_go leaves out what the loss already charges.

    Where the loss has the partial gradient P, the reward takes the strict future, and the sum is KLseq. The literal
    k3 loss has F, and the literal k1 loss 0: their rewards keep the token's own KL, which makes the sum KLseq too.
    """
    loss_has_own_token = loss_gradient(estimator, weighted) == PARTIAL
    return "future" if placement == "both" and credit == "return_to_go" and loss_has_own_token else credit


def expected_gradient(estimator: str, placement: str, credit: str = "return_to_go", weighted: bool = True) -> Gradient:
    """Expected on-policy gradient of a configuration as `KLTerm` computes it, in units of beta.

    Args:
        estimator: k1, k2, k3 or exact.
        placement: none, loss, reward or both.
        credit: return_to_go, immediate or sequence (the reward's part).
        weighted: whether the loss carries an importance weight (kl_importance_sampling is not "none").
    """
    total = NONE
    if placement in ("loss", "both"):
        total += loss_gradient(estimator, weighted)
    if placement in ("reward", "both"):
        total += reward_gradient(estimator, credit_in_use(estimator, placement, credit, weighted))
    return total


def gradient_sentence(
    estimator: str,
    placement: str,
    credit: str = "return_to_go",
    weight: str = "token",
    *,
    direction: str = "reverse",
    on_data: bool = False,
) -> str:
    """The gradient of a configuration as one sentence in plain words, for reports and model cards.

    Args:
        estimator, placement, credit: as in `expected_gradient`.
        weight: the importance weight on the KL loss (kl_importance_sampling), "none" for none.
        direction: of an exact KL, reverse or forward.
        on_data: whether the KL is taken at the prefixes of given answers (DPO) and not of sampled ones.
    """
    if placement == "none":
        return "The KL to the reference is measured and logged; no penalty acts on the policy."
    where = {"loss": "in the loss", "reward": "in the reward", "both": "in the loss and in the reward"}[placement]
    kind = "exact forward" if direction == "forward" else estimator
    if on_data:
        pair = "KL(reference || policy)" if direction == "forward" else "KL(policy || reference)"
        return f"The {kind} KL {where} has the gradient of {pair} at the data's own prefixes, token by token."
    if direction == "forward":
        meaning = {
            "loss": EXPLANATION["F"],
            "reward": EXPLANATION["M"],
            "both": "has the gradient of the forward KL(reference || policy) summed along the policy's own answers",
        }[placement]
    else:
        meaning = EXPLANATION[expected_gradient(estimator, placement, credit, weight != "none").name]
    return f"In expectation, the {kind} KL {where} {meaning}."
