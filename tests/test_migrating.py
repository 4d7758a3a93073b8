"""docs/migrating.md: each row's gradient, by enumeration through the other library's formula, and our options for it.

The formulas are those of TRL 1.12.0, verl 0.9.1 (`kl_penalty`, `apply_kl_penalty`) and OpenRLHF 0.11.2
(`compute_approx_kl`), written again as functions of the two log-probs, with their clamps.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from support.enumeration import World, all_worlds, relative_error, targets
from support.tiny import Arguments
from torch import Tensor

from trl_klx.kl import kl_credit
from trl_klx.kl.gradients import expected_gradient

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
Formula = Callable[[Tensor, Tensor], Tensor]


def verl(name: str) -> Formula:
    """verl's `kl_penalty`."""

    def value(logp: Tensor, ref: Tensor) -> Tensor:
        if name in ("kl", "k1"):
            return logp - ref
        if name == "abs":
            return (logp - ref).abs()
        if name in ("mse", "k2"):
            return 0.5 * (logp - ref).square()
        gap = torch.clamp(ref - logp, min=-20, max=20)
        return torch.clamp(gap.exp() - gap - 1, min=-10, max=10)

    def straight_through(logp: Tensor, ref: Tensor) -> Tensor:
        slope = 0.5 * (logp - ref).square()
        return slope - slope.detach() + value(logp, ref).detach()

    if not name.endswith("+"):
        return value
    name = name[:-1]
    return straight_through


def openrlhf(name: str, unbiased: bool = False) -> Formula:
    """OpenRLHF's `compute_approx_kl`, on-policy."""

    def value(logp: Tensor, ref: Tensor) -> Tensor:
        ratio = logp - ref
        bounded = ratio.clamp(min=-10)
        formula = {"k1": ratio, "k2": ratio**2 / 2, "k3": (-bounded).exp() - 1 + bounded}[name].clamp(min=-10, max=10)
        slope = (logp - logp.detach()).exp().detach() * ratio**2 / 2
        return formula.detach() + slope - slope.detach() if unbiased else formula

    return value


def trl(name: str, weighted: bool = False) -> Formula:
    """TRL's: k3 in GRPO, times the ratio to the log-probs of the rollout where it is weighted; k1 and k3 in PPO."""

    def value(logp: Tensor, ref: Tensor) -> Tensor:
        k3 = torch.exp(ref - logp) - (ref - logp) - 1
        ratio = torch.exp(logp - logp.detach()) if weighted else 1.0
        return (logp - ref if name == "k1" else k3) * ratio

    return value


# section, a row's first cell: formula, and how a token is charged for it; None in a loss.
ROWS: dict[tuple[str, str], list[tuple[Formula, str | None]]] = {
    ("TRL", "GRPO, `beta` (k3, `use_bias_correction_kl: true`)"): [(trl("k3", weighted=True), None)],
    ("TRL", "GRPO, `use_bias_correction_kl: false`"): [(trl("k3"), None)],
    ("TRL", "PPO, `kl_estimator: k1`"): [(trl("k1"), "return_to_go")],
    ("TRL", "PPO, `kl_estimator: k3`"): [(trl("k3"), "return_to_go")],
    ("TRL", "RLOO, `beta`"): [(trl("k1"), "sequence")],
    **{
        ("verl", f"`use_kl_loss: true`, `kl_loss_type: {cell}"): [(verl(name), None) for name in names]
        for cell, names in {
            "low_var_kl` or `k3` (default)": ["low_var_kl", "k3"],
            "kl` or `k1`": ["kl", "k1"],
            "mse` or `k2`": ["mse", "k2"],
            "k1+`, `k3+` or `low_var_kl+`": ["k1+", "k3+", "low_var_kl+"],
            "abs`": ["abs"],
        }.items()
    },
    **{
        ("verl", f"`use_kl_in_reward: true`, `kl_penalty: {name}`{default}"): [
            (verl(name), "return_to_go"),
            (verl(name), "sequence"),
        ]
        for name, default in {"kl": " (default)", "mse": "", "low_var_kl": "", "abs": ""}.items()
    },
    **{
        ("OpenRLHF", f"no `--algo.kl.use_loss`, `{name}`{default}"): [(openrlhf(name), "return_to_go")]
        for name, default in {"k1": " (default)", "k2": "", "k3": ""}.items()
    },
    **{("OpenRLHF", f"`--algo.kl.use_loss`, `{name}`"): [(openrlhf(name), None)] for name in ("k1", "k2", "k3")},
    ("OpenRLHF", "`--algo.kl.use_loss --algo.kl.unbiased_gradient`, any"): [
        (openrlhf(name, unbiased=True), None) for name in ("k1", "k2", "k3")
    ],
}


