"""Compares what becomes of a KL in the reward where answers are reused, or sampled by an engine that is behind.

trl-klx starter --output_dir runs/starter
OMP_NUM_THREADS=1 python scripts/benchmark_staleness.py

On the starter task, at one KL to the reference, which PID holds: with the weights that are the default (the credit is
made once per rollout, and the policy gradient's own ratio of tokens is all that corrects it) and with
`kl_importance_sampling: prefix` (the credit is made at every update, with per-decision weights), also with
`kl_is_cap: 1.5`.

- `ppo`: PPO with four epochs, so a rollout serves four optimizer steps;
- `grpo`: GRPO with `num_iterations: 4`;
- `grpo 8`, `grpo 8 held`: GRPO with `num_iterations: 8`, and with a `kl_sampler_target` of nats per token as well;
- `engine near`, `engine far`: GRPO whose answers an engine samples that is a number of optimizer steps behind. It is a
  copy of the policy in the place of TRL's `VLLMGeneration`; what lies between it and the trainer is TRL's own.

`behind` is KL(engine || policy) in nats per answer, as the run measures it; `gain` is what the accuracy on held-out
prompts has grown by, over the square root of the KL: near the reference, reward grows so.

Runs follow one another in one process. A complete run adds a line to `<output_dir>/runs.jsonl` and is not repeated
while the line is there, so an interrupted benchmark continues. Delete the file after a change of code.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import grpo_trainer

from trl_klx.config.choices import CONTROLLER_SETTINGS
from trl_klx.kl import exact_kl
from trl_klx.monitor.history import HISTORY_FILE, read_history
from trl_klx.run import grpo, ppo
from trl_klx.tasks.answers import sampled_answers
from trl_klx.trainers.checks import packages

RECIPES = Path(__file__).parent.parent / "recipes" / "starter"
MAINS = {"grpo": grpo.main, "ppo": ppo.main}
LOGGING_STEPS = 5
SAMPLES = 8  # answers to each held-out prompt
# name: algorithm, and what makes its answers stale; `behind` is in optimizer steps
SITUATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"num_ppo_epochs": 4}),
    "grpo": ("grpo", {"num_iterations": 4}),
    "grpo 8": ("grpo", {"num_iterations": 8, "logging_steps": 8}),
    "grpo 8 held": ("grpo", {"num_iterations": 8, "logging_steps": 8, "kl_sampler_target": 0.01}),
    "engine near": ("grpo", {"behind": 6}),
    "engine far": ("grpo", {"behind": 20}),
}
KLS: dict[str, dict[str, Any]] = {
    "k1 reward": {"kl_estimator": "k1", "kl_placement": "reward"},
    "exact both": {"kl_estimator": "exact", "kl_placement": "both"},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix": {"kl_importance_sampling": "prefix"},
    "prefix to 1.5": {"kl_importance_sampling": "prefix", "kl_is_cap": 1.5},
}

Run = dict[str, Any]
Arguments = argparse.Namespace


def parse(arguments: list[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starter", default="runs/starter", help="folder that `trl-klx starter` made")
    parser.add_argument("--output_dir", default="runs/staleness", help="where runs.jsonl is kept")
    parser.add_argument("--situations", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS))
    parser.add_argument("--kls", nargs="+", choices=list(KLS), default=list(KLS))
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.4, help="KL in nats per sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--grpo_steps", type=int, default=200)
    parser.add_argument("--engine_steps", type=int, default=80)
    parser.add_argument("--ppo_steps", type=int, default=40)
    return parser.parse_args(arguments)


class EngineBehind:
    """In the place of TRL's `VLLMGeneration`: samples from the policy as it was some optimizer steps ago."""

    behind = 0

    def __init__(self, model: Any, processing_class: Any, max_completion_length: int, **_: Any) -> None:
        self.policy, self.pad, self.longest = model, processing_class.pad_token_id, max_completion_length
        self.engine = AutoModelForCausalLM.from_config(model.config).eval()
        self.generation_kwargs: dict[str, Any] = {}
        self.llm = mock.MagicMock()  # a run shuts it down at its end
        self.weights: deque[dict[str, Tensor]] = deque(maxlen=self.behind + 1)

    def sync_weights(self) -> None:
        self.weights.append({name: weight.clone() for name, weight in self.policy.state_dict().items()})
        self.engine.load_state_dict(self.weights[0])

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[None, list, list, None]:
        longest, ends = max(map(len, prompts)), self.generation_kwargs["stop_token_ids"]
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = {"do_sample": True, "top_k": 0, "eos_token_id": ends, "pad_token_id": self.pad}
        given = {"attention_mask": mask, "max_new_tokens": self.longest, **sampling}
        out = self.engine.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
        answers = out.sequences[:, longest:]
        logps = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, answers[..., None]).tolist()
        lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in answers.tolist()]
        cut = [row[:length] for row, length in zip(answers.tolist(), lengths, strict=True)]
        return None, cut, [row[:length] for row, length in zip(logps, lengths, strict=True)], None


