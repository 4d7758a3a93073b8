"""A reference that follows the policy: where it is, what is measured to it and to the start, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from support.fault_tools import ALGORITHMS, OWN, make
from support.tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer
from support.tiny_dpo import LORA, preferences
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from trl_klx import KLXDPOConfig, KLXDPOTrainer, KLXGRPOConfig, KLXGRPOTrainer, KLXPPOConfig
from trl_klx.run.explain.notes import notes
from trl_klx.run.recipe.grpo_recipe import GRPO
from trl_klx.trainers.reference.adapters import copied_parameters

pytestmark = pytest.mark.trl

FIXED = {"kl_controller": "fixed", "kl_target": None}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
FRESH = {**LORA, "init_lora_weights": True}


def policy_weights(trainer: Any) -> list[Tensor]:
    """What the reference follows: all weights, or those of the adapter that is trained."""
    policy = trainer._saved_model
    if trainer.ref_model is not None:
        return [parameter.detach().clone() for parameter in policy.parameters()]
    return [own.detach().clone() for _, own in copied_parameters(policy, "default").values()]


def reference_weights(trainer: Any) -> list[Tensor]:
    if trainer.ref_model is not None:
        return [parameter.detach().clone() for parameter in trainer.ref_model.parameters()]
    return [copy.detach().clone() for copy, _ in copied_parameters(trainer._saved_model, "default").values()]


class Recorder(TrainerCallback):
    """Policy and reference at the end of every step; it comes after what moves the reference."""

    def watch(self, trainer: Any) -> Any:
        self.trainer = trainer
        self.policies, self.references = [policy_weights(trainer)], [reference_weights(trainer)]
        trainer.add_callback(self)
        return trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.policies.append(policy_weights(self.trainer))
        self.references.append(reference_weights(self.trainer))


def recorded(algorithm: str, folder: Path, *, lora: bool | str = False, **options: Any) -> tuple[Any, Recorder]:
    given: dict[str, Any] = {"peft_config": LoraConfig(**FRESH)} if lora == "fresh" else {}
    if lora == "trained":
        given["model"] = get_peft_model(tiny_model(), LoraConfig(**LORA))
    recorder = Recorder()
    trainer = recorder.watch(make(algorithm, folder, **{**FIXED, **given, **options}))
    torch.manual_seed(1)  # an adapter that is copied draws numbers
    trainer.train()
    return trainer, recorder


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


KINDS = {"full": False, "fresh adapter": "fresh", "trained adapter": "trained"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_mean_that_it_should_be(algorithm: str, kind: str, tmp_path: Path) -> None:
    trainer, run = recorded(algorithm, tmp_path, lora=KINDS[kind], max_steps=5, **SYNC)
    expected = run.references[0]
    assert_close(expected, run.policies[0])
    for step in range(1, 6):
        if step % 2 == 0:
            expected = [0.4 * old + 0.6 * new for old, new in zip(expected, run.policies[step], strict=True)]
        assert_close(run.references[step], expected)
    assert not torch.equal(run.references[-1][0], run.references[0][0])
    assert not any(parameter.requires_grad for parameter, _ in trainer.reference.moving._pairs())
    measured, origin = logged(trainer, "kl/sequence"), logged(trainer, "kl/origin")
    assert max(measured[:3] + origin[:3]) > 1e-4  # on the same answers, the same until the reference moves
    if trainer.args.kl_reading == "k3":
        assert origin[:2] == measured[:2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_to_the_start_is_that_of_a_fixed_reference(algorithm: str, kind: str, tmp_path: Path) -> None:
    """Where no loss asks the reference, two runs that differ in it alone take the same steps."""
    own: dict[str, Any] = {"grpo": {"beta": 0.0}, "ppo": {"kl_coef": 0.0}, "dpo": {"kl_coef": 0.0}}[algorithm]
    own |= {"dpo": {"loss_type": "sft"}, "grpo": {"kl_estimator": "k3", "num_iterations": 2}}.get(algorithm, {})
    options = {**own, "kl_placement": "none", "kl_monitor": ["k3"], "max_steps": 5, "lora": KINDS[kind]}
    moving, _ = recorded(algorithm, tmp_path / "moving", **options, **SYNC)
    fixed, _ = recorded(algorithm, tmp_path / "fixed", **options)
    expected = logged(fixed, "kl/sequence")
    assert max(expected) > 1e-3
    assert logged(moving, "kl/origin") == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert logged(moving, "kl/origin_token") == pytest.approx(logged(fixed, "kl/k3"), rel=1e-5, abs=1e-7)
    assert logged(moving, "kl/sequence") != pytest.approx(expected, rel=1e-2)
    assert not logged(fixed, "kl/origin")


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_a_rollout_that_is_reused_has_one_reference(estimator: str, tmp_path: Path) -> None:
    """Two steps a rollout, a move due after each: both are made when it is used up, of the policy as it is then."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "num_iterations": 2}
    options |= {"kl_estimator": estimator, "kl_placement": "loss"}
    _, run = recorded("grpo", tmp_path, max_steps=5, **options)
    assert_close(run.references[1], run.references[0])
    mixed = [0.25 * old + 0.75 * new for old, new in zip(run.references[0], run.policies[2], strict=True)]
    assert_close(run.references[2], mixed)
    assert_close(run.references[3], mixed)
    whole, _ = recorded("grpo", tmp_path, max_steps=4, **{**options, "ref_model_mixup_alpha": 1.0})
    kl = logged(whole, f"kl/{estimator}")
    assert kl[::2] == pytest.approx([0.0, 0.0], abs=1e-6)  # of the answers of the policy that the reference is
    assert min(kl[1::2]) > 1e-4


