"""Each alarm as a function of numbers: just beyond its thresholds, and just within each of them."""

from trl_klx.monitor.health.course import Target, collapse, is_flat, mode_collapse, runaway
from trl_klx.monitor.health.readings import Finding, Reading
from trl_klx.monitor.health.setup import (
    coarse_sampler,
    cut_ratios,
    hidden_kl,
    length_bias,
    stale_sampler,
    wrong_reference,
)


def readings(*values: float, every: int = 10) -> list[Reading]:
    return [Reading(every * (place + 1), value) for place, value in enumerate(values)]


def targets(*kl: float, target: float = 0.1, coef: float = 0.5) -> list[Target]:
    return [Target(10 * (place + 1), value, target, coef) for place, value in enumerate(kl)]


def alarm(finding: Finding | None, *words: str) -> None:
    """Three sentences without a full stop, in which all of the words are."""
    assert finding is not None
    assert all(part and not part.endswith(".") for part in finding)
    assert all(word in " | ".join(finding) for word in words), finding


def of_targets(entries: list[Target], coef_max: float | None = None) -> Finding | None:
    return runaway(entries, readings(9, 9, 9), readings(99, 99, 99), coef_max=coef_max, coef_name="beta")


def of_size(per_token: list[Reading], per_sequence: list[Reading]) -> Finding | None:
    return runaway([], per_token, per_sequence, coef_max=None, coef_name="kl_coef")


def test_far_from_the_target() -> None:
    alarm(of_targets(targets(0.05, 0.4, 0.31, 0.5)), "3.1 times", "threshold 3", "steps 20 to 40", "target 0.1")
    assert of_targets(targets(0.4, 0.29, 0.5)) is None  # one reading is back
    assert of_targets(targets(0.4, 0.5)) is None  # too few
    assert of_targets(targets(0.1, 0.1, 0.1)) is None  # held, however large the KL is by itself


def test_at_the_largest_beta_a_smaller_excess_counts() -> None:
    alarm(of_targets(targets(0.2, 0.13, 0.14), 0.5), "1.3 times", "threshold 1.25", "largest beta", "kl_coef_max")
    assert of_targets(targets(0.2, 0.12, 0.14), 0.5) is None
    assert of_targets(targets(0.2, 0.13, 0.14), 0.6) is None  # there is room
    assert of_targets(targets(0.2, 0.13, 0.14)) is None  # no bound
    late = [*targets(0.4, 0.4, coef=0.1), Target(30, 0.4, 0.1, 0.5)]  # beta has risen to its largest only now
    alarm(of_targets(late, 0.5), "4 times", "threshold 3)", "kl_coef_max")


def test_a_kl_beyond_any_useful_size() -> None:
    alarm(of_size(readings(1.1, 1.2, 1.3), readings(21, 25, 30)), "1.1 nats", "threshold 1", "threshold 20", "kl_coef")
    assert of_size(readings(0.1, 0.1, 0.1), readings(100, 100, 100)) is None  # long answers, a little at every token
    assert of_size(readings(5, 5, 5), readings(10, 10, 10)) is None  # short answers, a rare one picked
    assert of_size(readings(1.1, 0.9, 1.3), readings(21, 25, 30)) is None


def test_a_useless_kl_ends_at_half_the_size() -> None:
    settings = {"coef_max": None, "coef_name": "beta"}
    back, still = readings(0.6, 0.6, 0.4), readings(0.6, 0.6, 0.51)
    alarm(runaway([], still, readings(18, 11, 12), ongoing=True, **settings), "threshold 0.5", "threshold 10")
    assert runaway([], still, readings(18, 11, 12), **settings) is None
    assert runaway([], back, readings(18, 11, 12), ongoing=True, **settings) is None
    assert runaway([], still, readings(18, 9, 12), ongoing=True, **settings) is None


def test_an_explosion() -> None:
    alarm(of_size(readings(0.03, 0.07, 0.15, 0.31), readings(1, 2, 3, 6)), "doubled", "0.03, 0.07, 0.15, 0.31")
    assert of_size(readings(0.03, 0.07, 0.13, 0.31), readings(1, 2, 3, 6)) is None  # 0.13 is no doubling
    assert of_size(readings(0.02, 0.05, 0.11, 0.24), readings(1, 2, 3, 6)) is None  # every KL starts at 0
    assert of_size(readings(0.03, 0.07, 0.15, 0.31), readings(1, 2, 3, 4)) is None
    assert of_size(readings(0, 0, 0, 0.31), readings(0, 0, 0, 6)) is None
    assert of_size(readings(0.07, 0.15, 0.31), readings(2, 3, 6)) is None


FIRST = readings(0.5, 0.52, 0.48, 0.51, 0.49)
LAST = [Reading(step + 100, value) for step, value in FIRST]


