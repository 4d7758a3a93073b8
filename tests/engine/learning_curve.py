"""PPO's starter recipe through a real vLLM engine on CPU, beside the same without it: the table of docs/vllm.md.

Usage, in the environment of `make test-vllm`, after `trl-klx starter`: python tests/engine/learning_curve.py
"""

import json
from pathlib import Path
from tempfile import mkdtemp

import vllm_engine
import yaml

from trl_klx.run import ppo

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "starter" / "ppo_k1_reward.yaml"
RUNS = {"without": {"use_vllm": False}, "through vLLM": {"use_vllm": True, "vllm_max_model_length": 64}}
SHORTER = {"max_steps": 100, "eval_steps": 25, "disable_tqdm": True}


def logs(recipe: Path, changes: dict, folder: Path) -> list[dict]:
    """What the run logged."""
    folder.mkdir()
    own = folder / f"{recipe.stem}.yaml"
    fields = {**yaml.safe_load(recipe.read_text()), **SHORTER, **changes}
    fields |= {"output_dir": str(folder / "run"), "report_to": "none"}
    own.write_text(yaml.safe_dump(fields))
    assert ppo.main(["--config", str(own)]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def rows(name: str, found: list[dict]) -> list[str]:
    """Accuracy and KL of each evaluation, and of the engine its means."""
    evaluations = [row for row in found if "eval_reward" in row]
    reward = " | ".join(f"{row['eval_reward']:.3f}" for row in evaluations)
    kl = " | ".join(f"{row['eval_kl/sequence']:.3f} ± {row['eval_kl/sequence_se']:.3f}" for row in evaluations)
    lines = [f"| {name}: accuracy | {reward} |", f"| KL, nats per answer | {kl} |"]
    sampled = [row for row in found if "kl/sampler" in row]
    for metric in ("kl/sampler", "kl/weight_mean", "kl/ess", "kl/ratio_cut") if sampled else ():
        lines.append(f"{metric}: {sum(row[metric] for row in sampled) / len(sampled):.3g}")
    return lines


if __name__ == "__main__":
    vllm_engine.drive_the_cpu_engine()
    out, table = Path(mkdtemp()), []
    for number, (name, changes) in enumerate(RUNS.items()):
        table += rows(name, logs(RECIPE, changes, out / str(number)))
    print("\n".join(table))