def stock_and_ours(algorithm: str, folder: Path) -> list[Any]:
    common = {"max_steps": 5, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "bf16": False, "seed": 0}
    common |= {"gradient_checkpointing": False, "save_strategy": "no", **SYNC}
    shared = {"processing_class": tiny_tokenizer()}
    made = []
    for number in range(2):
        output = str(folder / str(number))
        tiny_model().save_pretrained(folder / "model")
        if algorithm == "grpo":
            config = (GRPOConfig, KLXGRPOConfig)[number]
            own = {name: OWN["grpo"][name] for name in ("beta", "num_generations", "max_completion_length")}
            args = config(output, **common, **own, per_device_train_batch_size=8)
            given = {"reward_funcs": digit_reward, "train_dataset": tiny_dataset(), "args": args, **shared}
            made.append((GRPOTrainer, KLXGRPOTrainer)[number](str(folder / "model"), **given))
        else:
            args = (DPOConfig, KLXDPOConfig)[number](output, **common, per_device_train_batch_size=4)
            given = {"train_dataset": preferences(), "args": args, **shared}
            made.append((DPOTrainer, KLXDPOTrainer)[number](str(folder / "model"), **given))
        made[-1].train()
    return made


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_it_moves_as_trls(algorithm: str, tmp_path: Path) -> None:
    stock, ours = stock_and_ours(algorithm, tmp_path)
    atol = 0.0 if algorithm == "dpo" else 1e-4  # GRPO's KL is added to the loss in another order
    for name in ("model", "ref_model"):
        pairs = ([parameter.detach() for parameter in getattr(made, name).parameters()] for made in (stock, ours))
        torch.testing.assert_close(*pairs, rtol=0, atol=atol)


