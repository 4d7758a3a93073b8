"""Simulated plants against their equations, and the command that tries controllers on them."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from trl_klx.cli import commands as cli
from trl_klx.control import KINDS, FixedController, make_controller
from trl_klx.control.plants import PHASES, by_plant, make_plants, phase_figures, run_courses, simulate


def test_plants_end_at_the_analytic_kl() -> None:
    """Open loop: a fixed beta ends at pull free (1 + beta / beta_free)^-gain, whatever lag and delay."""
    plants = make_plants(40, seed=3)
    plants.lag /= 20  # so that 500 updates are the end
    # At beta_star it is the target, without a penalty `free`, and far above beta_free it falls as beta^-gain.
    assert plants.steady(plants.beta_star, 1.0) == pytest.approx(plants.target)
    assert plants.steady(0 * plants.beta, 2.0) == pytest.approx(2 * plants.free)
    slope = np.log(plants.steady(1e6 * plants.beta, 1.0) / plants.steady(1e7 * plants.beta, 1.0)) / np.log(10)
    assert slope == pytest.approx(plants.gain, rel=1e-3)
    fixed = [make_controller("fixed", beta) for beta in plants.beta]
    relative = simulate(plants, fixed, "steps", seed=0)
    steady = plants.steady(plants.beta, 1.0) / plants.target
    lag = np.where(plants.paced, plants.lag * np.sqrt(steady), plants.lag)
    assert relative[0] == pytest.approx(steady * np.expm1(-1 / lag) ** 2)
    for phase, factor in enumerate((1.0, 1 / plants.factor, 1.0)):  # start; target; target and pull
        assert relative[500 * phase + 499] == pytest.approx(steady * factor, rel=1e-4)
    learning = simulate(plants, fixed, "learning", seed=0)
    quick = lag < 1
    assert quick.sum() > 10
    for update, pull in ((300, 1.0), (599, 4.0)):
        assert learning[update, quick] == pytest.approx(pull * steady[quick], rel=0.05)


def test_plants_answer_beta_after_delay_and_lag() -> None:
    plants = make_plants(1, seed=0)
    plants.beta[:], plants.delay[:], plants.lag[:], plants.paced[:] = 0.1, 3, 7.0, False

    class Jump(FixedController):
        def _observe(self, kl: float, n: float) -> None:
            self.coef = 0.1 if self.readings < 400 else 0.2

    distance = np.sqrt(simulate(plants, [Jump(0.1)], "steps", seed=0)[:500, 0])
    first, second = (math.sqrt(plants.steady(np.array([beta]), 1.0)[0] / plants.target[0]) for beta in (0.1, 0.2))
    # Reading 400 is the one after update 399, its beta acts on update 400, and 3 later for the delay.
    assert distance[:403] == pytest.approx(first * (1 - np.exp(-np.arange(1, 404) / 7)), rel=1e-9)
    assert distance[403:] == pytest.approx(second + (first - second) * np.exp(-np.arange(1, 98) / 7), rel=1e-9)


def test_controllers_of_the_benchmark_meet_the_same_noise() -> None:
    plants = make_plants(3, seed=0)
    courses = [
        simulate(plants, [make_controller(kind, 0.1, target=0.1) for _ in range(3)], "learning", seed=5)
        for kind in ("pid", "pid", "adaptive")
    ]
    assert (courses[0] == courses[1]).all() and not (courses[0] == courses[2]).all()


def test_readings_of_plants_are_those_of_k1_and_k3() -> None:
    """Unbiased, with the standard deviations that Gaussian policies have; a k1 reading may be negative."""
    plants = make_plants(4000, seed=0)
    plants.samples[:] = 128
    kl = np.full(4000, 0.005)
    readings = plants.read(kl, np.random.default_rng(0))
    k1, k3 = readings[~plants.k3], readings[plants.k3]
    for found, deviation in ((k1, 2 / 0.1), (k3, 1.416575)):  # over the KL; mu is 0.1
        assert found.std() == pytest.approx(0.005 * deviation / math.sqrt(128), rel=0.1)
        assert found.mean() == pytest.approx(0.005, abs=4 * found.std() / math.sqrt(len(found)))
    assert (k1 < 0).mean() > 0.2
    assert (k3 >= 0).all()


def test_figures_of_a_course_by_hand() -> None:
    course = np.array([0.1, 0.9, 1.5, 1.1, 1.0, 0.9, 1.2, 1.1, 2.0, 1.0])
    low = np.full(10, 0.5)
    found = by_plant(np.stack([course, low], axis=1), window=4)
    assert found["settling"].tolist() == [3, 10]
    assert found["never"].tolist() == [0, 1]
    assert found["overshoot"][0] == pytest.approx(1.0)
    assert math.isnan(found["overshoot"][1])  # it never reached the target
    assert found["within"].tolist() == [pytest.approx(0.7), 0]
    # What comes before the first crossing is no overshoot, and from above there may be none at all.
    from_above = np.array([[3.0, 2.0, 0.8, 1.1, 1.0], [3.0, 2.0, 1.8, 1.1, 1.2]]).T
    found = by_plant(from_above, window=4)
    assert found["overshoot"][0] == pytest.approx(0.1)
    assert math.isnan(found["overshoot"][1])


def run(*arguments: str) -> int:
    return cli.main(["controllers", "--plants", "3", *arguments])


def test_every_controller_and_every_setting_of_a_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"│ {kind} │" in shown for kind in KINDS)
    assert "kl_kp = 1.75, kl_ki = 0.1" in shown and "kl_horizon = 10000" in shown
    for kind in ("fixed", "adaptive", "pid"):
        assert all(f"│ {kind}, {phase} │" in shown for phase in PHASES)


def test_a_recipe_and_the_command_line_add_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"kl_controller": "pid", "kl_kp": 4, "beta": 0.5, "kl_coef_min": 0.1, "kl_target": 0.4, "seed": 5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run("--config", str(tmp_path / "r.yaml"), "--kl_ki", "0.3", "--picture", str(tmp_path / "p.png")) == 0
    assert "│ pid, kp 4, ki 0.3, coef_min 0.2, start" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "p.png").stat().st_size > 0


def test_the_figures_are_those_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Recomputed, with the bound relative to each plant's own start."""
    assert run("--kl_controller", "adaptive", "--kl_horizon", "500", "--beta", "2", "--kl_coef_max", "6") == 0
    plants = make_plants(3, seed=0)
    courses = run_courses(
        plants,
        lambda beta, target: make_controller("adaptive", beta, target=target, horizon=500, coef_max=3 * beta),
        seed=1,
    )
    shown = " ".join(capsys.readouterr().out.split())
    for phase, found in phase_figures(courses).items():
        row = shown.split(f"adaptive, horizon 500, coef_max 3, {phase}")[1].split("│")
        assert row[3].strip() == f"{found['within']:.0%}"
        assert row[1].split("/")[0].strip() == f"{found['settling, median']:.0f}"


def test_dpos_beta_is_no_weight_of_the_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("{beta: 0.1, kl_coef: 2, kl_controller: cosine, kl_coef_end: 1}")
    assert run("--config", str(tmp_path / "r.yaml")) == 0
    assert "cosine, coef_end 0.5, start" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kl_kp", "4"], "kl_kp belongs to no controller: give --kl_controller"),
        (["--kl_controller", "pid", "--kl_horizon", "4"], "horizon=4.0 is refused: drop it or use kind 'adaptive'"),
        (["--kl_controller", "linear"], "coef_end"),
        (["--kl_controller", "pid", "--kl_coef_min", "-1"], "kl_coef_min is -1.0: give a number above 0"),
        (["--kl_controller", "pi"], "invalid choice: 'pi'"),
        (["--config", "no.yaml"], "--config no.yaml does not exist: give the path of a recipe"),
        (["--plants", "0"], "--plants is 0: give one or more"),
        (["--picture", "no/such/p.png"], "--picture no/such/p.png: the folder no/such does not exist"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trl_klx.control.plants.simulate", None)  # nothing is simulated before the input is checked
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
