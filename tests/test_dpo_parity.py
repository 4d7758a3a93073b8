"""Stock TRL as an oracle: at kl_coef 0 loss, gradients, metrics and whole runs are `DPOTrainer`'s, to the last bit."""

from pathlib import Path

import pytest
import torch
from support.tiny import drift, save_tiny
from support.tiny_dpo import PROBE, batch, loss_and_gradients, make_trainer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.trl

STOCK = {"trainer": DPOTrainer, "config": DPOConfig}
DIFFERENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES = (*DIFFERENCE_LOSSES, "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
VARIANTS = [
    *({"loss_types": [name]} for name in LOSSES),
    *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
    {"loss_types": ["ipo"], "f_divergence_type": "js_divergence"},
    {"ld_alpha": 0.3},
    {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainers(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("parity")
    made = {
        "stock": make_trainer(model_path, folder / "stock", **STOCK),
        "ours": make_trainer(model_path, folder / "ours"),
        "measured": make_trainer(model_path, folder / "measured", kl_placement="none", **PROBE),
    }
    for trainer in made.values():
        drift(trainer.model)
    return made


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_loss_gradients_and_metrics_equal_stock(trainers: dict, variant: dict) -> None:
    attributes = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    found = {}
    for name, trainer in trainers.items():
        for attribute, value in {**attributes, "label_smoothing": 0.1, **variant}.items():
            setattr(trainer, attribute, value)
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        found[name] = (*loss_and_gradients(trainer, batch(trainer)), dict(trainer._metrics["train"]))
    loss, gradients, metrics = found["stock"]
    assert len(gradients) == len(list(trainers["stock"].model.parameters()))
    assert any(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    for name in ("ours", "measured"):
        assert torch.equal(found[name][0], loss)
        assert found[name][1].keys() == gradients.keys()
        assert all(torch.equal(found[name][1][parameter], gradient) for parameter, gradient in gradients.items())
        assert {metric: found[name][2][metric] for metric in metrics} == metrics


def test_weighted_preferences_equal_stock(model_path: str, tmp_path: Path) -> None:
    """use_weighting is fixed when TRL builds the trainer, so it needs its own."""
    found = []
    for options in (STOCK, {}, {"kl_placement": "none"}):
        trainer = make_trainer(model_path, tmp_path, use_weighting=True, **options)
        drift(trainer.model)
        found.append(loss_and_gradients(trainer, batch(trainer)))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in gradients.items())


def forwards(trainer) -> dict[str, int]:
    """How often policy and reference run in one loss."""
    counts = {"policy": 0, "reference": 0}

    def count(name: str):
        def hook(*_) -> None:
            counts[name] += 1

        return hook

    handles = [
        trainer.model.register_forward_hook(count("policy")),
        trainer.ref_model.register_forward_hook(count("reference")),
    ]
    loss_and_gradients(trainer, batch(trainer))
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("options", [STOCK, {}, {"kl_placement": "none"}, {"kl_coef": 0.1}], ids=str)
def test_one_forward_of_policy_and_reference(model_path: str, tmp_path: Path, options: dict) -> None:
    assert forwards(make_trainer(model_path, tmp_path, **options)) == {"policy": 1, "reference": 1}


def test_training_is_stock_training_with_and_without_a_probe(model_path: str, tmp_path: Path) -> None:
    """With dropout, so that a probe that touched the random state, or left the model in eval mode, would show."""
    runs = {}
    for name, options in {"stock": STOCK, "ours": {}, "probe": PROBE, "logs": {**PROBE, "kl_monitor": ["k1"]}}.items():
        model = AutoModelForCausalLM.from_pretrained(model_path, attention_dropout=0.3, dtype=torch.float32)
        trainer = make_trainer(
            model, tmp_path / name, disable_dropout=False, max_steps=5, gradient_checkpointing=True, **options
        )
        trainer.train()
        runs[name] = trainer
    stock = runs.pop("stock")
    losses = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert len(losses) == 5
    for trainer in runs.values():
        assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == losses
        for mine, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    probes = [entry["kl/exact"] for entry in runs["probe"].state.log_history if "kl/exact" in entry]
    assert len(probes) == 3
    assert probes[0] == pytest.approx(0.0, abs=1e-6)
    assert probes[2] > 1e-3
