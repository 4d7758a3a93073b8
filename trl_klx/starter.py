"""A small, really trained language model and its data, made in seconds on a CPU: `trl-klx starter`.

The task is to sort digits: `53331=` is continued by `13335` and the end of the text. The model is left imperfect on
purpose, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .rewards import exact_match

if TYPE_CHECKING:  # imported on first use, so that `trl-klx starter --help` answers at once
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_OUTPUT_DIR = "runs/starter"
TRAIN_PROMPTS, TEST_PROMPTS = 4096, 512
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 128, 2, 4
BATCH_SIZE, LEARNING_RATE = 64, 1.5e-3
NEXT_COMMAND = (
    "accelerate launch --num_cpu_threads_per_process 1 --config_file recipes/accelerate/cpu.yaml scripts/grpo.py "
    "--config recipes/starter/grpo_exact_both_pid.yaml"
)

Problems = Sequence[Mapping[str, str]]


class StarterError(ValueError):
    """Input that `make_starter` cannot use; the message is one sentence for the user."""


class Accuracy(NamedTuple):
    """Share of correct completions, and its standard error over the problems."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class StarterReport:
    """What `make_starter` made: where it is, how large the model is, how long it took and how well the model sorts."""

    model_dir: str
    data_dir: str
    parameters: int
    seconds: float
    greedy_accuracy: float
    sampled_accuracy: float
    sampled_standard_error: float


def make_starter(
    output_dir: str | Path, *, seed: int = 0, steps: int = 90, force: bool = False, progress: bool = True
) -> StarterReport:
    """Train the starter model and write it with its data; a complete starter of the same settings is kept.

    Writes `<output_dir>/model` (for `from_pretrained`), `<output_dir>/data` (for `load_dataset`: splits train and test,
    columns prompt and answer) and `<output_dir>/starter.json`. All of it appears at once, when it is complete.

    `seed` is that of the initial weights and the batches; the same seed gives the same weights. The data do not depend
    on it, so that models are compared on the same problems. `steps` is the length of the supervised training. `force`
    makes the starter anew and replaces the one in `output_dir`, whatever its settings. Raises `StarterError` if a
    number is out of range, or if `output_dir` holds anything that must not be replaced.
    """
    for name, value, lowest in (("seed", seed, 0), ("steps", steps, 1)):
        if not lowest <= value < 2**63:
            raise StarterError(f"{name} is {value}: give a whole number from {lowest} to 2**63 - 1.")
    settings = {"seed": seed, "steps": steps, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    results = _existing_results(Path(output_dir), settings, force)
    if results is None:
        target = Path(output_dir).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renaming is all or nothing only within a file system, hence a temporary folder next to the target.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            made = Path(temporary) / "made"
            results = _make(made, seed, steps, progress)
            (made / "starter.json").write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
            if target.exists():
                target.rename(Path(temporary) / "replaced")
            made.rename(target)
    return StarterReport(str(Path(output_dir) / "model"), str(Path(output_dir) / "data"), **results)


def make_problems() -> tuple[Problems, Problems]:
    """Distinct problems `{"prompt": "201=", "answer": "012"}` of 3 to 6 digits: for training, and held out."""
    generator = random.Random(0)
    # 8192 draws leave enough of both kinds, although some are drawn twice.
    drawn = dict.fromkeys("".join(generator.choices("0123456789", k=generator.randint(3, 6))) for _ in range(8192))
    problems = [{"prompt": f"{digits}=", "answer": "".join(sorted(digits))} for digits in drawn]
    train = [problem for problem in problems if not is_held_out(problem["prompt"])]
    test = [problem for problem in problems if is_held_out(problem["prompt"])]
    return train[:TRAIN_PROMPTS], test[:TEST_PROMPTS]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is a test prompt: about one in ten, by a hash that is the same in every process."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10 == 0


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    sample: bool,
    samples_per_problem: int = 1,
    batch_size: int = 512,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Accuracy:
    """Share of completions that are exactly the answer, over two or more problems with a `prompt` and an `answer`.

    `sample` draws `samples_per_problem` completions at temperature 1, with the random numbers of `seed`; without it the
    model decodes greedily, once. `batch_size` completions of at most `max_new_tokens` are generated at a time. The
    random state of PyTorch and the model's mode are left as they were.
    """
    import torch

    if samples_per_problem < 1 or (samples_per_problem > 1 and not sample):
        raise ValueError(f"samples_per_problem is {samples_per_problem}: give 1, or more with sample=True.")
    rows = [problem for problem in problems for _ in range(samples_per_problem)]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    scores: list[float] = []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [row["prompt"] for row in batch]
            inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            scores += exact_match(prompts, texts, answer=[row["answer"] for row in batch])
    model.train(was_training)
    # Samples of one problem are alike, so the problem is the unit of the standard error.
    means = [statistics.fmean(scores[i : i + samples_per_problem]) for i in range(0, len(scores), samples_per_problem)]
    return Accuracy(statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means)))


