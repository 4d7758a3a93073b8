"""The two pictures of a run: what reward was bought at which KL, and how the KL was held."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a training machine has no screen
from matplotlib import pyplot as plt

REWARD_VS_KL, KL_CONTROL = "reward_vs_kl.png", "kl_control.png"


def plot_run(history: list[dict], folder: Path, *, target_unit: str = "token", reading: str = "k3") -> list[Path]:
    """Draw the pictures that the logged metrics allow; returns the files written.

    Args:
        history: log entries with `step` and metrics, as `HistoryCallback` writes them.
        folder: where the pictures go.
        target_unit: unit of `kl/target`: "token" or "sequence".
        reading: the estimator that the target is about, for the unit "token".
    """
    train = [entry for entry in history if _finite(entry, "kl/sequence")]
    held_out = [entry for entry in history if _finite(entry, "eval_kl/sequence")]
    written = []
    if any(_finite(entry, "reward") for entry in train):
        written.append(_reward_vs_kl(train, held_out, folder / REWARD_VS_KL))
    if train:
        written.append(_kl_control(train, held_out, folder / KL_CONTROL, target_unit, reading))
    return written


def _finite(entry: dict, name: str) -> bool:
    value = entry.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _column(entries: list[dict], name: str) -> list[float]:
    return [entry[name] if _finite(entry, name) else math.nan for entry in entries]


def _reward_vs_kl(train: list[dict], held_out: list[dict], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    points = axes.scatter(
        [math.sqrt(max(kl, 0.0)) for kl in _column(train, "kl/sequence")],
        _column(train, "reward"),
        c=_column(train, "step"),
        s=16,
        cmap="viridis",
        label="training batches",
    )
    rewarded = [entry for entry in held_out if _finite(entry, "eval_reward")]
    if rewarded:
        kl = [math.sqrt(max(value, 0.0)) for value in _column(rewarded, "eval_kl/sequence")]
        axes.plot(kl, _column(rewarded, "eval_reward"), "o-", color="crimson", markersize=7, label="held out")
    figure.colorbar(points, ax=axes, label="step")
    axes.set_xlabel("square root of the KL to the reference (nats per sequence)")
    axes.set_ylabel("mean reward")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _kl_control(train: list[dict], held_out: list[dict], path: Path, unit: str, reading: str) -> Path:
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6, 5), sharex=True, layout="constrained", height_ratios=(2, 1))
    name = "kl/sequence" if unit == "sequence" else f"kl/{reading}"
    steps, kl = _column(train, "step"), _column(train, name)
    upper.plot(steps, kl, color="tab:blue", label="training batches")
    error = [2 * value for value in _column(train, f"{name}_se")]
    bounds = [[value - e for value, e in zip(kl, error, strict=True)]]
    bounds.append([value + e for value, e in zip(kl, error, strict=True)])
    upper.fill_between(steps, *bounds, alpha=0.2, color="tab:blue", label="± 2 standard errors")
    if held_out:
        upper.plot(_column(held_out, "step"), _column(held_out, f"eval_{name}"), "o", color="crimson", label="held out")
    targets = [entry for entry in train if _finite(entry, "kl/target")]
    if targets:
        upper.step(_column(targets, "step"), _column(targets, "kl/target"), "--", color="black", label="target")
    upper.set_ylabel(f"KL to the reference (nats per {unit})")
    upper.set_ylim(bottom=min(0.0, *(value for value in kl if math.isfinite(value))))
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(steps, _column(train, "kl/coef"), color="tab:orange")
    if all(value > 0 for value in _column(train, "kl/coef")):
        lower.set_yscale("log")
    lower.set_ylabel("beta")
    lower.set_xlabel("step")
    lower.grid(alpha=0.3, which="both")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
