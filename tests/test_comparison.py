"""`compare_runs`: what it draws of runs with known numbers, and the folders that it refuses."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from trl_klx import compare_runs
from trl_klx.monitor.history import HISTORY_FILE, write_entries

Made = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Made:
    """Makes the folder of a run that logged these entries."""

    def make(name: str, *entries: dict) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_entries(folder / HISTORY_FILE, list(entries))
        return folder

    return make


def logged(step: int, reward: float, kl: float, se: float = 0.01, prefix: str = "") -> dict:
    numbers = {"reward": reward, "kl/sequence": kl, "kl/sequence_se": se}
    return {"step": step, **{f"{prefix}{name}": value for name, value in numbers.items()}}


def curves(figure: Figure) -> dict[str, list[np.ndarray]]:
    """By the legend's label: (points, 2) of the three pictures."""
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    steps, kl_steps, tradeoff = figure.axes
    lines = zip(steps.lines, kl_steps.lines, (bars[0] for bars in tradeoff.containers), strict=True)
    return {label: [line.get_xydata() for line in own] for label, own in zip(labels, lines, strict=True)}


def bars(figure: Figure, place: int = 0) -> list[np.ndarray]:
    """(points, 2) ends of the error bars of the KL and of the reward, in reward against KL."""
    sideways, upright = figure.axes[2].containers[place][2]
    return [
        np.array([segment[:, axis] for segment in lines.get_segments()])
        for axis, lines in enumerate((sideways, upright))
    ]


def test_the_curves_are_what_was_logged(run: Made, tmp_path: Path) -> None:
    weak = run("weak", logged(5, 0.1, 0.04), logged(10, 0.3, 0.25), {"step": 10, "train_runtime": 1.0})
    strong = run("strong", logged(5, 0.1, 0.01), logged(10, 0.2, 0.04))
    figure = compare_runs([weak, strong])
    found = curves(figure)
    assert list(found) == ["weak", "strong"]
    np.testing.assert_allclose(
        found["weak"], [[[5, 0.1], [10, 0.3]], [[5, 0.04], [10, 0.25]], [[0.2, 0.1], [0.5, 0.3]]]
    )
    np.testing.assert_allclose(found["strong"][2], [[0.1, 0.1], [0.2, 0.2]])
    of_kl, of_reward = bars(figure)
    np.testing.assert_allclose(of_kl, np.sqrt([[0.02, 0.06], [0.23, 0.27]]))  # of the KL, ± 2 errors, then the root
    np.testing.assert_allclose(of_reward, [[0.1, 0.1], [0.3, 0.3]])  # none is logged
    band = figure.axes[1].collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.y0, band.y1], [0.02, 0.27])
    assert "Training batches" in figure.get_suptitle()
    assert figure.axes[2].get_xlabel() == "square root of the KL to the reference (nats per sequence)"
    assert not pyplot.get_fignums()  # the user's pyplot is left alone
    figure.savefig(tmp_path / "comparison.png")


def test_seeds_under_one_name_are_a_mean_with_the_error_over_them(run: Made) -> None:
    """At the steps that both logged."""
    first = run("first", logged(5, 0.2, 0.04), logged(10, 0.4, 0.2), logged(15, 0.9, 0.9))
    second = run("second", logged(5, 0.4, 0.06), logged(10, 0.8, 0.4))
    figure = compare_runs({"exact": [first, second], "alone": first})
    found = curves(figure)
    assert list(found) == ["exact (2 runs)", "alone"]
    np.testing.assert_allclose(found["exact (2 runs)"][:2], [[[5, 0.3], [10, 0.6]], [[5, 0.05], [10, 0.3]]])
    of_kl, of_reward = bars(figure)
    np.testing.assert_allclose(of_reward, [[0.1, 0.5], [0.2, 1.0]])  # the error of two numbers is half their distance
    np.testing.assert_allclose(of_kl, np.sqrt([[0.03, 0.07], [0.1, 0.5]]))


