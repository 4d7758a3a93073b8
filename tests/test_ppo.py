"""KLXPPOTrainer on real training steps, each test on something that TRL's own PPO gets wrong or that KL options add."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.device import DEVICE
from support.ppo_tools import ANSWERS, classifier, first_rollout, moved, settings, trainer, weights
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from trl_klx.kl import KLTerm, kl_credit, kl_estimate, masked_mean
from trl_klx.kl.exact import exact_kl

pytestmark = pytest.mark.trl


def dense(model: Any, rollout: Any, temperature: float = 1.0) -> Tensor:
    """(B, T, V) log-probs of a causal language model on the answers, by plain transformers."""
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "position_ids": positions}
    logits = model(**inputs).logits[:, -rollout.length - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def chosen(logps_BTV: Tensor, rollout: Any) -> Tensor:
    ids = rollout.input_ids[:, -rollout.length :]
    return logps_BTV.gather(-1, ids[..., None]).squeeze(-1)


def gradient_of(policy: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(policy.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_step_is_minus_gradient(step: dict[str, Tensor], gradient: dict[str, Tensor], rate: float = 0.1) -> None:
    size = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    assert size > 1e-4
    for name, delta in step.items():
        torch.testing.assert_close(delta, -rate * gradient[name], rtol=1e-3, atol=2e-6 * max(size, 1.0), msg=name)


# What the base gets wrong -------------------------------------------------------------------------------------------


class CountSteps(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.count, step = 0, optimizer.optimizer.step

        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return step(*arguments, **named)

        optimizer.optimizer.step = counted


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_optimizer_steps(tmp_path: Path, mini_batches: int, accumulation: int) -> None:
    """num_mini_batches steps per epoch, whatever the accumulation; TRL's takes one."""
    counter = CountSteps()
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trainer(tmp_path, num_mini_batches=mini_batches, num_ppo_epochs=3, max_steps=2, callbacks=[counter], **sizes)
    made.train()
    assert counter.count == 2 * 3 * mini_batches
    assert made.state.global_step == 2  # a step is a rollout
    assert made.state.log_history[0]["episode"] == 8


