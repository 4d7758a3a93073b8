"""Draws what stale answers make of a KL's gradient, and what weights cost: enumerated exactly on small policies.

python scripts/plot_staleness.py --picture docs/images/staleness.png

Over KL(policy || sampler) in nats per answer: the error of the expected gradient, the variance of one answer's gradient
over that on the policy's own answers, and the effective share of tokens by their weights (`kl/ess`), beside exp(-2 KL).
The policies are those of `trl-klx explain`: see `trl_klx.kl.variance`.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from trl_klx.kl import KLTerm, effective_sample_size
from trl_klx.kl.importance import WeightLevel, weight_products
from trl_klx.kl.variance import DISTANCES, sampler_behind, stale, world

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BEHIND = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
TERMS = {
    "k1 in reward, token": KLTerm("k1", "reward"),
    "k1 in reward, prefix": KLTerm("k1", "reward", weight_level="prefix"),
    "exact in both, token": KLTerm("exact", "both"),
    "exact in both, prefix": KLTerm("exact", "both", weight_level="prefix"),
    "exact in both, prefix to 1.5": KLTerm("exact", "both", weight_level="prefix", weight_cap=1.5),
}
LEVELS: tuple[WeightLevel, ...] = ("token", "prefix", "sequence")

Lines = dict[str, list[float]]


def effective_share(level: WeightLevel, behind: float) -> float:
    """Of all answers of the sampler: that of a batch in which each is as often as it is likely."""
    here = world(DISTANCES[0.10])
    sampler = sampler_behind(here, behind)
    ratios = (here.logps(here.policy) - here.logps(sampler)).exp()
    weights = weight_products(ratios, torch.ones_like(ratios), level=level)
    counts = (here.probs(sampler) * 100_000).round().long()
    batch = weights.repeat_interleave(counts, dim=0)
    return float(effective_sample_size(batch, torch.ones_like(batch)))


def curves() -> tuple[Lines, Lines, Lines]:
    """Error, variance and effective share at `BEHIND`."""
    found = {name: [stale(term, behind) for behind in BEHIND] for name, term in TERMS.items()}
    errors = {name: [one.error for one in line] for name, line in found.items()}
    variances = {name: [one.variance for one in line] for name, line in found.items()}
    return errors, variances, {level: [effective_share(level, behind) for behind in BEHIND] for level in LEVELS}


def draw(panels: tuple[Lines, Lines, Lines], picture: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    titles = ("error of the gradient, % of KLseq", "variance, on the policy's own answers = 1", "effective share (ESS)")
    for axis, title, lines, factor in zip(axes, titles, panels, (100, 1, 1), strict=True):
        for name, values in lines.items():
            color = "C0" if name.startswith("k1") else "C1" if name.startswith("exact") else None
            style = "--" if name.endswith("token") and color else ":" if name.endswith("1.5") else "-"
            axis.plot(BEHIND, [factor * value for value in values], style, color=color, label=name)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("KL(policy || sampler), nats per answer")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[2].plot(BEHIND, torch.tensor(BEHIND).mul(-2).exp(), "k:", linewidth=1, label="exp(-2 KL)")
    axes[2].set_ylim(0, 1)
    axes[0].legend(fontsize="small")
    axes[2].legend(fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> tuple[Lines, Lines, Lines]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/staleness.png"))
    args = parser.parse_args(arguments)
    panels = curves()
    draw(panels, args.picture)
    return panels


if __name__ == "__main__":
    main()
