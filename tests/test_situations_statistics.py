"""Situations of users: numbers in the logs, tables and cards of a run, and a KL that something outside changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fault_tools import make
from tiny import Arguments, tiny_model
from torch import Tensor

from trl_klx.monitor.history import HistoryCallback, read_history
from trl_klx.trainers.kl_control import KLControl
from trl_klx.trainers.trl_compat import TRL_HAS_PPO

needs_ppo = pytest.mark.skipif(not TRL_HAS_PPO, reason="TRL removed PPO in 1.13")
ALL = ["grpo", "dpo", pytest.param("ppo", marks=needs_ppo)]


# Standard errors

WINDOWS, PROMPTS, ANSWERS, TOKENS = 1000, 128, 4, 6


def window(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """KL per token and mask (P, A, T) of a rollout, with a level per prompt and per answer, and prompt numbers."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    level = 0.6 * uniform(PROMPTS, 1, 1) + 0.4 * uniform(PROMPTS, ANSWERS, 1)
    noise = 0.3 * torch.randn(PROMPTS, ANSWERS, TOKENS, generator=generator)
    lengths = 1 + (4 * level + 2 * uniform(PROMPTS, ANSWERS, 1)).long()
    mask = torch.arange(TOKENS) < lengths
    numbers = torch.randint(2**50, (PROMPTS,), generator=generator).repeat_interleave(ANSWERS)
    return (level + noise).flatten(0, 1), mask.flatten(0, 1), numbers


def logged_window(kl: KLControl, generator: torch.Generator, iterations: int, parts: int) -> dict[str, float]:
    """What is logged of one rollout whose shuffled answers are read in `parts` steps, and that `iterations` times."""
    values, mask, numbers = window(generator)
    for iteration in range(iterations):
        for rows in torch.randperm(len(values), generator=generator).chunk(parts):
            measured = (1 + 0.1 * iteration) * values[rows]
            kl.measure("train", dict.fromkeys(kl.names, measured), mask[rows], numbers[rows])
            kl.step()
    return kl.metrics("train")


@pytest.mark.situation("reads error bars where one rollout feeds several steps (iterations, shuffled answers)", "right")
@pytest.mark.parametrize(("iterations", "parts"), [(2, 1), (4, 1), (1, 4), (1, 8)])
def test_95_percent_intervals_hold_the_truth(iterations: int, parts: int) -> None:
    kl = KLControl(Arguments(kl_estimator="k1", kl_health=False), Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(0)
    found = [logged_window(kl, generator, iterations, parts) for _ in range(WINDOWS)]
    for name in ("kl", "kl/sequence"):
        values, errors = (torch.tensor([window[key] for window in found]) for key in (name, f"{name}_se"))
        hits = ((values - values.mean()).abs() < 1.96 * errors).float().mean()
        assert 0.93 < hits < 0.97, (name, hits)


def errors_of(folder: Path, algorithm: str, steps: int, **changes: Any) -> dict[str, float]:
    """The standard errors of one log of a whole run, at learning rate 0 and with another model as reference."""
    same: dict[str, Any] = {"max_steps": steps, "logging_steps": steps, "learning_rate": 0.0, "save_strategy": "no"}
    same |= {"ref_model": tiny_model(1), "callbacks": [HistoryCallback()], **changes}
    if algorithm == "ppo":
        import ppo_tools

        trainer = ppo_tools.trainer(folder, **same)  # the rollout function decides the answers
    else:
        trainer = make(algorithm, folder, kl_controller="fixed", kl_target=None, **same)
    trainer.train()
    first = read_history(folder / "metrics.jsonl")[0]
    return {name: value for name, value in first.items() if name.endswith("_se")}


@pytest.mark.situation("logs once in several passes over the same prompts or pairs", "right")
@pytest.mark.parametrize(
    ("algorithm", "once", "again"),
    [
        ("grpo", {"steps": 1}, {"steps": 4, "num_iterations": 4}),
        ("dpo", {"steps": 4, "kl_probe_steps": 9}, {"steps": 8, "kl_probe_steps": 9}),
        pytest.param("ppo", {"steps": 2}, {"steps": 6}, marks=needs_ppo),
    ],
)
def test_what_is_read_again_makes_no_error_smaller(algorithm: str, once: dict, again: dict, tmp_path: Path) -> None:
    one, more = (errors_of(tmp_path / str(number), algorithm, **run) for number, run in enumerate((once, again)))
    assert one["kl_se"] > 0 or one["kl/data_exact_se"] > 0
    assert more == pytest.approx(one, rel=1e-5)


@pytest.mark.situation("draws a prompt again in another rollout before the next log", "right")
def test_a_prompt_is_known_again(tmp_path: Path) -> None:
    """By its content, pictures too; not where an environment makes it, for which rows say nothing."""
    from trl_klx.trainers.prompt_numbers import RolloutPrompts

    numbered = RolloutPrompts(Accelerator(cpu=True))
    rows = [{"prompt": "1+1=", "image": picture} for picture in (b"a", b"a", b"b", b"b")]
    first = numbered.numbers(rows, 2, made_by_environments=False)
    again = numbered.numbers(rows[::-1], 2, made_by_environments=False)
    assert len(first.unique()) == 2 and first.tolist() == again.tolist()[::-1]
    made = [numbered.numbers(rows, 2, made_by_environments=True).tolist() for _ in range(2)]
    assert made == [[0, 0, 1, 1], [2, 2, 3, 3]]