def main(argv: list[str] | None = None) -> int:
    """`trl-klx starter`: make the starter and say where it is. Returns the exit status: 0, or 2 for bad input."""
    parser = _Parser(prog="trl-klx starter", description="Make a small trained model that sorts digits, and its data.")
    parser.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="whole number, 0 or greater (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make the starter anew, replacing the one in output_dir")
    try:
        args = parser.parse_args(argv)
        report = make_starter(args.output_dir, seed=args.seed, force=args.force)
    except StarterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: output_dir {args.output_dir}: {error.strerror}; choose a folder to write to.", file=sys.stderr)
        return 2
    command = NEXT_COMMAND
    if Path(args.output_dir) != Path(DEFAULT_OUTPUT_DIR):  # the recipe names the default folder
        command += " " + shlex.join(["--model_name_or_path", report.model_dir, "--dataset_name", report.data_dir])
    print(
        f"Starter: sorts digits (53331= -> 13335), {report.parameters:,} parameters, made in {report.seconds:.0f} s\n"
        f"  accuracy on {TEST_PROMPTS} held-out prompts: greedy {report.greedy_accuracy:.3f}, sampled "
        f"{report.sampled_accuracy:.3f} (standard error {report.sampled_standard_error:.3f})\n"
        f"  model: {report.model_dir}\n  data:  {report.data_dir}\nNext:\n  {command}"
    )
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StarterError(f"{message}; see `{self.prog} --help`.")


def _existing_results(folder: Path, settings: dict[str, float], force: bool) -> dict[str, Any] | None:
    """The results of a complete starter of these settings; None where one is to be made, an error where it cannot."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise StarterError(f"output_dir {folder} is a file: choose another --output_dir.")
    names = {path.name for path in folder.iterdir()}
    try:
        record = json.loads((folder / "starter.json").read_text())
        record = record if isinstance(record, dict) else {}
    except (FileNotFoundError, ValueError):
        record = {}
    made_with = record.get("settings")
    if made_with == settings and not force and {"model", "data"} <= names:
        return record["results"]
    foreign = sorted(names - {"model", "data", "starter.json"} if made_with else names)
    if foreign:
        raise StarterError(f"output_dir {folder} holds {foreign[0]}, not from a starter: choose another --output_dir.")
    if made_with and made_with != settings and not force:
        raise StarterError(f"output_dir {folder} holds a starter of other settings: choose another or pass --force.")
    return None


def _make(folder: Path, seed: int, steps: int, progress: bool) -> dict[str, Any]:
    """Write the model and the data into a new folder; returns the figures of `StarterReport`."""
    import torch

    start = time.perf_counter()
    train, test = make_problems()
    (folder / "data").mkdir(parents=True)
    for split, problems in (("train", train), ("test", test)):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    threads = torch.get_num_threads()
    # So small a model gains nothing from threads, and on busy cores they wait for each other a hundred times as long.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            tokenizer = _make_tokenizer()
            model = _make_model(tokenizer)
            _train(model, tokenizer, train, steps, progress)
        greedy = accuracy(model, tokenizer, test, sample=False)
        sampled = accuracy(model, tokenizer, test, sample=True, samples_per_problem=4)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
        "greedy_accuracy": greedy.mean,
        "sampled_accuracy": sampled.mean,
        "sampled_standard_error": sampled.standard_error,
    }


def _make_tokenizer() -> PreTrainedTokenizerBase:
    """One token per character, in a form that `AutoTokenizer` reloads identically."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789="])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=characters, padding_side="left", model_max_length=64, **special)


def _make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    # Qwen3 and not Qwen2: transformers 5 reloads every tokenizer of a Qwen2 model as Qwen2's own.
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HIDDEN_SIZE // NUM_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Problems, steps: int, progress: bool
) -> None:
    """Supervised training on random batches of the problems."""
    import torch
    from tqdm import trange

    texts = [f"{problem['prompt']}{problem['answer']}{tokenizer.eos_token}" for problem in problems]
    data = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    separator = data["input_ids"] == tokenizer.get_vocab()["="]
    # -100 leaves the prompt, and the padding on its left, out of the loss.
    data["labels"] = data["input_ids"].masked_fill((separator.cumsum(dim=1) == 0) | separator, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in trange(steps, desc="training the starter", disable=not progress):
        # Without the decay the accuracy of so short a run depends much more on the seed.
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        rows = torch.randint(len(texts), (BATCH_SIZE,))
        model(**{name: tensor[rows] for name, tensor in data.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
