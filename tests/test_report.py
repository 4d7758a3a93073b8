"""What a run prints and draws, for each kind of log: with and without evaluation, reward or margin, KL now and then."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from support.tiny import Arguments
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_klx.config import KLArguments
from trl_klx.monitor import plots
from trl_klx.monitor.plots import KL_CONTROL, REWARD_VS_KL, plot_run
from trl_klx.monitor.progress import KLProgressCallback
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.report.outcome import summary_table


def kl(value: float, prefix: str = "") -> dict[str, float]:
    names = ("kl/k3", "kl/k3_se", "kl/exact", "kl/exact_se", "kl/sequence", "kl/sequence_se")
    return {f"{prefix}{name}": value for name in names}


def pairs(value: float, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}": value for name in ("rewards/accuracies", "rewards/margins", "log_ratio/margin")}


GRPO = [
    {"step": 0, "eval_reward": 0.1, "eval_rewards/exact_match/mean": 0.1, **kl(0.0, "eval_")},
    {"step": 1, "reward": 0.2, "rewards/exact_match/mean": 0.2, "kl/coef": 0.1, **kl(0.2)},
    {"step": 2, "reward": 0.3, "rewards/exact_match/mean": 0.3, "kl/coef": 0.2, **kl(0.3)},
    {"step": 2, "eval_reward": 0.4, "eval_rewards/exact_match/mean": 0.4, **kl(0.4, "eval_")},
    {"step": 2, "train_runtime": 7.0},
]
# The probe measured before the first step and after the second: step 2 has no KL.
DPO = [
    {"step": 1, "kl/coef": 0.5, **pairs(0.11), **kl(0.0)},
    {"step": 2, "kl/coef": 0.5, **pairs(0.22)},
    {"step": 3, "kl/coef": 0.5, **pairs(0.33), **kl(0.3)},
    {"step": 4, "kl/coef": 0.5, **pairs(0.44)},
]


def printed(history: list[dict], args: KLArguments) -> dict[str, list[str]]:
    """The table's rows by label, with its title and caption."""
    table = summary_table(history, args)
    rows = {label: cells for label, *cells in zip(*(column.cells for column in table.columns), strict=True)}
    return {**rows, "title": [str(table.title)], "caption": [str(table.caption)]}