def test_accumulation_does_not_change_the_update(tmp_path: Path) -> None:
    """Answers of uneven length in micro-batches: their tokens weigh the same as in one batch."""
    after = []
    for size in (8, 4, 2, 1):
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        made = trainer(tmp_path, value_model=classifier(), kl_estimator="exact", kl_placement="both", **accumulation)
        made.train()
        after.append(weights(made.model))
    for other in after[1:]:
        for name, value in after[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_three_answers_in_micro_batches_of_two(tmp_path: Path) -> None:
    """A minibatch that is not a multiple of the micro-batch: 12 answers in 2 minibatches of 6, micro-batches 4 and
    2."""
    counter = CountSteps()
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_mini_batches": 2}
    trainer(tmp_path, callbacks=[counter], **sizes).train()
    assert counter.count == 2


def test_score_comes_with_the_last_real_token(tmp_path: Path) -> None:
    """Discounted from the answer's last token, end of sequence included; TRL pays it one token later."""
    made = trainer(tmp_path, gamma=0.5, lam=1.0, whiten_advantages=False, kl_coef=0.0)
    rollout = first_rollout(made)
    advantages = made._shape(rollout).advantages
    for row, answer in enumerate(ANSWERS):
        last = len(answer) - 1
        expected = [0.5 ** (last - t) * float(rollout.scores[row]) for t in range(len(answer))]
        torch.testing.assert_close(advantages[row, : last + 1], torch.tensor(expected))
        assert not advantages[row, last + 1 :].any()


def test_statistics_are_over_real_tokens(tmp_path: Path) -> None:
    """Padding is two fifths of this batch: entropy, KL and ratio ignore it."""
    made = trainer(tmp_path, ref_model=tiny_model(1), temperature=0.7, learning_rate=0.0, num_ppo_epochs=2)
    rollout = first_rollout(made)
    with torch.no_grad():
        policy, reference = (dense(m, rollout, 0.7) for m in (made.model.policy, tiny_model(1)))
    made.train()
    logged = made.state.log_history[0]
    mask = rollout.mask
    log_ratio = chosen(policy, rollout) - chosen(reference, rollout)
    entropy = -(policy.exp() * policy).sum(-1)
    assert mask.float().mean() < 0.65
    expected = {
        "policy/entropy_avg": masked_mean(entropy, mask),
        "kl/k1": masked_mean(log_ratio, mask),
        "objective/kl": (log_ratio * mask).sum() / len(mask),
        "objective/entropy": -(chosen(policy, rollout) * mask).sum() / len(mask),
        "objective/non_score_reward": -0.05 * (log_ratio * mask).sum() / len(mask),
        "val/ratio": torch.tensor(1.0),
        "policy/approxkl_avg": torch.tensor(0.0),
        "completions/mean_length": torch.tensor(sum(map(len, ANSWERS)) / len(ANSWERS)),
        "completions/clipped_ratio": torch.tensor(1 / 8),
        "objective/rlhf_reward": rollout.scores.mean() - 0.05 * (log_ratio * mask).sum() / len(mask),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_log_probs_are_scored_at_the_sampling_temperature(tmp_path: Path) -> None:
    made = trainer(tmp_path, temperature=0.5, ref_model=tiny_model(1))
    rollout = first_rollout(made)
    with torch.no_grad():
        for model, scored in ((made.model.policy, rollout.old_logps), (tiny_model(1), rollout.ref_logps)):
            expected = torch.where(rollout.mask, chosen(dense(model, rollout, 0.5), rollout), 0.0)
            torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_gradients_are_clipped(tmp_path: Path, mini_batches: int) -> None:
    """Every optimizer step, those inside a rollout included, moves by at most the learning rate times the bound."""
    made = trainer(tmp_path, max_grad_norm=1e-3, num_mini_batches=mini_batches, learning_rate=1.0)
    before = weights(made.model)
    made.train()
    step = moved(before, weights(made.model))
    norm = math.sqrt(sum(float(delta.square().sum()) for delta in step.values()))
    assert 0 < norm <= mini_batches * 1.001e-3
    assert made.state.log_history[0]["grad_norm"] > 1e-2


class Watch(TrainerCallback):
    """What the first linear layer of policy and value model puts out while it is trained, and how."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.dtypes: set[torch.dtype] = set()
        self.checkpointed: set[bool] = set()
        for part in (model.policy, model.value_model):
            layer = part.base_model.layers[0]

            def see(module: Any, inputs: Any, output: Any, layer: Any = layer) -> None:
                self.dtypes.add(output.dtype)
                if torch.is_grad_enabled():
                    self.checkpointed.add(layer.gradient_checkpointing)

            layer.self_attn.q_proj.register_forward_hook(see)


def test_bf16_is_honoured(tmp_path: Path) -> None:
    watch = Watch()
    options = {"kl_estimator": "exact", "kl_placement": "both", "num_ppo_epochs": 2, "given": False}
    made = trainer(tmp_path, bf16=True, callbacks=[watch], **options)
    made.train()
    assert watch.dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())
    assert made.state.log_history[0]["kl/exact"] == pytest.approx(0.0, abs=1e-5)


def test_gradient_checkpointing_is_honoured_and_changes_nothing(tmp_path: Path) -> None:
    after = []
    for wanted in (False, True):
        watch = Watch()
        made = trainer(tmp_path, gradient_checkpointing=wanted, callbacks=[watch], value_model=classifier())
        made.train()
        assert watch.checkpointed == {wanted}
        assert made.model.policy.is_gradient_checkpointing == made.model.value_model.is_gradient_checkpointing == wanted
        after.append(weights(made.model))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, msg=name)


def test_a_checkpoint_holds_policy_and_value_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, value_model=classifier())
    made.train()
    folder = tmp_path / "checkpoint-1"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    value = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    for part, loaded in ((made.model.policy, saved), (made.model.value_model, value)):
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)
    made.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert not (tmp_path / "final" / "value_model").exists()  # what is shipped is the policy


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resuming_continues_the_same_run(tmp_path: Path, lora: bool) -> None:
    """Two rollouts, a checkpoint and two more are bit for bit four: weights, optimizer, sampling, data order, beta."""
    options = {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.05}
    options |= {
        "max_steps": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }
    options |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "kl_coef": 0.5}
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)

    def make(folder: Path) -> Any:
        torch.manual_seed(5)
        peft = {"peft_config": adapter} if lora else {}
        return trainer(folder, given=False, model=tiny_model(tied=True), **options, **peft)

    whole, again = make(tmp_path), make(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(again.model.get_parameter(name), value, rtol=0, atol=0, msg=name)
    assert again.kl.coef == whole.kl.coef != 0.5
    for old, new in zip(whole.state.log_history[2:4], again.state.log_history[2:4], strict=True):
        timing = ("runtime", "per_second")
        for name in (name for name in old if not name.endswith(timing)):
            assert new[name] == pytest.approx(old[name], rel=1e-6, abs=1e-7), name


def test_a_checkpoint_without_value_model_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    import shutil

    shutil.rmtree(tmp_path / "checkpoint-1" / "value_model")
    with pytest.raises(ValueError, match="has no value_model"):
        trainer(tmp_path / "b", max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_evaluation_samples_rewards_and_measures(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3}
    made = trainer(tmp_path, given=False, eval_dataset=tiny_dataset(7), max_steps=2, **changes)
    before = made.processing_class.padding_side
    made.train()
    found = [entry for entry in made.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in found] == [0, 1, 2]
    assert found[0]["eval_kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert found[2]["eval_kl/sequence"] > 1e-4
    assert {"eval_rewards/digit_reward/mean", "eval_completions/mean_length", "eval_kl/k1_se"} <= found[0].keys()
    assert made.processing_class.padding_side == before


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_completions/mean_length"}
    made = trainer(tmp_path, eval_dataset=tiny_dataset(8), **changes)  # given answers: the first evaluation stays best
    made.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    for name, parameter in made.model.policy.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=0, atol=0, msg=name)


def test_entropy_bonus_is_the_gradient_of_the_entropy(tmp_path: Path) -> None:
    """The only term left: no reward, no KL, no value loss."""
    model = tiny_model()
    options = {"entropy_coef": 0.3, "kl_coef": 0.0, "vf_coef": 0.0, "whiten_advantages": False}
    made = trainer(tmp_path, model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), **options)
    rollout = first_rollout(made)
    logps = dense(model, rollout)
    gradient = gradient_of(model, -0.3 * masked_mean(-(logps.exp() * logps).sum(-1), rollout.mask))
    before = weights(model)
    made.train()
    assert_step_is_minus_gradient(moved(before, weights(model)), gradient)


# KL ------------------------------------------------------------------------------------------------------------------

COMBINATIONS = [
    ("k1", "reward", "return_to_go", "none"),
    ("k1", "reward", "immediate", "none"),
    ("k1", "reward", "sequence", "none"),
    ("k2", "loss", "return_to_go", "none"),
    ("k2", "loss", "return_to_go", "token"),
    ("k3", "loss", "return_to_go", "token"),
    ("k3", "loss", "return_to_go", "none"),
    ("k3", "both", "return_to_go", "token"),
    ("k3", "both", "return_to_go", "none"),
    ("exact", "loss", "return_to_go", "none"),
    ("exact", "both", "return_to_go", "token"),
    ("exact", "both", "return_to_go", "prefix"),
]


@pytest.mark.parametrize("whiten", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize(("estimator", "placement", "credit", "weight"), COMBINATIONS)
def test_update_is_the_gradient_of_the_objective(
    tmp_path: Path, estimator: str, placement: str, credit: str, weight: str, whiten: bool
) -> None:
    """Without a value model, gamma = lambda = 1: score less beta times the credit of the oracle, plus the loss.

    Whitened, the whole is divided by one number and the advantages are centred. What the updates charge is not among
    the advantages.
    """
    model, reference, beta = tiny_model(), tiny_model(1), 0.4
    options = {"kl_estimator": estimator, "kl_placement": placement, "kl_credit": credit, "kl_coef": beta, "lam": 1.0}
    if placement != "reward":
        options["kl_importance_sampling"] = weight
    made = trainer(tmp_path, model=model, ref_model=tiny_model(1), whiten_advantages=whiten, temperature=0.8, **options)
    rollout = first_rollout(made)
    mask, policy, ref = rollout.mask, dense(model, rollout, 0.8), dense(reference, rollout, 0.8).detach()
    logps, ref_logps, exact = chosen(policy, rollout), chosen(ref, rollout), exact_kl(policy, ref)
    term = KLTerm(estimator, placement, credit, weight)  # type: ignore[arg-type]
    advantages = rollout.scores[:, None] * mask
    charged = torch.zeros_like(logps)
    if term.in_reward:
        charged = term.credit(logps, ref_logps, mask, exact=exact)
        if credit != "return_to_go" or term.reward_at_update:  # charged directly, less the mean of the other answers
            baseline = [[_others(charged, mask, row, t) for t in range(mask.size(1))] for row in range(len(mask))]
            charged = charged - torch.tensor(baseline, device=DEVICE)
    if not term.reward_at_update:
        advantages = advantages - beta * charged * mask
    scale = 1.0
    if whiten:
        values = advantages[mask]
        scale = float(values.std())
        advantages = (advantages - values.mean()) / scale
    loss = -(advantages.detach() * logps)
    if term.reward_at_update:
        loss = loss + beta / scale * charged.detach() * logps
    if term.in_loss:
        loss = loss + beta / scale * term.loss(logps, ref_logps, mask, exact=exact)
    gradient = gradient_of(model, masked_mean(loss, mask))
    before = weights(model)
    made.train()
    assert_step_is_minus_gradient(moved(before, weights(model)), gradient)


def _others(values: Tensor, mask: Tensor, row: int, t: int) -> float:
    rows = [other for other in range(len(mask)) if other != row and mask[other, t]]
    return float(values[rows, t].detach().mean()) if rows and mask[row, t] else 0.0


def test_whitened_rewards_scale_the_kl_loss_alike(tmp_path: Path) -> None:
    """Rewards are divided by their standard deviation, and so is what competes with them."""
    options = {"kl_estimator": "k2", "kl_placement": "loss", "kl_coef": 0.5, "whiten_advantages": False}
    made = trainer(tmp_path, ref_model=tiny_model(1), whiten_rewards=True, lam=1.0, **options)
    rollout = first_rollout(made)
    experience = made._shape(rollout)
    rewards, _ = made._shape_rewards(rollout)
    std = rewards[rollout.mask].std()
    torch.testing.assert_close(experience.scale, 1 / std, rtol=1e-4, atol=0)
    torch.testing.assert_close(experience.advantages[:, 0], rollout.scores / std, rtol=1e-4, atol=1e-6)


def test_off_policy_epochs_weight_the_kl_loss(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, ref_model=tiny_model(1), kl_estimator="k3", kl_placement="loss", num_ppo_epochs=4, learning_rate=0.02
    )
    made.train()
    logged = made.state.log_history[0]
    assert logged["kl/weight_max"] > 1.001
    assert 0.5 < logged["kl/ess"] < 1.0
    assert logged["kl/loss"] > 0


def test_the_measured_kl_is_that_of_the_fresh_answers(tmp_path: Path) -> None:
    """All estimators, of the policy before the step's updates; exact against the dense sum."""
    model = tiny_model()
    made = trainer(tmp_path, model=model, ref_model=tiny_model(1), kl_monitor=["k1", "k2", "k3", "exact"])
    rollout = first_rollout(made)
    with torch.no_grad():
        policy, reference = dense(model, rollout), dense(tiny_model(1), rollout)
    made.train()
    logged, mask = made.state.log_history[0], rollout.mask
    for name in ("k1", "k2", "k3"):
        values = kl_estimate(chosen(policy, rollout), chosen(reference, rollout), name)  # type: ignore[arg-type]
        assert logged[f"kl/{name}"] == pytest.approx(float(masked_mean(values, mask)), rel=1e-4)
    exact = exact_kl(policy, reference) * mask
    assert logged["kl/exact"] == pytest.approx(float(masked_mean(exact, mask)), rel=1e-4)
    assert logged["kl/sequence"] == pytest.approx(float(exact.sum() / len(mask)), rel=1e-4)


@pytest.mark.parametrize("kind", ["adaptive", "pid", "linear", "cosine"])
def test_controllers_move_beta_once_per_rollout(tmp_path: Path, kind: str) -> None:
    extra = {"kl_coef_end": 0.01} if kind in ("linear", "cosine") else {"kl_target": 0.01}
    extra |= {"kl_horizon": 20.0} if kind == "adaptive" else {}
    made = trainer(tmp_path, ref_model=tiny_model(1), kl_controller=kind, max_steps=4, num_ppo_epochs=2, **extra)
    made.train()
    betas = [entry["kl/coef"] for entry in made.state.log_history if "kl/coef" in entry]
    assert len(betas) == 4
    assert betas[0] == 0.05
    rises = kind in ("adaptive", "pid")  # the KL is far above its target
    assert betas == sorted(betas, reverse=not rises)
    assert len(set(betas)) == 4
    assert made.kl_coef == made.kl.coef


def test_budget_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path, ref_model=tiny_model(1), kl_budget=0.01, max_steps=5, save_strategy="steps", save_steps=50)
    made.train()
    assert made.state.global_step == 1
    assert json.loads((tmp_path / "checkpoint-1" / "kl_state.json").read_text())["budget"]["sum"] > 0


def test_without_kl_no_reference_is_built(tmp_path: Path) -> None:
    made = trainer(tmp_path, kl_coef=0.0)
    made.train()
    assert made.ref_model is None
    assert "kl" not in made.state.log_history[0]


# Masks and models ----------------------------------------------------------------------------------------------------


def with_tool_output(prompts: list, trainer: Any) -> dict[str, list]:
    """The given answers, with tokens of a tool in the middle of two of them."""
    from support.ppo_tools import given_answers

    answers = given_answers(prompts, trainer)
    ids = [list(answer) for answer in answers["completion_ids"]]
    made = [[1] * len(answer) for answer in ids]
    for row in (0, 4):
        ids[row][1:1], made[row][1:1] = [20, 21], [0, 0]
    return {**answers, "completion_ids": ids, "env_mask": made}


def test_tool_tokens_count_nowhere(tmp_path: Path) -> None:
    """Neither in the advantages, nor in the KL, nor in the loss."""
    options = {"kl_estimator": "exact", "kl_placement": "both", "whiten_advantages": False, "lam": 1.0, "gamma": 0.9}
    made = trainer(tmp_path, ref_model=tiny_model(1), rollout_func=with_tool_output, **options)
    rollout = first_rollout(made)
    assert rollout.mask[0].tolist() == [True, False, False, True, True, True][: rollout.length]
    assert not rollout.old_logps[~rollout.mask].any()
    assert not rollout.exact[~rollout.mask].any()
    shaped = made._shape(rollout)
    kl = rollout.exact[0][rollout.mask[0]]
    expected = 0.9**3 * rollout.scores[0] - 0.05 * sum(0.9**s * kl[s] for s in range(1, 4))
    torch.testing.assert_close(shaped.advantages[0, 0], expected)
    made.train()
    tokens = sum(map(len, ANSWERS))
    assert made.state.log_history[0]["kl/sequence"] == pytest.approx(float(rollout.exact.sum() / 8), rel=1e-5)
    assert int(rollout.mask.sum()) == tokens


def test_an_empty_answer_is_no_answer(tmp_path: Path) -> None:
    def some_empty(prompts: list, trainer: Any) -> dict[str, list]:
        from support.ppo_tools import given_answers

        answers = given_answers(prompts, trainer)
        return {
            **answers,
            "completion_ids": [[] if row in (1, 3) else ids for row, ids in enumerate(answers["completion_ids"])],
        }

    made = trainer(
        tmp_path, ref_model=tiny_model(1), rollout_func=some_empty, kl_estimator="exact", kl_placement="both"
    )
    made.train()
    assert all(math.isfinite(value) for value in made.state.log_history[0].values())
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_sampled_answers_end_at_the_first_stop_token(tmp_path: Path) -> None:
    """Also where padding and end are one token, as in many chat models: the end counts, what follows does not."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    made = trainer(
        tmp_path, given=False, processing_class=tokenizer, response_length=24, per_device_train_batch_size=16
    )
    rollout = first_rollout(made)
    ids = rollout.input_ids[:, -rollout.length :]
    ended = 0
    for row, mask in zip(ids.tolist(), rollout.mask, strict=True):
        kept = int(mask.sum())
        assert mask[:kept].all()
        assert 1 not in row[: kept - 1]
        ended += row[kept - 1] == 1
        assert row[kept - 1] == 1 or kept == 24
    assert 0 < ended < 16
    longer = trainer(tmp_path, given=False, stop_token=None, response_length=24)
    assert first_rollout(longer).mask.all()  # TRL's default: to the full length


def test_missing_end_is_penalised(tmp_path: Path) -> None:
    plain, penalised = (first_rollout(trainer(tmp_path, missing_eos_penalty=value)) for value in (None, 1.5))
    difference = plain.scores - penalised.scores
    assert difference.tolist() == pytest.approx([0, 0, 0, 0, 0, 1.5, 0, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_is_from_the_policy_itself(tmp_path: Path, temperature: float) -> None:
    """A generation config with top_k or a penalty would sample from something else than what is scored."""
    model = tiny_model()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    kept = model.generation_config
    same = tiny_dataset(1).select([0] * 256)
    sizes = {"response_length": 1, "per_device_train_batch_size": 256, "temperature": temperature}
    made = trainer(tmp_path, model=model, given=False, train_dataset=same, **sizes)
    rollout = first_rollout(made)
    with torch.no_grad():
        expected = dense(model, rollout, temperature)[0, 0].exp()
    counts = torch.bincount(rollout.input_ids[:, -1], minlength=23) / 256
    assert (counts - expected).abs().max() < 5 * 0.5 / 16  # five standard errors of a share, at most 0.5 / sqrt(256)
    assert int((counts > 0).sum()) > 3
    assert model.generation_config is kept


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_an_adapter_is_trained_against_the_policy_without_it(tmp_path: Path, estimator: str) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    placement = "both" if estimator == "exact" else "reward"
    made = trainer(tmp_path, peft_config=adapter, kl_estimator=estimator, kl_placement=placement, max_steps=3)
    before = weights(made.model)
    made.train()
    assert made.ref_model is None
    logged = [entry["kl/k3"] for entry in made.state.log_history if "kl/k3" in entry]
    assert logged[0] == pytest.approx(0.0, abs=1e-7)
    assert logged[2] > 0
    changed = {name for name, delta in moved(before, weights(made.model)).items() if delta.any()}
    assert any("lora_B" in name for name in changed)
    assert not any(name.startswith("policy") and "lora" not in name for name in changed)
    made.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_trained_adapter_is_its_own_reference(tmp_path: Path) -> None:
    """A PeftModel given as policy: the reference is the adapter as it came, as in TRL's GRPO."""
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    made = trainer(tmp_path, model=model, max_steps=2, learning_rate=1.0)
    frozen = {name: value for name, value in weights(made.model.policy).items() if ".ref." in name}
    made.train()
    logged = [entry["kl/k3"] for entry in made.state.log_history if "kl/k3" in entry]
    assert logged[0] == pytest.approx(0.0, abs=1e-7)
    assert logged[1] > 0
    assert frozen
    assert not any(made.model.policy.get_parameter(name).requires_grad for name in frozen)
    for name, value in frozen.items():
        torch.testing.assert_close(made.model.policy.get_parameter(name), value, rtol=0, atol=0)


def test_models_by_path(tmp_path: Path) -> None:
    from support.tiny import save_tiny

    path = save_tiny(tmp_path / "model")
    made = trainer(tmp_path / "run", model=path, value_model=path, ref_model=path, processing_class=None)
    made.train()
    assert made.state.log_history[0]["kl/k1"] == pytest.approx(0.0, abs=1e-6)


def test_the_value_model_learns_the_returns(tmp_path: Path) -> None:
    """A constant reward: values rise from 0 towards it."""
    options = {
        "learning_rate": 0.05,
        "max_steps": 30,
        "kl_coef": 0.0,
        "vf_coef": 1.0,
        "cliprange_value": 10.0,
        "lam": 1.0,
    }
    made = trainer(
        tmp_path, reward_funcs=lambda completions, **_: [2.0] * len(completions), logging_steps=10, **options
    )
    rollout = first_rollout(made)
    assert not rollout.values.any()  # a head of zeros
    made.train()
    values = first_rollout(made).values[rollout.mask]
    assert float((values - 2).abs().mean()) < 0.3


def test_card_says_ppo(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.create_model_card(model_name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert "ppo" in text
    assert "trl_klx" in text


def test_beta_of_the_controller_reaches_the_update(tmp_path: Path) -> None:
    """Nothing is learnt, the answers are given: what changes from step to step is the schedule's beta alone."""
    schedule = {"kl_controller": "linear", "kl_coef": 1.0, "kl_coef_end": 0.1, "max_steps": 3, "learning_rate": 0.0}
    options = {"ref_model": tiny_model(1), "train_dataset": tiny_dataset(8), "whiten_advantages": False, **schedule}
    made = trainer(tmp_path, kl_estimator="k3", kl_placement="both", **options)
    made.train()
    logged = [entry for entry in made.state.log_history if "kl/coef" in entry]
    for entry in logged:
        for name in ("kl/loss", "objective/non_score_reward"):
            assert entry[name] == pytest.approx(logged[0][name] * entry["kl/coef"], rel=1e-4), name
    rollout = first_rollout(made)
    made.kl._coefs[""] = 0.0
    uncharged, _ = made._shape_rewards(rollout)
    made.kl._coefs[""] = 0.5
    charged, _ = made._shape_rewards(rollout)
    made.kl._coefs[""] = 1.0
    torch.testing.assert_close(made._shape_rewards(rollout)[0] - uncharged, 2 * (charged - uncharged))
    assert (charged - uncharged).abs().max() > 0.01


def test_every_epoch_is_a_permutation_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, num_ppo_epochs=3, num_mini_batches=2)
    batches = list(made._minibatches(8))
    epochs = [torch.cat(batches[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert [len(batch) for batch in batches] == [4] * 6
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(8))]}) == 4


def test_the_logged_loss_is_the_mean_over_the_updates(tmp_path: Path) -> None:
    made = [trainer(tmp_path / str(epochs), learning_rate=0.0, num_ppo_epochs=epochs) for epochs in (1, 3)]
    for one in made:
        one.train()
    losses = [one.state.log_history[0]["loss"] for one in made]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[0]) > 1e-3


