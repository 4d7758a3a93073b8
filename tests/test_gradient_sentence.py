"""The sentence of a configuration says what the table of gradients says, for every accepted configuration."""

import itertools

import pytest

from trl_klx.kl.gradients import EXPLANATION, SOUND, expected_gradient, gradient_sentence


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_the_sentence_follows_the_table(estimator: str) -> None:
    for placement, weight in itertools.product(("loss", "reward", "both"), ("none", "token")):
        gradient = expected_gradient(estimator, placement, weighted=weight != "none")
        sentence = gradient_sentence(estimator, placement, weight=weight)
        assert sentence.startswith(f"In expectation, the {estimator} KL in the ")
        assert sentence.endswith(f" {EXPLANATION[gradient.name]}.")
        if gradient in SOUND:
            assert "gradient of the" in sentence


def test_sentences_of_what_the_table_has_no_row_for() -> None:
    assert "no penalty" in gradient_sentence("k3", "none")
    assert "forward KL(reference || policy)" in gradient_sentence("exact", "loss", direction="forward")
    assert "along the policy's own answers" in gradient_sentence("exact", "both", direction="forward")
    assert "KL(policy || reference) at the data's own prefixes" in gradient_sentence("exact", "loss", on_data=True)
    on_data = gradient_sentence("exact", "loss", on_data=True, direction="forward")
    assert "KL(reference || policy) at the data's own prefixes" in on_data