def test_a_reference_that_moves_is_no_measure_of_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL to the start has a row of its own, and is what rewards are drawn against."""
    far = {"kl/origin": 4.0, "kl/origin_se": 0.5, "eval_kl/origin": 9.0, "eval_kl/origin_se": 0.25}
    history = [
        {**entry, **{n: v for n, v in far.items() if n.startswith("eval_") == any("eval_" in e for e in entry)}}
        for entry in GRPO
    ]
    assert printed(history, Arguments())["KL to the start, nats per sequence"][:2] == ["9.000 ± 0.250"] * 2
    assert "KL to the start, nats per sequence" not in printed(GRPO, Arguments())
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.setdefault(path.name, figure))
    plot_run(history, tmp_path)
    axes = figures[REWARD_VS_KL].axes[0]
    assert figures[REWARD_VS_KL].get_suptitle() == "Mean reward against the KL to the start"
    assert set(axes.lines[0].get_xdata()) == {3.0}


def test_groups_have_rows_and_targets_of_their_own() -> None:
    groups = {f"eval_kl_groups/{name}/sequence": value for name, value in (("math/easy", 0.25), ("chat", 0.5))}
    history = [{**entry, **groups} if "eval_reward" in entry else entry for entry in GRPO]
    options = {"kl_group_column": "task", "kl_group_targets": {"chat": 0.6}, "kl_target_unit": "sequence"}
    rows = printed(history, Arguments(kl_controller="pid", kl_target=0.4, **options))
    assert rows["  of chat, nats per sequence"] == ["0.500", "0.500", "0.6"]
    assert rows["  of math/easy, nats per sequence"] == ["0.250", "0.250", "0.4"]


def test_rewards_and_kl_on_held_out_prompts() -> None:
    args = Arguments(kl_controller="pid", kl_target=0.4, kl_target_unit="sequence")
    assert printed(GRPO, args) == {
        "title": ["k3 KL in loss, pid beta"],
        "caption": ["mean ± standard error, held-out prompts"],
        "reward exact_match": ["0.100", "0.400", ""],
        "KL, nats per sequence": ["0.000 ± 0.000", "0.400 ± 0.400", "0.4"],
        "KL, nats per token": ["0.000 ± 0.000", "0.400 ± 0.400", ""],
        "beta": ["0.1", "0.2", ""],
        "steps": ["0", "2", ""],
        "seconds": ["", "7", ""],
    }


def test_dpo_without_evaluation_reads_its_probes(tmp_path: Path) -> None:
    args = KLXDPOConfig(str(tmp_path), use_cpu=True, bf16=False, kl_coef=0.5, kl_probe_steps=2)
    assert printed(DPO, args) == {
        "title": ["exact KL in loss, fixed kl_coef"],
        "caption": ["mean ± standard error, training batches; KL of answers to held-out prompts"],
        "pairs ranked right (ties wrong)": ["0.110", "0.440", ""],
        "implicit reward margin": ["0.110", "0.440", ""],
        "log-ratio margin, nats": ["0.110", "0.440", ""],
        "KL, nats per sequence, step 1 and step 3": ["0.000 ± 0.000", "0.300 ± 0.300", ""],
        "KL, nats per token, step 1 and step 3": ["0.000 ± 0.000", "0.300 ± 0.300", ""],
        "kl_coef": ["0.5", "0.5", ""],
    }
    assert set(printed([], args)) == {"title", "caption"}


@pytest.mark.parametrize(
    ("history", "pictures"),
    [
        (GRPO, [REWARD_VS_KL, KL_CONTROL]),
        (DPO, [REWARD_VS_KL, KL_CONTROL]),
        ([{"step": 1, **kl(0.1)}], [KL_CONTROL]),  # neither a reward nor a margin, nor a beta
        ([{"step": 1, "reward": 0.1}, {"step": 2, **pairs(0.1)}], []),  # KL not measured
    ],
)
def test_pictures_that_the_metrics_allow(history: list[dict], pictures: list[str], tmp_path: Path) -> None:
    written = plot_run(history, tmp_path)
    assert written == [tmp_path / name for name in pictures]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures)


def test_pictures_say_what_they_show_and_cover_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A title, an axis with its unit, a marker and not only a colour for each held-out set, the legend beside."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.setdefault(path.name, figure))
    sets = [{**{n.replace("eval_", f"eval_{s}_"): v for n, v in GRPO[3].items()}, "step": 2} for s in ("easy", "hard")]
    plot_run([*GRPO[1:3], *sets], tmp_path, target_unit="sequence")
    titles = {name: figure.get_suptitle() for name, figure in figures.items()}
    assert titles == {
        REWARD_VS_KL: "Mean reward against the KL to the reference",
        KL_CONTROL: "KL to the reference and beta, over the steps",
    }
    for figure in figures.values():
        axes = figure.axes[0]
        assert "nats per sequence" in axes.get_xlabel() + axes.get_ylabel()
        held_out = {line.get_label(): line.get_marker() for line in axes.lines if "held out" in str(line.get_label())}
        assert len(set(held_out.values())) == 2
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert set(held_out) <= {text.get_text() for text in legend.get_texts()}
        assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_a_reward_of_ppo_is_no_evaluation_set() -> None:
    """TRL's PPO logs `eval_objective/rlhf_reward`, which ends like the reward of a set called objective/rlhf."""
    own = {"eval_objective/rlhf_reward": 0.2, "eval_objective/non_score_reward": -0.1}
    history = [{**entry, **own} if "eval_reward" in entry else entry for entry in GRPO]
    assert printed(history, Arguments()) == printed(GRPO, Arguments())


def test_pictures_show_each_group_with_its_target_and_beta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"sequence": 0.25, "token": 0.05, "target": 0.5, "coef": 0.7}
    own = {f"kl_groups/math/easy/{name}": value for name, value in values.items()}
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.setdefault(path.name, figure))
    plot_run([{**entry, **own} for entry in GRPO if "reward" in entry], tmp_path, target_unit="sequence")
    upper, lower = figures[KL_CONTROL].axes
    drawn = {(line.get_label(), line.get_linestyle()): set(line.get_ydata()) for line in (*upper.lines, *lower.lines)}
    assert drawn["math/easy", "-"] == {0.25}
    assert [set(line.get_ydata()) for line in upper.lines[-2:]] == [{0.25}, {0.5}]
    assert set(lower.lines[-1].get_ydata()) == {0.7}


def test_progress_shows_margin_kl_and_coefficient(tmp_path: Path) -> None:
    shown: list = []
    callback = KLProgressCallback(coef_name="kl_coef")
    callback.training_bar = SimpleNamespace(set_postfix=shown.append, write=shown.append)
    state, args = TrainerState(), TrainingArguments(str(tmp_path), use_cpu=True)
    for logs in (DPO[0], DPO[1], {**pairs(0.5, "eval_"), **kl(0.25, "eval_")}, GRPO[1]):
        callback.on_log(args, state, TrainerControl(), logs={k: v for k, v in logs.items() if k != "step"})
    assert shown == [
        {"margin": "0.11", "kl/seq": "0", "kl_coef": "0.5"},
        {"margin": "0.22", "kl_coef": "0.5"},
        "step 0, held out: margin 0.5, kl/seq 0.25",
        {"reward": "0.2", "kl/seq": "0.2", "kl_coef": "0.1"},
    ]