def rows() -> Iterator[tuple[str, list[str]]]:
    """(section, cells) of the page's tables that name a gradient."""
    section, header = "", ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif not line.startswith("|"):
            header = ""
        elif not header:
            header = line
        elif "| gradient |" in header and not line.startswith("|---"):
            yield section, cells


TABLE = {(section, cells[0]): cells[1:] for section, cells in rows()}
# Their clamps bind nowhere here: the largest log-ratio is below 10, the largest k3 too. `test_clamps` is about them.
WORLDS = all_worlds()[:2]


def found_gradient(world: World, formula: Formula, credit: str | None) -> Tensor:
    """Expected gradient of the penalty over all answers that the policy samples."""
    logps, ref_logps = world.policy_logps(), world.ref_logps()
    chance = world.sequence_probs(logps).detach()
    per_token = formula(logps, ref_logps) * world.mask_NT
    if credit is not None:
        per_token = kl_credit(per_token, world.mask_NT, credit=credit) * logps * world.mask_NT  # type: ignore[arg-type]
    return world.gradient((chance[:, None] * per_token).sum())


def named_gradients(world: World) -> dict[str, Tensor]:
    known = targets(world)
    pieces = {name: known[name] for name in ("0", "P", "M", "F", "KLseq")}
    return {**pieces, "KLseq - F": known["KLseq"] - known["F"]}


def test_every_row_of_the_page_is_checked() -> None:
    assert set(TABLE) == set(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_their_formula_has_the_gradient_that_the_page_says(row: tuple[str, str]) -> None:
    for world in WORLDS:
        known = named_gradients(world)
        for formula, credit in ROWS[row]:
            found = found_gradient(world, formula, credit)
            fits = [name for name, wanted in known.items() if relative_error(found, wanted, known["P"]) < 1e-9]
            assert (fits or ["biased"]) == [TABLE[row][0]], world.name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_our_options_have_the_same_gradient(row: tuple[str, str]) -> None:
    gradient, ours = TABLE[row]
    if ours == "no counterpart":
        assert gradient == "biased"
        return
    written = re.search(r"`([^`]+)`", ours)
    assert written
    options = yaml.safe_load("{" + written[1] + "}")
    if ours.startswith("refused"):
        with pytest.raises(ValueError, match="allow_biased_kl"):
            Arguments(**options)
        with pytest.warns(UserWarning, match="expected gradient"):
            args = Arguments(**options, allow_biased_kl=True)
    else:
        args = Arguments(**options)
    found = expected_gradient(
        args.kl_estimator, args.kl_placement, args.kl_credit, args.kl_importance_sampling != "none"
    )
    assert found.name == gradient


@pytest.mark.parametrize(
    ("formula", "log_ratio"), [(verl("low_var_kl"), -2.7), (openrlhf("k2"), 4.5), (openrlhf("k3"), -2.7)]
)
def test_clamps_cut_the_slope_off(formula: Formula, log_ratio: float) -> None:
    """What the page and docs/maths.md say of them: k3 beyond ref/pi = 13.6 (a log-ratio of -2.61), k2 beyond 4.47."""
    nearer = log_ratio + (0.1 if log_ratio < 0 else -0.1)
    for value, is_flat in ((log_ratio, True), (nearer, False)):
        logp = torch.tensor(value, requires_grad=True)
        formula(logp, torch.tensor(0.0)).backward()
        assert logp.grad is not None
        assert (float(logp.grad) == 0.0) == is_flat


def test_options_on_our_side_exist() -> None:
    """Every `kl_…` field in the page's last columns, and each of TRL's that it names with a value."""
    from trl_klx import KLXGRPOConfig, KLXPPOConfig

    fields = {*KLXGRPOConfig.__dataclass_fields__, *KLXPPOConfig.__dataclass_fields__}
    ours = [line.strip("|").split("|")[1] for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    named = {name for cell in ours for name in re.findall(r"`(\w+)(?:: [\w.]+)?`", cell) if "_" in name}
    values = {"klseq", "dr_grpo", "KLXGRPOConfig", "KLXPPOConfig"}
    assert len(named) > 10
    assert named - values <= fields