# --- the runs --------------------------------------------------------------------------------------------------------


def recipe_of(situation: str, kl: str, weights: str, seed: int, args: Arguments) -> dict[str, Any]:
    """The starter recipe of the algorithm with another KL, without evaluation in between."""
    algorithm, stale = SITUATIONS[situation]
    recipe = yaml.safe_load((RECIPES / f"{algorithm}_exact_both_pid.yaml").read_text())
    recipe = {name: value for name, value in recipe.items() if name not in CONTROLLER_SETTINGS}
    engine = {"use_vllm": True, "vllm_mode": "colocate"} if "behind" in stale else stale
    return recipe | {
        **engine,
        **KLS[kl],
        **WEIGHTS[weights],
        "kl_controller": "pid",
        "kl_target": args.target,
        "kl_monitor": ["exact"],
        "learning_rate": args.learning_rate,
        "model_name_or_path": str(Path(args.starter) / "model"),
        "dataset_name": str(Path(args.starter) / "data"),
        "seed": seed,
        "max_steps": args.ppo_steps
        if algorithm == "ppo"
        else args.engine_steps
        if "behind" in stale
        else args.grpo_steps,
        "logging_steps": stale.get("logging_steps", min(LOGGING_STEPS, args.grpo_steps, args.ppo_steps)),
        "eval_on_start": False,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
    }