def stuck(kl: list[Reading], gain: list[Reading] = LAST, **changes) -> Finding | None:
    settings = {"first_kl": 0.0, "spread": 0.4, "same_reward": 0.2, "entropy": 1.0, "coef_name": "kl_coef"}
    settings |= {"paid": readings(0, 0, 0), "weight": "kl_coef 1e+03, learning_rate 1e-06"}
    settings |= changes
    return collapse(kl, settings.pop("first_gain", FIRST), gain, settings.pop("paid"), **settings)


def test_nothing_is_learnt() -> None:
    still = readings(*6 * [9e-4])
    alarm(stuck(still), "at most 0.0009 nats", "from 0.5 to 0.5", "steps 10 to 60", "1e+03, learning_rate 1e-06")
    alarm(stuck(still), "raise learning_rate or lower kl_coef")
    alarm(stuck(still, same_reward=0.96), "rewards do not differ", "96%")
    alarm(stuck(still, entropy=0.04), "hardly varies", "raise temperature")
    assert stuck(readings(*5 * [9e-4], 1.1e-3)) is None  # it moves
    assert stuck(still[:5]) is None  # 40 steps
    assert stuck(readings(*4 * [0.0], every=20)) is None  # 4 readings
    assert stuck(still, LAST[1:]) is None
    assert stuck(still, [Reading(step + 100, value + 0.1) for step, value in FIRST]) is None  # the reward has risen
    assert stuck([]) is None


def test_a_kl_that_buys_nothing() -> None:
    moving = readings(*6 * [0.05])
    alarm(stuck(moving, paid=readings(0.1, 0.41, 0.5, 50)), "at least 0.41", "threshold 0.4", "steps 20 to 40")
    assert stuck(moving, paid=readings(1, 1, 1)).remedy.startswith("lower kl_coef; where a controller")  # type: ignore[union-attr]
    assert stuck(moving, paid=readings(0.41, 0.39, 50)) is None
    assert stuck(moving, paid=readings(50, 50)) is None
    assert stuck(moving, paid=readings(50, 50, 50), spread=None) is None  # DPO has no reward
    risen = [Reading(step + 100, value + 0.1) for step, value in FIRST]
    assert stuck(moving, risen, paid=readings(50, 50, 50)) is None  # it buys something


def test_scoring_noise_is_not_learning() -> None:
    noisy = readings(*6 * [0.05])
    alarm(stuck(noisy, first_kl=0.045), "threshold 0.054")
    assert stuck(noisy, first_kl=0.04) is None


def test_flat() -> None:
    """One standard error of the difference of these means is 0.01."""
    assert is_flat(FIRST, LAST)
    assert is_flat(FIRST, [Reading(step, value - 1.0) for step, value in LAST])  # falls
    assert is_flat(FIRST, [Reading(step, value + 0.019) for step, value in LAST])
    assert not is_flat(FIRST, [Reading(step, value + 0.021) for step, value in LAST])
    assert is_flat(readings(*5 * [0.5]), [Reading(step, 0.5) for step, _ in LAST])
    assert not is_flat(FIRST, LAST[:4])  # nobody knows
    assert not is_flat(FIRST, FIRST)  # the run has just begun


def test_mode_collapse() -> None:
    kl, low = readings(11, 12, 13), readings(0.04, 0.03, 0.02)
    from_two = {"first_entropy": 2.0, "coef_name": "beta"}
    alarm(mode_collapse(low, kl, **from_two), "at most 0.04 nats", "threshold 0.05", "at first 2", "11 nats")
    assert mode_collapse(low, readings(11, 9, 13), **from_two) is None  # a task with one right answer
    assert mode_collapse(readings(0.04, 0.06, 0.02), kl, **from_two) is None
    assert mode_collapse(low, kl, first_entropy=0.12, coef_name="beta") is None  # it always had little choice
    assert mode_collapse(low[:2], kl, **from_two) is None


def test_wrong_reference() -> None:
    settings = {"noise": 1e-4, "precision": "float32"}
    alarm(wrong_reference(Reading(1, 2e-4), **settings), "0.0002 nats", "threshold 0.0001", "float32")
    alarm(wrong_reference(Reading(1, -2e-4), **settings), "0.0002 nats")  # k1 may have any sign
    assert wrong_reference(Reading(1, 9e-5), **settings) is None
    assert wrong_reference(None, **settings) is None
    alarm(wrong_reference(None, mismatches=["another chat template"], **settings), "another chat template")
    alarm(wrong_reference(Reading(1, 1.0), mismatches=["so"], **settings), "so; before the first update")


