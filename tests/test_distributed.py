"""One process equals two: metrics, beta and weights, under DDP and DeepSpeed (over gloo, on the CPU).

Every case is run alone once, and compared with two processes under each strategy: batches and groups are split, answers
are of uneven length, one of the second process's is empty.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
from support.launching import Launched, alone, launch, model
from transformers import AutoModelForCausalLM

PID = {"kl_controller": "pid", "kl_target": 0.05}
GROUPS = {"kl_group_column": "answer", "kl_group_targets": {"0": 0.01, "1": 0.5}}  # the others: the target of all
EXACT_BOTH = {"kl_estimator": "exact", "kl_placement": "both", **PID}
CASES: dict[str, dict] = {
    "grpo-exact-both": EXACT_BOTH,
    "grpo-exact-both-lora": {**EXACT_BOTH, "lora": True},
    "grpo-k3-loss-adaptive-lora": {"kl_controller": "adaptive", "kl_target": 0.2, "kl_horizon": 20.0, "lora": True},
    "grpo-k1-reward-groups": {
        "kl_estimator": "k1",
        "kl_placement": "reward",
        "kl_importance_sampling": "prefix",
        "kl_target_unit": "sequence",
        **PID,
        **GROUPS,
    },
    "dpo-exact": {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, "learning_rate": 0.05},
    "dpo-exact-lora": {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, "lora": True},
    "ppo-k1-reward-groups": {
        "algorithm": "ppo",
        **PID,
        **GROUPS,
        "gradient_accumulation_steps": 2,
        "whiten_rewards": True,
    },
    "ppo-exact-both": {"algorithm": "ppo", **EXACT_BOTH, "num_mini_batches": 1, "gradient_accumulation_steps": 2},
    "ppo-exact-both-lora": {
        "algorithm": "ppo",
        **EXACT_BOTH,
        "kl_importance_sampling": "prefix",
        "lora": True,
        "gradient_checkpointing": True,
    },
}
ENGINE = {  # whose log-probs are those of its weights: they are the policy's at every step
    "ppo-engine": {**CASES["ppo-exact-both"], "use_vllm": True},
    "ppo-engine-lora": {**CASES["ppo-exact-both-lora"], "use_vllm": True},
}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
MOVED: dict[str, dict] = {
    "grpo-exact-moving": {**EXACT_BOTH, **MOVING},
    "grpo-exact-moving-lora": {**EXACT_BOTH, **MOVING, "lora": True},
    "dpo-moving": {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, **MOVING},
    "ppo-exact-moving-lora": {"algorithm": "ppo", **EXACT_BOTH, **MOVING, "lora": True},
}
FEW = [name for name in CASES if name.endswith(("exact-both", "dpo-exact"))]
BY_VERSION = ("grpo-exact-both", "dpo-exact", "ppo-exact-both")  # of each strategy, what is run on TRL's other version
SAVED = {"save_strategy": "steps", "save_steps": 2}

ALWAYS = ("loss", "grad_norm", "kl/coef")
COMPARED = (*ALWAYS, "reward", "kl", "kl/sequence", "kl/sequence_se", "kl/error", "kl/loss", "policy/approxkl_avg")
COMPARED += ("loss/value_avg", "policy/entropy_avg", "reward_std", "episode", "kl/data_exact", "log_ratio/margin")
COMPARED += ("kl/start", "kl/masked", "kl/masked_share", "length/chosen", "length/margin_slope", "log_ratio/start")
COMPARED += ("kl/origin", "kl/origin_token", "length/margin_correlation", "probe/mean_length", "probe/entropy")


@cache
def one_process(name: str) -> dict:
    return alone((CASES | ENGINE | MOVED)[name])


def assert_equal_runs(found: list[dict], expected: dict) -> None:
    first, second = found
    assert first["betas"] == second["betas"]  # to the last bit
    alarms = [[{k: v for k, v in entry.items() if k.startswith("health/")} for entry in run["logs"]] for run in found]
    assert alarms[0] == alarms[1]
    assert len(set(first["betas"])) > 2  # the controller did move
    assert first["betas"] == pytest.approx(expected["betas"], rel=1e-4)
    steps = [entry for entry in expected["logs"] if "kl/coef" in entry]
    assert len(steps) == 4
    assert max(entry.get("kl/sequence", 0.0) for entry in steps) > 1e-3
    for mine, theirs in zip(first["logs"], steps, strict=False):
        of_groups = [name for name in theirs if name.startswith("kl_groups/")]
        for name in [*of_groups, *(name for name in COMPARED if name in theirs or name in ALWAYS)]:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), name


def launches(strategy: str, names: Iterable[str] = CASES, **settings: Any) -> list:
    return [
        launch(strategy, name, {**CASES[name], **settings}, *([pytest.mark.trl] if name in BY_VERSION else []))
        for name in names
    ]


@pytest.mark.parametrize("launched", launches("ddp", **SAVED), indirect=True)
def test_ddp_equals_one_process(launched: Launched) -> None:
    name, folder, found = launched
    assert_equal_runs(found, one_process(name))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["weights"] == pytest.approx(one_process(name)["weights"], rel=1e-4)
    saved = {"adapter_model.safetensors" if CASES[name].get("lora") else "model.safetensors", "kl_state.json"}
    if name.startswith("ppo"):
        saved.add("value_model/model.safetensors")
    for file in saved:
        assert (folder / "checkpoint-2" / file).exists(), file


@pytest.mark.parametrize("launched", launches("fsdp2"), indirect=True)
def test_fsdp2_equals_one_process(launched: Launched) -> None:
    assert_equal_runs(launched.ranks, one_process(launched.name))


@pytest.mark.parametrize("launched", launches("zero1", FEW, **SAVED), indirect=True)
def test_zero1_equals_one_process(launched: Launched) -> None:
    assert_equal_runs(launched.ranks, one_process(launched.name))


@pytest.mark.parametrize("launched", launches("zero2"), indirect=True)
def test_zero2_equals_one_process(launched: Launched) -> None:
    assert_equal_runs(launched.ranks, one_process(launched.name))


@pytest.mark.parametrize("launched", launches("zero3"), indirect=True)
def test_zero3_equals_one_process(launched: Launched) -> None:
    assert_equal_runs(launched.ranks, one_process(launched.name))


@pytest.mark.parametrize(
    "launched",
    [launch(strategy, name, ENGINE[name]) for strategy in ("fsdp2", "zero3") for name in ENGINE],
    indirect=True,
)
def test_an_engine_gets_weights_that_are_sharded(launched: Launched) -> None:
    assert_equal_runs(launched.ranks, one_process(launched.name))
    for entry in launched.ranks[0]["logs"]:
        if "loss" in entry:
            assert abs(entry["kl/sampler"]) < 1e-6 and entry["kl/weight_mean"] == pytest.approx(1.0, abs=1e-4)


def moved(strategy: str) -> list:
    return [launch(strategy, name, {**options, **SAVED, "resumed_after": 2}) for name, options in MOVED.items()]


@pytest.mark.parametrize("launched", [*moved("ddp"), *moved("fsdp2"), *moved("zero3")], indirect=True)
def test_a_reference_that_moves(launched: Launched) -> None:
    """As in one process; and resumed from a checkpoint, bit for bit as without the interruption."""
    assert_equal_runs(launched.ranks, one_process(launched.name))
    for rank in launched.ranks:
        again = rank["again"]
        assert again["weights"] == rank["weights"]
        assert again["reference"] == rank["reference"] != []
        assert again["betas"][-2:] == rank["betas"][-2:]
        for mine, theirs in zip(again["logs"][-3:-1], rank["logs"][-3:-1], strict=True):
            assert kl_of(mine) == kl_of(theirs)
        assert again["logs"][-2]["kl/origin"] != again["logs"][-2]["kl/sequence"]


def kl_of(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("kl")}


def weight_sums(folder: str) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [float(parameter.detach().double().square().sum()) for parameter in model.parameters()]


UNSCORED = {"unscored": True, "weight_decay": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}


@pytest.mark.situation("GRPO under DeepSpeed: no reward applies to any answer of a step", "right")
@pytest.mark.parametrize("launched", [launch("zero2", "unscored", UNSCORED)], indirect=True)
def test_a_step_that_is_skipped_changes_nothing_under_deepspeed(launched: Launched) -> None:
    """Its engine steps within the backward pass, where the KL loss and weight decay are finite all the same."""
    first, _ = launched.ranks
    assert [entry["skipped_steps"] for entry in first["logs"] if "loss" in entry] == [1.0, 2.0]
    assert first["weights"] == pytest.approx(weight_sums(model()), rel=1e-7)
