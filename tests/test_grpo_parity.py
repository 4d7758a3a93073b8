"""Stock TRL as an oracle: with the defaults, loss and every gradient equal `GRPOTrainer`'s, on all loss types."""

import itertools
from pathlib import Path

import pytest
import torch
from support.tiny import digit_reward, save_tiny, tiny_dataset, tiny_tokenizer
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import KLTerm, kl_estimate

pytestmark = pytest.mark.trl

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # off-policy from the second optimizer step on: TRL keeps the sampler's log-probs
    "max_steps": 2,
    "beta": 0.3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPOTrainer, KLXGRPOTrainer]:
    folder = tmp_path_factory.mktemp("parity")
    path = save_tiny(folder / "model")
    common = {"train_dataset": tiny_dataset(), "processing_class": tiny_tokenizer()}
    stock = GRPOTrainer(path, digit_reward, GRPOConfig(str(folder / "stock"), **SETTINGS), **common)
    ours = KLXGRPOTrainer(path, digit_reward, KLXGRPOConfig(str(folder / "ours"), **SETTINGS), **common)
    for trainer in (stock, ours):
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
    return stock, ours


def batch(trainer: GRPOTrainer, *, sampler_shift: float) -> dict[str, Tensor]:
    """A batch as TRL's rollout leaves it: padding on both sides, tool tokens, one row cut short, other samplers."""
    generator = torch.Generator().manual_seed(3)
    rows, prompt, completion = 8, 5, 6
    completion_mask = torch.ones(rows, completion, dtype=torch.long)
    for row in range(rows):
        completion_mask[row, 1 + row % completion :] = 0
    completion_mask[3] = 1
    prompt_mask = torch.ones(rows, prompt, dtype=torch.long)
    prompt_mask[::2, :2] = 0
    tool_mask = torch.ones(rows, completion, dtype=torch.long)
    tool_mask[3, 2:4] = 0
    inputs = {
        "prompt_ids": torch.randint(3, 23, (rows, prompt), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 23, (rows, completion), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(rows, generator=generator),
        "kl_prompts": torch.arange(rows) // 4,
        "num_items_in_batch": (completion_mask * tool_mask).sum() * 4,
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completion)[0]
    noise = torch.randn(logps.shape, generator=generator)
    inputs["old_per_token_logps"] = logps + sampler_shift * noise
    inputs["ref_per_token_logps"] = logps + 0.5 * noise.flip(0)
    return inputs


def loss_and_gradients(trainer: GRPOTrainer, inputs: dict, **attributes: object) -> tuple[Tensor, list[Tensor]]:
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in trainer.model.parameters()]


def use_weights(stock: GRPOTrainer, ours: KLXGRPOTrainer, corrected: bool) -> None:
    stock.args.use_bias_correction_kl = corrected
    ours.kl_term = KLTerm(weight_level="token" if corrected else "none")