def test_stale_sampler() -> None:
    alarm(stale_sampler(readings(0.9, 0.4, 0.49, 0.3), []), "at most 49%", "threshold 50%", "steps 20 to 40")
    assert stale_sampler(readings(0.4, 0.51, 0.3), readings(0.01, 0.01, 0.01)) is None
    alarm(stale_sampler(readings(0.9, 0.9, 0.9), readings(0.03, 0.021, 0.05)), "0.021 nats", "threshold 0.02")
    assert stale_sampler([], readings(0.03, 0.019, 0.05)) is None
    both = stale_sampler(readings(0.4, 0.4, 0.4), readings(0.5, 0.5, 0.5))  # the sampler's fault, not the updates'
    alarm(both, "at most 40%", "0.5 nats", "another model")


def test_why_a_sampler_is_apart() -> None:
    apart, errors = readings(0.05, 0.05, 0.05), readings(0.01, 0.01, 0.01)
    alarm(stale_sampler([], apart, Reading(10, 0.05), readings(1, 1, 1), errors), "another model")
    alarm(stale_sampler([], apart, Reading(1, 0.001), readings(1, 1, 1), errors), "old weights", "sync_weights")
    raw = stale_sampler([], apart, Reading(1, 0.05), readings(1.07, 1.05, 1.06), errors)
    alarm(raw, "not those it sampled by", "--logprobs-mode processed_logprobs")
    within = stale_sampler([], apart, Reading(1, 0.05), readings(1.07, 1.05, 1.06), readings(0.1, 0.1, 0.1))
    alarm(within, "another model")


def test_an_engine_of_another_dtype() -> None:
    settings = {"noise": 1e-4, "precision": "float32"}
    first = Reading(1, 3e-4)
    alarm(coarse_sampler(readings(3e-4, 2e-4, 5e-4), first, **settings), "another dtype", "0.0005 nats", "float32")
    assert coarse_sampler(readings(3e-4, 0.9e-4, 5e-4), first, **settings) is None
    assert coarse_sampler(readings(3e-4, 2e-4, 10e-4), first, **settings) is None  # it falls behind
    assert coarse_sampler(readings(3e-4, 2e-4, 5e-4), Reading(1, 0.9e-4), **settings) is None  # it was right at first
    assert coarse_sampler(readings(0.03, 0.03, 0.03), Reading(1, 0.03), **settings) is None  # `stale_sampler`
    assert coarse_sampler([], None, **settings) is None


def test_cut_ratios() -> None:
    alarm(cut_ratios(readings(0.06, 0.2, 0.07)), "at least 6%", "threshold 5%", "clip_max", "steps 10 to 30")
    assert cut_ratios(readings(0.06, 0.05, 0.07)) is None


def lengths(
    correlation: float = 0.8, slope: float = 0.1, chosen: float = 20, rejected: float = 10, answers: tuple = ()
) -> Finding | None:
    columns = [readings(*3 * [value]) for value in (correlation, slope, chosen, rejected)]
    return length_bias(*columns, readings(*answers))


def test_the_margin_follows_the_length() -> None:
    alarm(lengths(), "20 tokens", "10", "64% of the margin", "threshold 50%", "+0.1 nats per token", "longer")
    alarm(lengths(correlation=-0.8, slope=-0.1), "-0.1 nats per token", "longer")
    alarm(lengths(chosen=10, rejected=20), "shorter")
    assert lengths(correlation=0.7) is None  # 49 %
    assert lengths(slope=0.04) is None  # 0.4 nats of ten tokens
    assert lengths(slope=1.0, chosen=10.4, rejected=10) is None  # as long as each other
    assert length_bias(readings(0.8), readings(0.1), readings(20.0), readings(10.0), []) is None
    assert length_bias([], [], [], [], readings(1, 2, 3, 4)) is None


def test_the_answers_grow_towards_the_chosen_length() -> None:
    alarm(lengths(correlation=0.0, answers=(10, 13.1, 14, 15)), "from 10 tokens to 15", "threshold 13", "longer")
    assert lengths(correlation=0.0, answers=(10, 13.1, 12.9, 15)) is None
    assert lengths(correlation=0.0, answers=(10, 7, 7, 7)) is None  # against the pairs' preference
    alarm(lengths(correlation=0.0, chosen=10, rejected=20, answers=(10, 7, 7, 7)), "from 10 tokens to 7", "shorter")
    assert lengths(correlation=0.0, chosen=10, rejected=20, answers=(10, 7, 8, 7)) is None  # 7.7 is the threshold


def test_hidden_kl() -> None:
    alarm(hidden_kl(readings(0.6, 0.51, 0.9), readings(1, 1, 2)), "51% of the KL", "threshold 50%", "2 nats per answer")
    assert hidden_kl(readings(0.6, 0.49, 0.9), readings(1, 1, 2)) is None
    assert hidden_kl(readings(0.6, 0.6, 0.9), readings(1, 0.09, 2)) is None