def test_weight_statistics_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    found = []
    for size in (8, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_ppo_epochs": 3}
        options = {"kl_estimator": "k3", "kl_placement": "loss", "ref_model": tiny_model(1), "learning_rate": 0.02}
        made = trainer(tmp_path / str(size), value_model=classifier(), **sizes, **options)
        made.train()
        found.append([made.state.log_history[0][name] for name in ("kl/ess", "kl/weight_max")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][1] > 1.01


def test_objective_kl_is_of_the_configured_estimator(tmp_path: Path) -> None:
    made = trainer(tmp_path, ref_model=tiny_model(1), kl_estimator="exact", kl_placement="loss")
    rollout = first_rollout(made)
    made.train()
    assert made.state.log_history[0]["objective/kl"] == pytest.approx(float(rollout.exact.sum()) / 8, rel=1e-4)


@pytest.mark.parametrize("rows", [5, 11, 16])
def test_evaluation_counts_every_prompt_once(tmp_path: Path, rows: int) -> None:
    """Batches of eight: the last one is smaller, and weighs less."""
    made = trainer(tmp_path, eval_dataset=tiny_dataset(rows), per_device_eval_batch_size=8)
    metrics = made.evaluate()
    answers = [ANSWERS[row % 8] for row in range(rows)]
    texts = tiny_tokenizer().batch_decode(answers, skip_special_tokens=True)
    assert metrics["eval_reward"] == pytest.approx(sum(digit_reward(texts)) / rows)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(map(len, answers)) / rows)


def test_error_bars_of_an_evaluation_pool_its_batches(tmp_path: Path) -> None:
    errors = []
    for size in (16, 8):
        made = trainer(
            tmp_path, ref_model=tiny_model(1), eval_dataset=tiny_dataset(16), per_device_eval_batch_size=size
        )
        errors.append(made.evaluate()["eval_kl/k1_se"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_several_evaluation_datasets_are_named(tmp_path: Path) -> None:
    data = {"easy": tiny_dataset(8), "hard": tiny_dataset(4)}
    metrics = trainer(tmp_path, eval_dataset=data, per_device_eval_batch_size=8).evaluate()
    assert {"eval_easy_reward", "eval_hard_reward", "eval_hard_kl/k1"} <= metrics.keys()


def test_a_stream_of_prompts(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=tiny_dataset(20).to_iterable_dataset(), max_steps=5)
    made.train()
    assert made.state.global_step == 5
    assert all(entry["reward"] > 0 for entry in made.state.log_history if "reward" in entry)


def test_generate_completions_prints_held_out_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, eval_dataset=tiny_dataset(4))
    made.generate_completions(sampling=True)
    assert "Completion" in capsys.readouterr().out
    trainer(tmp_path).generate_completions()  # without an eval_dataset there is nothing to do, as in TRL


def test_dropout_is_off(tmp_path: Path) -> None:
    """The kind that is a module, and the kind that attention reads as a number; in the reward model too."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    reward = classifier(3)
    reward.model.layers[0].self_attn.attention_dropout = 0.5
    made = trainer(tmp_path, model=model, reward_model=reward.train(), learning_rate=0.0)
    made.train()
    assert made.state.log_history[0]["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first_rollout(made).scores.tolist() == first_rollout(made).scores.tolist()


def test_rollouts_run_without_gradient_checkpointing(tmp_path: Path) -> None:
    def look(completions: list, **_: Any) -> list[float]:
        seen.append(made.model.is_gradient_checkpointing)
        return [0.0] * len(completions)

    seen: list[bool] = []
    made = trainer(tmp_path, reward_funcs=look, gradient_checkpointing=True)
    made.train()
    assert seen == [False]
    assert made.model.is_gradient_checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_with_gradient_checkpointing(tmp_path: Path, checkpointing: bool) -> None:
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, peft_config=adapter, gradient_checkpointing=checkpointing, vf_coef=0.0, kl_coef=0.0)
    before = weights(made.model.policy)
    made.train()
    step = moved(before, weights(made.model.policy))
    size = sum(float(delta.square().sum()) for delta in step.values())
    assert size > 0
    first = made.model.policy.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight
    assert first.detach().abs().max() > 0  # the gradient reaches the first layer


def two_adapters() -> Any:
    from peft import get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), adapter, adapter_name="mine")
    model.add_adapter("sft", adapter)
    for name, parameter in model.named_parameters():
        if "lora_B.sft" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def test_adapters_by_name(tmp_path: Path) -> None:
    names = {"model_adapter_name": "mine", "ref_adapter_name": "sft"}
    made = trainer(tmp_path, model=two_adapters(), max_steps=2, **names)
    assert set(made.model.policy.peft_config) == {"mine", "sft"}
    made.train()
    assert made.state.log_history[0]["kl/k3"] > 1e-3  # the reference is another adapter from the start
    assert made.model.policy.active_adapter == "mine"
    with pytest.raises(ValueError, match="ref_adapter_name='other' is not one of the policy's adapters, mine, sft"):
        trainer(tmp_path, model=two_adapters(), ref_adapter_name="other")


def test_value_model_of_an_adapter_holds_the_adapter(tmp_path: Path) -> None:
    model = two_adapters()
    model.set_adapter("sft")
    made = trainer(tmp_path, model=model, model_adapter_name="sft", ref_adapter_name="mine")
    name = "model.layers.0.self_attn.q_proj.weight"
    value = made.model.value_model.get_parameter(name)
    assert (value - tiny_model().to(value.device).get_parameter(name)).abs().max() > 0.1


def test_generation_leaves_the_config_of_the_base_model(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, peft_config=adapter, given=False)
    policy = made.model.policy
    kept = policy.generation_config, policy.get_base_model().generation_config
    made.train()
    assert (policy.generation_config, policy.get_base_model().generation_config) == kept
    assert policy.get_base_model().generation_config is kept[1]


def test_what_is_pushed_is_the_policy(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model(str(tmp_path / "pushed"), _internal_call=True)  # as push_to_hub calls it
    assert not (tmp_path / "pushed" / "value_model").exists()


def test_a_value_model_by_path_starts_at_zero_and_a_reward_model_needs_a_head(tmp_path: Path) -> None:
    from support.tiny import save_tiny

    path = save_tiny(tmp_path / "model", seed=3)
    made = trainer(tmp_path / "run", value_model=path)
    assert not first_rollout(made).values.any()
    torch.testing.assert_close(made.model.value_model.model.norm.weight, tiny_model(3).model.norm.weight)
    with pytest.raises(ValueError, match="its rewards would be random"):
        trainer(tmp_path / "run", reward_model=path)
    classifier(4).save_pretrained(tmp_path / "classifier")
    trained = trainer(tmp_path / "run", value_model=str(tmp_path / "classifier"))
    torch.testing.assert_close(trained.model.value_model.score.weight, classifier(4).score.weight)


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_mini_batches": 3}, "num_mini_batches=3 must divide the rollout of 8"),
        ({"num_mini_batches": 0}, "num_mini_batches=0 must be a number, at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be a number, more than 0"),
        ({"gamma": 1.5}, "gamma=1.5 must be a number, at least 0 and at most 1"),
        ({"lam": "high"}, "lam='high' must be a finite number"),
        ({"total_episodes": 64}, "total_episodes=64 and max_steps=1 both give"),
        ({"stop_token": "end"}, "stop_token='end' does not exist"),
        ({"stop_token": None, "missing_eos_penalty": 1.0}, "missing_eos_penalty=1.0 needs an answer's end"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be zero or more"),
        ({"kl_estimator": "k3"}, "kl_estimator='k3' with kl_placement='reward'"),
        ({"kl_estimator": "k1", "kl_placement": "loss", "kl_importance_sampling": "none"}, "zero expected gradient"),
        ({"kl_controller": "pid"}, "needs a target"),
        ({"use_liger_kernel": True}, "use_liger_kernel=true is not supported"),
        (
            {"kl_estimator": "k2", "kl_placement": "loss", "kl_aggregation": "token"},
            "kl_aggregation='token' has no effect",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=true would cut rollouts"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 prompts and a rollout takes 32"):
        trainer(tmp_path, per_device_train_batch_size=32)
    with pytest.raises(ValueError, match="there is no reward"):
        trainer(tmp_path, reward_funcs=None)
    with pytest.raises(ValueError, match="no head 'score' with one output"):
        trainer(tmp_path, value_model=classifier(labels=2))
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        trainer(tmp_path, model=model, ref_model=model)
    scorer = classifier()
    with pytest.raises(ValueError, match="value_model is the reward model itself"):
        trainer(tmp_path, reward_model=scorer, value_model=scorer)
    from trl_klx import KLXGRPOConfig
    from trl_klx.trainers.ppo.trainer import KLXPPOTrainer

    with pytest.raises(TypeError, match="args is a KLXGRPOConfig"):
        KLXPPOTrainer(KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False), model=model)  # type: ignore[arg-type]


def test_total_episodes_give_the_length(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=-1, total_episodes=20)
    made.train()
    assert made.state.global_step == 3  # 20 answers in rollouts of 8, rounded up


def test_direct_credit_is_the_kl_credit_less_the_others(tmp_path: Path) -> None:
    made = trainer(tmp_path, ref_model=tiny_model(1), kl_credit="sequence")
    rollout = first_rollout(made)
    _, direct = made._shape_rewards(rollout)
    k1 = rollout.old_logps - rollout.ref_logps
    credit = kl_credit(k1, rollout.mask, credit="sequence")
    others = [[_others(credit, rollout.mask, r, t) for t in range(rollout.length)] for r in range(8)]
    torch.testing.assert_close(direct, -0.05 * (credit - torch.tensor(others, device=DEVICE)), rtol=1e-4, atol=1e-6)


def test_digit_reward_is_used(tmp_path: Path) -> None:
    rollout = first_rollout(trainer(tmp_path))
    texts = tiny_tokenizer().batch_decode(ANSWERS, skip_special_tokens=True)
    assert rollout.scores.tolist() == pytest.approx(digit_reward(texts))
