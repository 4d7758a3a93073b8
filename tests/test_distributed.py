"""One process equals two (DDP over gloo, on the CPU): metrics, beta and weights; batches and groups are split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

TESTS = Path(__file__).parent
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: 'no'
num_machines: 1
num_processes: {processes}
main_process_port: 0
use_cpu: true
"""
ALWAYS = ("loss", "grad_norm", "kl/coef")
COMPARED = (*ALWAYS, "reward", "kl", "kl/sequence", "kl/sequence_se", "kl/error", "kl/loss", "policy/approxkl_avg")
COMPARED += ("loss/value_avg", "policy/entropy_avg", "reward_std", "episode", "kl/data_exact", "log_ratio/margin")


def run(folder: Path, model: str, processes: int, options: dict) -> list[dict]:
    """Run the script on one process or two; returns what each process wrote."""
    config, output = folder / f"accelerate{processes}.yaml", folder / f"run{processes}"
    kind = "MULTI_GPU" if processes > 1 else "'NO'"  # MULTI_CPU would silently run one process
    config.write_text(ACCELERATE.format(kind=kind, processes=processes))
    script, arguments = TESTS / "distributed_script.py", json.dumps({**options, "processes": processes})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    result = subprocess.run(
        [*launch, str(script), model, str(output), arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "exact", "kl_placement": "both", "kl_controller": "pid", "kl_target": 0.05},
        {"kl_estimator": "k3", "kl_controller": "adaptive", "kl_target": 0.2, "kl_horizon": 20.0, "lora": True},
        {"kl_estimator": "k1", "kl_placement": "reward", "kl_controller": "pid", "kl_target": 0.3}
        | {"kl_target_unit": "sequence", "kl_signal": "k3"},
        {"algorithm": "ppo", "kl_controller": "pid", "kl_target": 0.05, "gradient_accumulation_steps": 2}
        | {"whiten_rewards": True},
        {
            "algorithm": "ppo",
            "kl_estimator": "exact",
            "kl_placement": "both",
            "lora": True,
            "gradient_checkpointing": True,
        }
        | {"kl_controller": "pid", "kl_target": 0.05, "save_strategy": "steps", "save_steps": 2}
        | {"saved": ["adapter_model.safetensors", "value_model/model.safetensors", "optimizer.pt", "kl_state.json"]},
        {"algorithm": "dpo", "kl_controller": "pid", "kl_target": 0.01, "learning_rate": 0.05},
    ],
    ids=[
        "exact-both-pid",
        "k3-loss-adaptive-lora",
        "k1-reward-pid",
        "ppo-k1-reward",
        "ppo-exact-both-lora-saved",
        "dpo",
    ],
)
def test_two_processes_equal_one(tmp_path: Path, options: dict) -> None:
    model = save_tiny(tmp_path / "model")
    (alone,) = run(tmp_path, model, 1, options)
    first, second = run(tmp_path, model, 2, options)
    for saved in options.get("saved", ()):
        assert (tmp_path / "run2" / "checkpoint-2" / saved).exists(), saved
    assert first["betas"] == second["betas"]  # to the last bit
    assert first["weights"] == second["weights"]
    assert len(set(first["betas"])) > 2  # the controller did move
    assert first["betas"] == pytest.approx(alone["betas"], rel=1e-4)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    steps = [entry for entry in alone["logs"] if "kl/coef" in entry]
    assert len(steps) == 4
    assert max(entry.get("kl/sequence", 0.0) for entry in steps) > 1e-3
    for mine, theirs in zip(first["logs"], steps, strict=False):
        for name in (name for name in COMPARED if name in theirs or name in ALWAYS):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), name