def train(situation: str, recipe: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Train the recipe in a folder; returns what it logged."""
    algorithm, stale = SITUATIONS[situation]
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": folder}))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as patched:
        if "behind" in stale:
            engine = type("Engine", (EngineBehind,), {"behind": stale["behind"]})
            patched.enter_context(mock.patch.object(grpo_trainer, "VLLMGeneration", engine))
            patched.enter_context(mock.patch.object(packages, "_VLLM", packages.Package("torch", ("torch",))))
        status = MAINS[algorithm](["--config", str(path)])
    if status:
        raise RuntimeError(f"{situation}: {recipe} ended with status {status}.")
    return read_history(Path(folder) / HISTORY_FILE)


class HeldOut(NamedTuple):
    """Of sampled answers to held-out prompts: the share of right ones, and KL(model || reference), nats per answer."""

    accuracy: float
    accuracy_se: float
    kl: float
    kl_se: float


@torch.no_grad()
def held_out(model: Any, reference: Any, tokenizer: Any, problems: list) -> HeldOut:
    answers = sampled_answers(model, tokenizer, problems, samples_per_problem=SAMPLES)
    right, kls = [], []
    for problem, own in zip(problems, answers, strict=True):
        prompt = tokenizer(problem["prompt"])["input_ids"]
        longest = max(len(answer.tokens) for answer in own)
        ids = torch.tensor([prompt + a.tokens + [tokenizer.pad_token_id] * (longest - len(a.tokens)) for a in own])
        policy_logits, ref_logits = (one(ids).logits[:, len(prompt) - 1 : -1] for one in (model, reference))
        counts = torch.arange(longest)[None] < torch.tensor([[len(answer.tokens)] for answer in own])
        kls.append(float((exact_kl(policy_logits, ref_logits) * counts).sum(-1).mean()))
        right.append(statistics.fmean(answer.reward for answer in own))
    # Answers to one prompt are alike, so the prompt is the unit of the standard errors.
    return HeldOut(*(f(v) for v in (right, kls) for f in (statistics.fmean, standard_error)))


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def run(situation: str, kl: str, weights: str, seed: int, recipe: dict[str, Any]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        history = train(situation, recipe, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"]).eval()
    problems = list(load_dataset(recipe["dataset_name"], split="test"))
    logged = [entry for entry in history if "kl/sequence" in entry]
    keys = sorted({name for entry in logged for name in entry})
    return {
        **{"situation": situation, "kl": kl, "weights": weights, "seed": seed, "recipe": recipe},
        "held_out": held_out(model, reference, tokenizer, problems)._asdict(),
        "seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry),
        "logged": {name: [entry.get(name) for entry in logged] for name in keys},
    }


def all_runs(args: Arguments) -> list[Run]:
    """The runs that the arguments ask for, made now where `runs.jsonl` does not hold them."""
    file = Path(args.output_dir) / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    wanted = list(itertools.product(args.seeds, args.situations, args.kls, args.weights))
    for number, (seed, situation, kl, weights) in enumerate(wanted, start=1):
        recipe = recipe_of(situation, kl, weights, seed, args)
        done = [made for made in read_history(file) if (made["situation"], made["recipe"]) == (situation, recipe)]
        if not done:
            done = [run(situation, kl, weights, seed, recipe)]
            with file.open("a") as lines:  # a line of its own, also after one that an interruption cut short
                lines.write(f"\n{json.dumps(done[0])}\n")
            gc.collect()
        runs.append(done[0])
        what = f"{situation}, {kl}, {weights}, seed {seed}"
        print(f"{number} of {len(wanted)}: {what}: {done[0]['seconds']:.0f} s", flush=True)
    return runs


# --- the figures -----------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Of one run; means are over the second half of what it logged."""

    accuracy: float  # on held-out prompts, after training
    kl: float  # nats per answer, likewise
    gain: float  # of accuracy, over the square root of the KL
    kl_of_batches: float  # over the target
    swing: float  # standard deviation of the batches' KL, over the target
    behind: float | None  # with an engine: KL(engine || policy), nats per answer
    ess: float | None
    gradient: float  # norm, the median
    drift: float | None  # KL(policy || sampler) at a rollout's last update, nats per token
    updates: float | None  # share of those that are made


def figures(run: Run, start: float) -> Figures:
    """Of a run whose model has the accuracy `start` before training."""
    logged, target = run["logged"], run["recipe"]["kl_target"]

    def half(name: str) -> list[float]:
        values = [value for value in logged.get(name, ()) if value is not None]
        return values[len(values) // 2 :]

    kls, lengths = half("kl/sequence"), half("completions/mean_length")
    per_token, ess = half("kl/sampler"), half("kl/ess")
    accuracy, kl = run["held_out"]["accuracy"], run["held_out"]["kl"]
    return Figures(
        accuracy=accuracy,
        kl=kl,
        gain=(accuracy - start) / kl**0.5 if kl else math.nan,
        kl_of_batches=statistics.fmean(kls) / target,
        swing=statistics.pstdev(kls) / target,
        behind=statistics.fmean(per_token) * statistics.fmean(lengths) if per_token else None,
        ess=statistics.fmean(ess) if ess else None,
        gradient=statistics.median(half("grad_norm")),
        drift=statistics.fmean(half("kl/drift_last")) if half("kl/drift_last") else None,
        updates=statistics.fmean(half("kl/updates")) if half("kl/updates") else None,
    )


def start_of(args: Arguments) -> float:
    """Accuracy of the model that every run starts from."""
    model = AutoModelForCausalLM.from_pretrained(Path(args.starter) / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(args.starter) / "model")
    return held_out(
        model, model, tokenizer, list(load_dataset(str(Path(args.starter) / "data"), split="test"))
    ).accuracy


def table_of(runs: list[Run], start: float, args: Arguments) -> Table:
    caption = f"{len(args.seeds)} seeds: mean (range). Accuracy before training: {start:.3f}."
    table = Table(title=f"Stale answers, KL held at {args.target} nats per sequence", caption=caption)
    names = ("accuracy", "KL", "gain / sqrt(KL)", "KL of batches / target", "swing", "behind", "ESS", "gradient norm")
    names += ("drift", "updates")
    for column in ("run", *names):
        table.add_column(column, justify="left" if column == "run" else "right")
    for situation, kl, weights in itertools.product(args.situations, args.kls, args.weights):
        mine = [r for r in runs if (r["situation"], r["kl"], r["weights"]) == (situation, kl, weights)]
        columns = zip(*(figures(one, start) for one in mine), strict=True)
        table.add_row(f"{situation}, {kl}, {weights}", *map(spread, columns))
    return table


def spread(values: tuple[float | None, ...]) -> str:
    """Mean and range."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.fmean(known):.3f} ({min(known):.2f} to {max(known):.2f})"


def main(arguments: list[str] | None = None) -> list[Run]:
    args = parse(arguments)
    torch.set_num_threads(1)
    runs = all_runs(args)
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(runs, start_of(args), args))
    return runs


if __name__ == "__main__":
    main()