@pytest.mark.parametrize("sampler_shift", [0.0, 0.2], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("corrected", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_equal_stock(trainers, loss_type: str, level: str, corrected: bool, sampler_shift: float):
    stock, ours = trainers
    inputs = batch(stock, sampler_shift=sampler_shift)
    use_weights(stock, ours, corrected)
    attributes = {"loss_type": loss_type, "importance_sampling_level": level}
    stock_loss, stock_gradients = loss_and_gradients(stock, inputs, **attributes)
    our_loss, our_gradients = loss_and_gradients(ours, inputs, **attributes)
    if level == "sequence" and corrected:
        # Stock gives the KL the geometric weight of the sequence, which is no importance weight: see
        # test_stock_is_wrong_with_sequence_level_weights. Ours keeps the token weight; without its KL both agree.
        stock_loss, stock_gradients = token_weighted_stock(stock, inputs, loss_type)
    torch.testing.assert_close(our_loss, stock_loss, rtol=1e-5, atol=1e-6)
    for ours_grad, stock_grad in zip(our_gradients, stock_gradients, strict=True):
        torch.testing.assert_close(ours_grad, stock_grad, rtol=1e-4, atol=2e-6)


def token_weighted_stock(stock: GRPOTrainer, inputs: dict, loss_type: str) -> tuple[Tensor, list[Tensor]]:
    """Stock's sequence-level policy loss plus stock's token-level KL."""
    beta = stock.beta
    parts = {}
    for name, level, coef in (("policy", "sequence", 0.0), ("full", "token", beta), ("token policy", "token", 0.0)):
        stock.beta = coef
        parts[name] = loss_and_gradients(stock, inputs, loss_type=loss_type, importance_sampling_level=level)
    stock.beta = beta
    loss = parts["policy"][0] + parts["full"][0] - parts["token policy"][0]
    gradients = [
        p + f - t for p, f, t in zip(parts["policy"][1], parts["full"][1], parts["token policy"][1], strict=True)
    ]
    return loss, gradients


def test_stock_is_wrong_with_sequence_level_weights(trainers) -> None:
    """The difference that the parity test allows for is real, and is stock's geometric weight on the KL."""
    stock, ours = trainers
    inputs = batch(stock, sampler_shift=0.2)
    use_weights(stock, ours, True)
    attributes = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    _, stock_gradients = loss_and_gradients(stock, inputs, **attributes)
    _, our_gradients = loss_and_gradients(ours, inputs, **attributes)
    difference = sum((a - b).norm() ** 2 for a, b in zip(our_gradients, stock_gradients, strict=True)) ** 0.5
    assert difference / sum(b.norm() ** 2 for b in stock_gradients) ** 0.5 > 0.02


def test_masked_positions_never_count(trainers) -> None:
    """Garbage log-probs, NaN and infinities on padding and tool tokens change neither loss nor any gradient."""
    stock, ours = trainers
    use_weights(stock, ours, True)
    attributes = {"loss_type": "dapo", "importance_sampling_level": "token"}
    clean = batch(ours, sampler_shift=0.1)
    dirty = {name: value.clone() for name, value in clean.items()}
    hidden = (clean["completion_mask"] * clean["tool_mask"]) == 0
    assert hidden.sum() > 10
    for garbage in (1e4, -1e4, torch.nan, torch.inf):
        dirty["ref_per_token_logps"][hidden] = garbage
        ours._metrics["train"].clear()
        loss, gradients = loss_and_gradients(ours, dirty, **attributes)
        wanted_loss, wanted = loss_and_gradients(ours, clean, **attributes)
        torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=0)
        for found, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_training_is_stock_training_step_by_step(tmp_path: Path) -> None:
    """Two optimizer steps of real training: the same metrics and final weights as stock."""
    path = save_tiny(tmp_path / "model")
    runs = {}
    for cls, config in ((GRPOTrainer, GRPOConfig), (KLXGRPOTrainer, KLXGRPOConfig)):
        settings = {**SETTINGS, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True}
        trainer = cls(
            path,
            digit_reward,
            config(str(tmp_path / cls.__name__), **settings),
            train_dataset=tiny_dataset(),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        runs[cls] = trainer
    stock, ours = runs[GRPOTrainer], runs[KLXGRPOTrainer]
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours.state.log_history[:4], stock.state.log_history[:4], strict=True):
        assert set(theirs) <= set(mine)
        for name in set(theirs) - {"kl", "step_time"}:  # stock's kl is the weighted one
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("weight", ["token", "none"])
def test_logged_kl_is_that_of_the_policy(trainers, weight: str) -> None:
    """Off-policy the token's weight makes it so, as in stock with its correction; whatever weight the loss takes."""
    _, ours = trainers
    inputs = batch(ours, sampler_shift=0.3)
    ours.kl_term = KLTerm(weight_level=weight)  # type: ignore[arg-type]
    ours.kl._window["train"] = []
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    loss_and_gradients(ours, inputs, loss_type="dapo", importance_sampling_level="token")
    with torch.no_grad():
        logps = ours._get_per_token_logps_and_entropies(ours.model, ids, attention, 6)[0]
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    weights = (logps - inputs["old_per_token_logps"]).exp()
    wanted = (weights * kl_estimate(logps, inputs["ref_per_token_logps"], "k3"))[mask].mean()
    ours.kl.end_step()
    assert ours.kl.metrics("train")["kl"] == pytest.approx(float(wanted), rel=1e-5)


def test_every_loss_type_of_trl_is_covered() -> None:
    """If TRL gains a loss type, this fails and the aggregation has to learn it."""
    text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = set(itertools.chain.from_iterable(part.split("`") for part in text.replace("'", "`").split("\n")))
    missing = {name for name in named if name.isidentifier() and name.endswith(("grpo", "po"))} - set(LOSS_TYPES)
    assert not missing, f"loss types without a parity test: {missing}"
