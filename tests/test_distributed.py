"""One process equals two: metrics, beta and weights, under DDP and DeepSpeed (over gloo, on the CPU).

Every case is run alone once, and compared with two processes under each strategy: batches and groups are split, answers
are of uneven length, one of the second process's is empty.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from support.processes import SUPPORT, environment
from support.tiny import save_tiny
from transformers import AutoModelForCausalLM

from trl_klx.trainers.seams import TRL_HAS_PPO

SHARED = """\
compute_environment: LOCAL_MACHINE
mixed_precision: 'no'
num_machines: 1
main_process_port: 0
"""
ALONE = SHARED + "distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n"
# MULTI_CPU would silently run one process.
DDP = SHARED + "distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n"
ZERO = """\
distributed_type: DEEPSPEED
num_processes: 2
use_cpu: false
deepspeed_config:
  zero_stage: {stage}
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: {third}
  zero3_save_16bit_model: {third}
"""
FSDP2 = (
    SHARED
    + """\
distributed_type: FSDP
num_processes: 2
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: FULL_STATE_DICT
"""
)
# accelerate gives processes on the CPU DDP in place of FSDP2; told that they are an accelerator's, it does not.
FSDP2_ON_CPU = """\
import accelerate.state
from accelerate.utils import DistributedType

accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
"""
STRATEGIES = {"ddp": DDP, "fsdp2": FSDP2}
STRATEGIES |= {f"zero{n}": SHARED + ZERO.format(stage=n, third=str(n == 3).lower()) for n in (1, 2, 3)}

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
        "kl_target_unit": "sequence",
        **PID,
        **GROUPS,
    },
    "dpo-exact": {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, "learning_rate": 0.05},
    "dpo-exact-lora": {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, "lora": True},
}
if TRL_HAS_PPO:
    CASES["ppo-k1-reward-groups"] = {
        "algorithm": "ppo",
        **PID,
        **GROUPS,
        "gradient_accumulation_steps": 2,
        "whiten_rewards": True,
    }
    CASES["ppo-exact-both"] = {
        "algorithm": "ppo",
        **EXACT_BOTH,
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 2,
    }
    CASES["ppo-exact-both-lora"] = {"algorithm": "ppo", **EXACT_BOTH, "lora": True, "gradient_checkpointing": True}
SAVED = {"save_strategy": "steps", "save_steps": 2}

ALWAYS = ("loss", "grad_norm", "kl/coef")
COMPARED = (*ALWAYS, "reward", "kl", "kl/sequence", "kl/sequence_se", "kl/error", "kl/loss", "policy/approxkl_avg")
COMPARED += ("loss/value_avg", "policy/entropy_avg", "reward_std", "episode", "kl/data_exact", "log_ratio/margin")
COMPARED += ("kl/start", "kl/masked", "kl/masked_share", "length/chosen", "length/margin_slope", "log_ratio/start")
COMPARED += ("length/margin_correlation", "probe/mean_length", "probe/entropy")


# DeepSpeed compiles its communication for the CPU, once: in a folder of its own, because a build that was interrupted
# leaves a lock behind, and with the ninja of this environment, which need not be activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
ENVIRONMENT = {"PATH": PATH, "TORCH_EXTENSIONS_DIR": mkdtemp()}
COMPILE = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


@pytest.fixture(scope="session")
def deepspeed() -> None:
    """Its communication is compiled; where that fails, all tests that need it say so at once."""
    subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment(**ENVIRONMENT), timeout=300, check=True, capture_output=True
    )


@cache
def model() -> str:
    return save_tiny(Path(mkdtemp()) / "model")


def run(folder: Path, accelerate: str, processes: int, options: dict) -> list[dict]:
    """Run the script; returns what each process wrote."""
    config, output = folder / "accelerate.yaml", folder / "run"
    config.write_text(accelerate)
    (folder / "sitecustomize.py").write_text(FSDP2_ON_CPU if accelerate == FSDP2 else "")
    arguments = json.dumps({"use_cpu": "use_cpu: true" in accelerate, **options, "processes": processes})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    result = subprocess.run(
        [*launch, str(SUPPORT / "distributed_script.py"), model(), str(output), arguments],
        capture_output=True,
        text=True,
        env={**environment(first=str(folder)), **ENVIRONMENT}
        | ({"ACCELERATE_TORCH_DEVICE": "cpu"} if accelerate == FSDP2 else {}),
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


@cache
def alone(case: str) -> dict:
    return run(Path(mkdtemp()), ALONE, 1, CASES[case])[0]


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


@pytest.mark.parametrize("case", CASES)
def test_ddp_equals_one_process(tmp_path: Path, case: str) -> None:
    found = run(tmp_path, STRATEGIES["ddp"], 2, {**CASES[case], **SAVED})
    assert_equal_runs(found, alone(case))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["weights"] == pytest.approx(alone(case)["weights"], rel=1e-4)
    saved = {"adapter_model.safetensors" if CASES[case].get("lora") else "model.safetensors", "kl_state.json"}
    if case.startswith("ppo"):
        saved.add("value_model/model.safetensors")
    for name in saved:
        assert (tmp_path / "run" / "checkpoint-2" / name).exists(), name


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_equals_one_process(tmp_path: Path, case: str) -> None:
    assert_equal_runs(run(tmp_path, STRATEGIES["fsdp2"], 2, {**CASES[case], "sharding": "FSDP"}), alone(case))


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_equals_one_process(tmp_path: Path, case: str, stage: int) -> None:
    assert_equal_runs(
        run(tmp_path, STRATEGIES[f"zero{stage}"], 2, {**CASES[case], "sharding": "DEEPSPEED"}), alone(case)
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(("exact-both", "dpo-exact"))])
def test_zero1_equals_one_process(tmp_path: Path, case: str) -> None:
    assert_equal_runs(run(tmp_path, STRATEGIES["zero1"], 2, {**CASES[case], **SAVED}), alone(case))


def weight_sums(folder: str) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [float(parameter.detach().double().square().sum()) for parameter in model.parameters()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.situation("GRPO under DeepSpeed: no reward applies to any answer of a step", "right")
def test_a_step_that_is_skipped_changes_nothing_under_deepspeed(tmp_path: Path) -> None:
    """Its engine steps within the backward pass, where the KL loss and weight decay are finite all the same."""
    settings = {"unscored": True, "weight_decay": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}
    found = run(tmp_path, STRATEGIES["zero2"], 2, {**settings, "sharding": "DEEPSPEED"})
    assert [entry["skipped_steps"] for entry in found[0]["logs"] if "loss" in entry] == [1.0, 2.0]
    assert found[0]["weights"] == pytest.approx(weight_sums(model()), rel=1e-7)