def test_the_budget_is_about_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reference is the policy of the step before: the KL to it stays near 0 while the policy leaves its start."""
    following = {**SYNC, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, **FIXED}
    trainer = make("grpo", tmp_path, max_steps=6, kl_budget=0.1, kl_estimator="k3", kl_placement="loss", **following)
    trainer.train()
    assert trainer.kl.budget.kl > 0.1
    assert max(logged(trainer, "kl/sequence")) == pytest.approx(0.0, abs=1e-5)
    assert trainer.state.global_step < 6
    assert "The KL to the start has reached" in caplog.text


def test_the_gold_reward_is_followed_against_the_start(tmp_path: Path) -> None:
    trainer = make(
        "grpo",
        tmp_path,
        max_steps=3,
        eval_dataset=tiny_dataset(8),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        **{**SYNC, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, **FIXED},
    )
    from trl_klx.trainers.rewarding.gold import GoldWatch

    watch = GoldWatch(trainer, digit_reward)
    trainer.gold, trainer.parts = watch, (*trainer.parts, watch)
    trainer.train()
    found = [entry["eval_kl/origin"] for entry in trainer.state.log_history if "eval_kl/origin" in entry]
    assert [point.kl for point in trainer.overoptimisation.evaluations] == found
    assert found[-1] > 1e-3


def test_without_the_start_no_copy_is_kept(tmp_path: Path) -> None:
    trainer, _ = recorded("grpo", tmp_path, max_steps=4, kl_origin=False, **SYNC)
    assert trainer.reference.moving._origin is None
    assert not logged(trainer, "kl/origin")


def test_small_moves_in_half_precision_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = tiny_model().to(torch.bfloat16)
    for alpha, count in ((0.6, 0), (0.01, 1)):
        make("dpo", tmp_path, model=half, **FIXED, **{**SYNC, "ref_model_mixup_alpha": alpha})
        assert caplog.text.count("The reference is in half precision") == count


def test_explain_says_which_kl_is_about_what() -> None:
    args = KLXGRPOConfig("unused", beta=0.1, use_cpu=True, bf16=False, **SYNC)
    said = " ".join(notes(GRPO, args))
    assert "every 2 steps the reference moves by 0.6 of the way" in said
    assert "kl/origin, budget and reports about the start" in said
    args.kl_origin = False
    assert "nothing measures how far the policy is from its start" in " ".join(notes(GRPO, args))
    args.sync_ref_model = False
    assert "sync_ref_model" not in " ".join(notes(GRPO, args))


def test_the_defaults_are_trls() -> None:
    for name in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"):
        fields = [config.__dataclass_fields__[name].default for config in (GRPOConfig, DPOConfig, KLXPPOConfig)]
        assert fields[0] == fields[1] == fields[2]


REFUSED: list[tuple[str, dict, str]] = [
    ("grpo", {"beta": 0.0, "kl_placement": "loss", "kl_estimator": "k3"}, "none is in memory"),
    ("ppo", {"kl_coef": 0.0, "kl_placement": "reward"}, "none is in memory"),
    ("dpo", {"precompute_ref_log_probs": True, "kl_coef": 0.0, "kl_probe_steps": None}, "none is in memory"),
    ("grpo", {"ref_model_mixup_alpha": 0}, "moves the reference by nothing"),
    ("grpo", {"kl_origin": False, "kl_budget": 3.0}, "bounds the KL to the start"),
    ("grpo", {"kl_origin": True, "sync_ref_model": False}, "kl_origin=true has no effect with sync_ref_model=false"),
]


@pytest.mark.parametrize(("algorithm", "options", "sentence"), REFUSED, ids=str)
def test_what_is_refused(algorithm: str, options: dict, sentence: str, tmp_path: Path) -> None:
    own = {"kl_probe_prompts": 64, "kl_probe_max_new_tokens": 128} if options.get("kl_probe_steps", 1) is None else {}
    with pytest.raises(ValueError, match=sentence):
        make(algorithm, tmp_path, **{**FIXED, **SYNC, **own, **options})


def test_weights_that_are_offloaded_are_refused(tmp_path: Path) -> None:
    away = cpu_offload(tiny_model(1), "cpu")
    away.hf_device_map = {"model": "cpu", "lm_head": "disk"}  # as from_pretrained notes it
    with pytest.raises(ValueError, match="some are elsewhere until they are used"):
        make("ppo", tmp_path, ref_model=away, **FIXED, **SYNC)


def test_a_second_run_of_a_trainer_keeps_the_first_start(tmp_path: Path) -> None:
    trainer, run = recorded("ppo", tmp_path, max_steps=2, **SYNC)
    trainer.args.save_strategy, trainer.args.save_steps, trainer.args.max_steps = "steps", 1, 1
    trainer.train()
    assert_close(trainer.reference.moving._origin, run.references[0])
    assert (tmp_path / "checkpoint-1" / "reference.pt").exists()


def test_models_that_cannot_follow_are_refused(tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(**LORA))
    for algorithm in ("dpo", "ppo"):
        with pytest.raises(ValueError, match="ref_model has other weights than the policy"):
            make(algorithm, tmp_path, model=adapted, ref_model=tiny_model(1), **FIXED, **SYNC)
    adapted.add_adapter("other", LoraConfig(**LORA))
    with pytest.raises(ValueError, match="ref_adapter_name='other' is a reference that stays"):
        make("ppo", tmp_path, model=adapted, ref_adapter_name="other", **FIXED, **SYNC)
