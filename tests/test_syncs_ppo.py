"""How often the host waits for the device in PPO: once per optimizer step, and a few times per rollout."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.device import PLAIN
from support.ppo_tools import classifier, trainer
from support.syncs import syncs_of
from support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

from trl_klx.trainers.ppo.trainer import KLXPPOTrainer
from trl_klx.trainers.seams import TRL_HAS_PPO

pytestmark = pytest.mark.trl
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "response_length": 6,
    "learning_rate": 1e-12,
    "num_sample_generations": 0,
    "logging_steps": 1,
}
# Where our code waits, once a rollout.
OF_ROLLOUT = {
    "bad_weight",  # are all weights finite
    "generate",  # the answers
    "_finite",  # do all answers have a reward
    "without_unscored",  # tokens of the answers that have one
    "_tokens",  # tokens of each minibatch, on all processes
    "_gather",  # the KL, which moves beta
    "settle",  # a log's metrics
    "take",
}
OF_STEP = "_verdict"  # is the step finite; and once a rollout before the first


def own(counted: Counter[str]) -> dict[str, float]:
    """Waits of our code per rollout, by the function's name."""
    found = Counter[str]()
    for place, number in counted.items():
        if place.startswith("trl_klx/"):
            found[place.split()[1]] += number
    return {name: number / 2 for name, number in found.items()}


@pytest.mark.parametrize("updates", [{}, {"num_mini_batches": 2, "num_ppo_epochs": 2}], ids=["1 step", "4 steps"])
@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k1", "kl_placement": "reward"},
        {"kl_estimator": "k3", "kl_placement": "loss", "kl_controller": "adaptive", "kl_target": 0.05},
        {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.05},
    ],
    ids=["k1 reward", "k3 loss", "exact both"],
)
def test_ppo(tmp_path: Path, options: dict, updates: dict) -> None:
    made = trainer(tmp_path, given=False, max_steps=3, max_grad_norm=1.0, **{**SETTINGS, **updates, **options})
    counted = syncs_of(made)
    found, steps = own(counted), updates.get("num_mini_batches", 1) * updates.get("num_ppo_epochs", 1)
    lines = "\n".join(sorted(counted))
    assert found.pop(OF_STEP) == steps + 1
    assert set(found) <= OF_ROLLOUT, f"not known before: {set(found) - OF_ROLLOUT}, among\n{lines}"
    assert max(found.values()) == 1, f"more than once a rollout: {found}"


@pytest.mark.skipif(not TRL_HAS_PPO, reason="stock PPO is in TRL 1.12")
def test_fewer_than_stock(tmp_path: Path) -> None:
    """Without the generation, which stock does in another way."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    ids = [tiny_tokenizer()(text=prompt)["input_ids"] for prompt in tiny_dataset(32)["prompt"]]
    data = Dataset.from_dict({"input_ids": ids})
    fields: dict[str, Any] = {**SETTINGS, "num_mini_batches": 2, "num_ppo_epochs": 2, "total_episodes": 24, **PLAIN}
    models = tiny_model(), tiny_model(1), classifier(7), data, classifier()
    stock = PPOTrainer(PPOConfig(str(tmp_path), **fields), tiny_tokenizer(), *models, eval_dataset=data)
    of_stock = sum(number for place, number in syncs_of(stock).items() if place.startswith("trl/"))
    ours = trainer(tmp_path, given=False, max_steps=3, **{**SETTINGS, "num_mini_batches": 2, "num_ppo_epochs": 2})
    assert 2 * sum(own(syncs_of(ours)).values()) < of_stock


def test_one_more_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = KLXPPOTrainer._loss

    def waits(self: KLXPPOTrainer, *args: Any, **kwargs: Any) -> Any:
        output = loss(self, *args, **kwargs)
        output.loss.item()
        return output

    monkeypatch.setattr(KLXPPOTrainer, "_loss", waits)
    with pytest.raises(AssertionError, match=r"not known before: \{'_accumulate'\}"):
        test_ppo(tmp_path, {"kl_estimator": "k3", "kl_placement": "loss"}, {})
