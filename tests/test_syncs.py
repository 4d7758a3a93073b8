"""How often the host waits for the device in an optimizer step: at most four times more than in stock TRL's.

Each wait leaves a GPU without work for as long as the host takes to come back. Counted in our code, TRL's and
transformers', with a log at every step. (PPO: test_syncs_ppo.py.)
"""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import PLAIN
from support.syncs import Syncs, syncs_of
from support.tiny import digit_reward, save_tiny, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import preferences
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict

from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import KLTerm
from trl_klx.trainers.grpo.batch import shuffled
from trl_klx.trainers.session.session import KLSession

pytestmark = pytest.mark.trl

MOST = 4  # per optimizer step
# Where our code waits: once a step, a rollout or a log.
KNOWN = {
    "bad_weight",  # before a rollout: are all weights finite
    "finite_rewards",  # of a rollout
    "of",  # tokens of an exact KL, of a rollout
    "_gather",  # the KL of a step, which moves beta
    "_verdict",  # is the step finite
    "settle",  # a log's metrics
    "take",
    "_rows",  # the rewards of answers that a log shows
}
SETTINGS = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-12, **PLAIN}
PID = {"kl_controller": "pid", "kl_target": 0.05}
GROUPS = {"kl_group_column": "answer", "kl_group_targets": {"0": 0.001, "1": 10.0}, **PID}


def assert_few(ours: Syncs, stock: Syncs) -> None:
    """At most `MOST` more per step than stock has, in places that are known, once a step each; or else says where."""
    steps = 2
    of_us = Counter({place: number for place, number in ours.items() if place.startswith("trl_klx/")})
    of_others = ours - of_us
    unknown = [place for place in of_us if not KNOWN & {*place.replace(":", " ").split()}]
    often = [place for place, number in of_us.items() if number > steps]
    more = (ours.total() - stock.total()) / steps
    lines = [f"{number / steps:+} {place}" for place, number in (ours - stock).items()]
    lines += [f"{-number / steps:+} {place}" for place, number in (stock - ours).items()]
    text = f"{more:+} per step to stock TRL:\n" + "\n".join(sorted(lines))
    assert not unknown, f"not known before: {', '.join(unknown)}\n{text}"
    assert not often, f"more than once a step: {', '.join(often)}\n{text}"
    assert of_others.total() <= stock.total(), f"more than stock has, outside of our code\n{text}"
    assert more <= MOST, text


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def grpo(model: str, folder: Path, trainer: type, config: type, **options: Any) -> Any:
    fields = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    data = {"train_dataset": tiny_dataset(32), "processing_class": tiny_tokenizer()}
    return trainer(model, digit_reward, config(str(folder), **{**fields, **SETTINGS, **options}), **data)


@pytest.fixture(scope="module")
def of_stock(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Syncs]:
    @functools.cache
    def count(**options: Any) -> Syncs:
        return syncs_of(grpo(model_path, tmp_path_factory.mktemp("stock"), GRPOTrainer, GRPOConfig, **options))

    return count


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k1", "kl_placement": "reward", **PID},
        {"kl_estimator": "k3", "kl_controller": "adaptive", "kl_target": 0.05},
        {"num_iterations": 2, "kl_estimator": "k3", "kl_placement": "both"},
        {"kl_estimator": "k3", "kl_placement": "both", **GROUPS},
        {"kl_estimator": "exact"},
        {"num_iterations": 2, "kl_estimator": "exact", "kl_placement": "both", **PID},
    ],
    ids=["k1 reward", "k3 loss", "off-policy", "groups", "exact loss", "exact both"],
)
def test_grpo(
    model_path: str, tmp_path: Path, of_stock: Callable[..., Syncs], options: dict, accumulation: int
) -> None:
    common = {"gradient_accumulation_steps": accumulation}
    common |= {name: options[name] for name in ("num_iterations",) if name in options}
    ours = grpo(model_path, tmp_path, KLXGRPOTrainer, KLXGRPOConfig, **{**common, **options})
    assert_few(syncs_of(ours), of_stock(**common))


def test_a_rollout_is_shuffled_as_trl_does() -> None:
    ids = torch.arange(12).view(4, 3)
    rollout = {"nothing": None, "ids": ids, "texts": ["a", "b", "c", "d"], "scalar": torch.tensor(3.0), "bits": ids > 4}
    found = []
    for shuffle in (shuffled, shuffle_sequence_dict):
        torch.manual_seed(5)
        found.append(shuffle(rollout))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("ids", "scalar", "bits"))
    assert (found[0]["texts"], found[0]["nothing"]) == (found[1]["texts"], None)
    assert not torch.equal(found[0]["ids"], ids)


def dpo(folder: Path, trainer: type, config: type, **options: Any) -> Any:
    fields = {"per_device_train_batch_size": 2, **SETTINGS, **options}
    data = {"train_dataset": preferences(32), "processing_class": tiny_tokenizer()}
    return trainer(tiny_model(), tiny_model(), args=config(str(folder), **fields), **data)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1}], ids=["plain", "exact loss"])
def test_dpo(tmp_path: Path, options: dict, accumulation: int) -> None:
    common = {"gradient_accumulation_steps": accumulation}
    stock = dpo(tmp_path / "stock", DPOTrainer, DPOConfig, **common)
    ours = dpo(tmp_path / "ours", KLXDPOTrainer, KLXDPOConfig, **common, **options)
    assert_few(syncs_of(ours), syncs_of(stock))


@pytest.mark.parametrize("place", ["loss", "measure"])
def test_one_more_is_named(
    model_path: str, tmp_path: Path, of_stock: Callable[..., Syncs], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    holder = KLTerm if place == "loss" else KLSession
    function = getattr(holder, place)

    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        next(value for value in args if isinstance(value, Tensor)).sum().item()
        return function(self, *args, **kwargs)

    monkeypatch.setattr(holder, place, waits)
    ours = grpo(model_path, tmp_path, KLXGRPOTrainer, KLXGRPOConfig)
    found = syncs_of(ours), of_stock(gradient_accumulation_steps=1)
    with pytest.raises(
        AssertionError,
        match=r"not known before: trl_klx/(trainers/grpo/trainer.py:\d+ _measure|kl/term.py:\d+ at_update)",
    ):
        assert_few(*found)
