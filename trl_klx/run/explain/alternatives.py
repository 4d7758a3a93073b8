"""A recipe's KL beside the choices it might be exchanged for, with figures that are enumerated, not remembered."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

from ...kl.gradients import SOUND
from ...kl.term import KLTerm
from ...kl.variance import DISTANCES, Figures, figures

_MIDDLE = list(DISTANCES).index(0.10)


class Alternative(NamedTuple):
    """One configuration of the table."""

    term: KLTerm
    name: str
    gradient: str
    figures: Figures
    relative_variance: tuple[float, ...]  # the best of the same gradient is 1
    cost: str
    verdict: str


def name_of(term: KLTerm) -> str:
    """Estimator, placement and what else sets the term apart, in a few words."""
    name = f"{term.estimator}{' forward' if term.direction == 'forward' else ''} in {term.placement}"
    if term.in_reward and term.reward_credit != "return_to_go":
        name += f", credit {term.reward_credit}"
    if term.reward_at_update or (term.in_loss and (term.estimator != "exact" or term.takes_weights)):
        name += f", weight {term.weight_level}"
    if term.weight_cap is not None:
        name += f" {'to' if term.weight_mode == 'truncate' else 'below'} {term.weight_cap:g}"
    name += f", answers to {term.answer_cap:g}" if term.answer_cap is not None else ""
    return name + (f", veto {term.veto:g}" if term.veto is not None else "")


def gradient_name(term: KLTerm) -> str:
    """Short name of the expected gradient, also of the forward direction."""
    if term.direction == "reverse":
        return term.gradient.name
    return {"loss": "F", "reward": "M of F", "both": "Fseq"}[term.placement]


def is_sound(term: KLTerm) -> bool:
    """Whether the configuration is accepted."""
    return term.gradient in SOUND


def best_of(gradient: str) -> KLTerm:
    """The choice of the lowest variance among those with a gradient."""
    return min(_with_gradient(gradient), key=lambda term: figures(term).variance[_MIDDLE])


def variance_ratio(term: KLTerm, other: KLTerm) -> float:
    """How many times the answers `term` needs for the precision that `other` has, at 0.10 nats."""
    return figures(term).variance[_MIDDLE] / figures(other).variance[_MIDDLE]


def alternatives(own: KLTerm, *, scores_anyway: bool = False, off_policy: bool = False) -> list[Alternative]:
    """The recipe's own configuration, then those with its gradient or with the whole one, the least noisy first.

    Args:
        own: of the recipe.
        scores_anyway: whether the algorithm scores its answers under the policy after sampling, KL or not (PPO).
        off_policy: whether answers are another policy's: then a KL in the reward is there with prefix weights, too.
    """
    gradients = ["KLseq"]
    if is_sound(own):
        gradients = list(dict.fromkeys([gradient_name(own), "KLseq"]))
    else:
        gradients.append("P")
    others = [term for gradient in gradients for term in _with_gradient(gradient, off_policy)]
    others = [term for term in others if not _is_same(term, own)]
    return [_alternative(term, own, scores_anyway) for term in [own, *others]]


def _with_gradient(gradient: str, off_policy: bool = False) -> list[KLTerm]:
    found = [term for term in _all_terms(off_policy) if is_sound(term) and gradient_name(term) == gradient]
    return sorted(found, key=lambda term: round(figures(term).variance[_MIDDLE], 9))


def _all_terms(off_policy: bool) -> list[KLTerm]:
    terms = []
    places: Any = itertools.product(("exact", "k3", "k2", "k1"), ("both", "reward", "loss"))
    for estimator, placement in places:
        levels: Any = ("none",) if estimator == "exact" or placement == "reward" else ("token", "none")
        levels = ("prefix", *levels) if off_policy and placement != "loss" else levels
        terms += [KLTerm(estimator, placement, weight_level=level) for level in levels]
    terms += [KLTerm("exact", placement, weight_level="none", direction="forward") for placement in ("loss", "both")]
    return terms


def _is_same(term: KLTerm, own: KLTerm) -> bool:
    """The same configuration; to an exact KL, a token weight is none."""
    return name_of(term) == name_of(own) and term.takes_weights == own.takes_weights


def _alternative(term: KLTerm, own: KLTerm, scores_anyway: bool) -> Alternative:
    gradient = gradient_name(term)
    found = figures(term)
    peers = _with_gradient(gradient)
    best = figures(peers[0]).variance if peers else found.variance
    relative = tuple(mine / other for mine, other in zip(found.variance, best, strict=True))
    cost = "vocabulary" if term.estimator == "exact" else "log-probs"
    cost += " + scoring" if term.in_reward and not scores_anyway else ""
    return Alternative(term, name_of(term), gradient, found, relative, cost, _verdict(term, own))


def _verdict(term: KLTerm, own: KLTerm) -> str:
    if term is own:
        return "this recipe" if is_sound(own) else "this one: refused"
    if own.in_reward and term == replace(own, weight_level="prefix"):
        return "right off-policy"
    if is_sound(own) and gradient_name(term) == gradient_name(own):
        ratio = variance_ratio(own, term)
        if 0.95 < ratio < 1.05:
            return "the same variance"
        return f"{ratio:.1f}x less variance" if ratio > 1 else f"{1 / ratio:.1f}x more variance"
    return f"best of {gradient_name(term)}" if term == best_of(gradient_name(term)) else ""


def advice(term: KLTerm) -> str:
    """The verdict, and what to use instead."""
    whole = best_of("KLseq")
    if not is_sound(term):
        return f"Instead: {name_of(whole)} has the whole gradient at the lowest variance."
    gradient = gradient_name(term)
    best = best_of(gradient)
    ratio = variance_ratio(term, best)
    if ratio > 1.05:
        text = f"Accepted. {name_of(best)} has the same gradient at {ratio:.1f} times less variance"
    else:
        text = f"Accepted. No choice has less variance with this gradient ({gradient})"
    if gradient == "P":
        return (
            f"{text}; {name_of(whole)} adds what P leaves out, at nearly the same variance as {name_of(best_of('P'))}."
        )
    return f"{text}; for the reverse KL use {name_of(whole)}." if gradient.startswith("F") else f"{text}."
