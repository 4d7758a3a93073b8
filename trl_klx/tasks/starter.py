"""A small, really trained language model and its data, made in seconds on a CPU: `trl-klx starter`.

The task is to sort digits: `53331=` is continued by `13335` and the end of the text. The model is left imperfect on
purpose, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.parser import CommandParser, UsageError
from .answers import Problems, accuracy, preference_pairs, sampled_answers
from .folder import whole_folder, write_rows

if TYPE_CHECKING:  # imported on first use, so that `trl-klx starter --help` answers at once
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAIN_PROMPTS, TEST_PROMPTS = 4096, 512
# Problems that are sampled for preference pairs; not all of them give one.
PAIR_TRAIN_PROMPTS, PAIR_TEST_PROMPTS = 2048, 256
BATCH_SIZE, LEARNING_RATE = 64, 1.5e-3
PARTS = ("model", "data", "preferences")
NEXT_COMMAND = (
    "OMP_NUM_THREADS=1 trl-klx grpo --accelerate_config cpu --config recipes/starter/grpo_exact_both_pid.yaml"
)


class StarterError(ValueError):
    """Input that cannot work; the message is one sentence that names it."""


@dataclass(frozen=True)
class StarterReport:
    """What `make_starter` made: its folders, the model's size, how long it took, and how well the model sorts."""

    model_dir: str
    data_dir: str
    preferences_dir: str
    parameters: int
    seconds: float
    greedy_accuracy: float
    sampled_accuracy: float
    sampled_standard_error: float
    train_pairs: int
    test_pairs: int


def make_starter(
    output_dir: str | Path, *, seed: int = 0, steps: int = 90, force: bool = False, progress: bool = True
) -> StarterReport:
    """Train the starter model and write it with its data; a complete starter of the same settings is kept.

    Writes `model` (for `from_pretrained`), `data` (for `load_dataset`: splits train and test, columns prompt and
    answer), `preferences` (the same splits of the model's own answers: prompt, chosen and rejected) and `starter.json`.
    All of it appears at once, when it is complete.

    Args:
        output_dir: folder to write.
        seed: of the initial weights, the batches and the answers; the same seed gives the same files. The problems do
            not depend on it, so that models are compared on the same ones.
        steps: length of the supervised training.
        force: replaces a starter that is there, whatever its settings.
        progress: shows a bar.

    Raises:
        StarterError: a number is out of range, or `output_dir` holds something that is not from a starter.
    """
    for name, value, lowest in (("seed", seed, 0), ("steps", steps, 1)):
        if not lowest <= value < 2**63:
            raise StarterError(f"{name} is {value}: give a whole number from {lowest} to 2**63 - 1.")
    settings = {"seed": seed, "steps": steps, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    results = _existing_results(Path(output_dir), settings, force)
    if results is None:
        with whole_folder(Path(output_dir)) as made:
            results = _make(made, seed, steps, progress)
            (made / "starter.json").write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    model_dir, data_dir, preferences_dir = (str(Path(output_dir) / name) for name in PARTS)
    return StarterReport(model_dir, data_dir, preferences_dir, **results)


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


def command_parser(program: str) -> CommandParser:
    """What `trl-klx starter` takes."""
    parser = CommandParser(prog=program, description="Make a small trained model that sorts digits, and its data.")
    parser.add_argument("--output_dir", default="runs/starter", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="whole number, 0 or greater (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make the starter again, replacing the one in output_dir")
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx starter") -> int:
    """Make the starter and print where it is. Returns the exit status: 0, or 2 for bad input."""
    try:
        args = command_parser(program).parse_args(argv)
        report = make_starter(args.output_dir, seed=args.seed, force=args.force)
    except (UsageError, StarterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: output_dir {args.output_dir}: {error.strerror}; choose a folder to write to.", file=sys.stderr)
        return 2
    command = NEXT_COMMAND
    if Path(args.output_dir) != Path("runs/starter"):  # which the recipe names
        command += " " + shlex.join(["--model_name_or_path", report.model_dir, "--dataset_name", report.data_dir])
    print(
        f"Starter: sorts digits (53331= -> 13335), {report.parameters:,} parameters, made in {report.seconds:.0f} s\n"
        f"  accuracy on {TEST_PROMPTS} held-out prompts: greedy {report.greedy_accuracy:.3f}, sampled "
        f"{report.sampled_accuracy:.3f} (standard error {report.sampled_standard_error:.3f})\n"
        f"  model: {report.model_dir}\n  data:  {report.data_dir}\n"
        f"  preferences: {report.preferences_dir} (for DPO: {report.train_pairs} pairs of its own answers to train on, "
        f"{report.test_pairs} held out)\nNext:\n  {command}"
    )
    return 0


def _existing_results(folder: Path, settings: dict[str, float], force: bool) -> dict[str, Any] | None:
    """The results of a complete starter of these settings; None where one is to be made.

    Raises:
        StarterError: the folder holds something that must not be replaced.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise StarterError(f"output_dir {folder} is a file: choose another --output_dir.")
    names = {path.name for path in folder.iterdir()}
    try:
        record = json.loads((folder / "starter.json").read_text())
        made_with = record.get("settings")
    except (FileNotFoundError, ValueError, AttributeError):  # missing, or not what `make_starter` writes
        made_with = None
    if made_with == settings and not force and names.issuperset(PARTS):
        return record["results"]
    foreign = sorted(names - {*PARTS, "starter.json"} if made_with else names)
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
        pairs = [
            preference_pairs(problems, sampled_answers(model, tokenizer, problems, seed=seed))
            for problems in (train[:PAIR_TRAIN_PROMPTS], test[:PAIR_TEST_PROMPTS])
        ]
    finally:
        torch.set_num_threads(threads)
    for name, splits in (("data", (train, test)), ("preferences", pairs)):
        for split, rows in zip(("train", "test"), splits, strict=True):
            write_rows(folder / name / f"{split}.jsonl", rows)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
        "greedy_accuracy": greedy.mean,
        "sampled_accuracy": sampled.mean,
        "sampled_standard_error": sampled.standard_error,
        "train_pairs": len(pairs[0]),
        "test_pairs": len(pairs[1]),
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
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
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