def test_held_out_prompts_are_read_where_every_run_has_them(run: Made) -> None:
    evaluated = [logged(0, 0.5, 0.0, prefix="eval_"), logged(9, 0.7, 0.09, prefix="eval_")]
    one, two = (run(name, logged(9, 0.1, 0.2), *evaluated) for name in "ab")
    figure = compare_runs([one, two])
    np.testing.assert_allclose(curves(figure)["a"][0], [[0, 0.5], [9, 0.7]])
    assert "Held-out" in figure.get_suptitle()
    once = run("c", logged(9, 0.1, 0.2), evaluated[0])
    np.testing.assert_allclose(curves(compare_runs([one, once]))["a"][0], [[9, 0.1]])


def test_of_a_moving_reference_it_is_the_kl_to_the_start(run: Made) -> None:
    """A run whose reference stays has it by another name."""
    moved = run("moved", {**logged(5, 0.1, 0.04), "kl/origin": 0.64, "kl/origin_se": 0.01})
    figure = compare_runs([moved, run("stayed", logged(5, 0.1, 0.04))])
    np.testing.assert_allclose([own[1][0, 1] for own in curves(figure).values()], [0.64, 0.04])
    assert figure.axes[1].get_ylabel() == "KL to the start (nats per sequence)"


def test_of_dpo_it_is_the_margin_where_the_probe_measured(run: Made) -> None:
    probed = {"step": 2, "rewards/margins": 0.3, "kl/sequence": 0.01}  # of one prompt: without an error
    figure = compare_runs({"dpo": run("dpo", {"step": 1, "rewards/margins": 0.1}, probed)})
    np.testing.assert_allclose(curves(figure)["dpo"], [[[2, 0.3]], [[2, 0.01]], [[0.1, 0.3]]])
    assert "margin" in figure.axes[0].get_ylabel()
    np.testing.assert_allclose(bars(figure)[0], [[0.1, 0.1]])


def test_a_negative_estimate_has_a_distance_of_zero(run: Made) -> None:
    """k1 may be negative: drawn as it is over the steps, and without a root."""
    found = curves(compare_runs([run("k1", logged(1, 0.1, -0.02))]))["k1"]
    assert found[1][0, 1] == -0.02
    assert found[2][0, 0] == 0.0


@pytest.mark.situation("compares runs by a folder that is none, or holds no run", "refused")
def test_what_is_no_run_is_refused(run: Made, tmp_path: Path) -> None:
    good = run("good", logged(1, 0.1, 0.1))
    (tmp_path / "empty").mkdir()
    for given, message in (
        ([good, tmp_path / "absent"], "absent is no folder: give the output_dir of a run"),
        ({"a": good, "b": tmp_path / "empty"}, "empty has no metrics.jsonl of a run: give the output_dir"),
        ([], "there is no run to compare: give the folders"),
        ({"a": []}, "'a' has no run: give the folders"),
        (str(good), "good is one folder, where several are to be compared: give the folders"),
        (good, "good is one folder, where several"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_runs(given)


@pytest.mark.situation("compares runs that measured no KL, or of different kinds", "refused")
def test_runs_that_cannot_be_compared_are_refused(run: Made) -> None:
    good = run("good", logged(1, 0.1, 0.1))
    without = run("without", {"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.1, "kl/sequence": math.inf})
    with pytest.raises(ValueError, match=r"without logged no reward .* with a KL \(kl/sequence\): .* kl_monitor"):
        compare_runs([good, without])
    margin = run("dpo", {"step": 1, "rewards/margins": 0.3, "kl/sequence": 0.01})
    with pytest.raises(ValueError, match=r"good logged a reward and .*dpo the margin .*: compare runs of one kind"):
        compare_runs([margin, good])
    with pytest.raises(ValueError, match="the runs of 'seeds' logged no step in common: give runs of the same"):
        compare_runs({"seeds": [good, run("later", logged(2, 0.1, 0.1))]})


def test_folders_of_one_name_are_called_by_their_paths(run: Made) -> None:
    one, two, other = (run(name, logged(1, 0.1, 0.1)) for name in ("a/out", "b/out", "c"))
    assert list(curves(compare_runs([one, two, other]))) == [str(one), str(two), "c"]
