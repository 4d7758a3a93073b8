"""A model's own answers to small sums, right and wrong: pairs for DPO, and responses for `trl-klx measure`.

python scripts/make_sums.py --model SmolLM2-135M-Instruct --output_dir runs/sums

`--model` is an instruction-tuned model; the docstring of scripts/benchmark_overhead.py says how to get one without the
Hub. Writes `preferences/train.jsonl` and `preferences/test.jsonl` (a right and a wrong answer to one sum, where the
model gave both) and `responses.jsonl`: all answers to the sums that no pair of `train` is about, with `correct` and the
tokens that were sampled, at temperature 1.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# Without one, a small model at temperature 1 talks about anything.
EXAMPLE = [
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "2 plus 3 is 5. The answer is 5."},
]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", default="runs/sums")
    parser.add_argument("--sums", type=int, default=40, help="how many; one in four is held out")
    parser.add_argument("--samples", type=int, default=4, help="answers to each")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    return parser.parse_args(arguments)


def is_right(text: str, total: int) -> bool:
    """Whether the last number of the answer is the sum."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and int(numbers[-1]) == total


def answer(model: Any, tokenizer: Any, numbers: tuple[int, int], samples: int) -> list[dict[str, Any]]:
    """Sampled answers to one sum, unfiltered."""
    prompt = [*EXAMPLE, {"role": "user", "content": f"What is {numbers[0]} plus {numbers[1]}?"}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**ids, num_return_sequences=samples)[:, ids["input_ids"].size(1) :]
    out = []
    for row in tokens.tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else None
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        right = end is not None and is_right(text, sum(numbers))
        out.append(
            {"prompt": prompt, "response_ids": row[:end], "text": text, "correct": right, "ended": end is not None}
        )
    return out


def pair(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first right and the first wrong answer that came to their ends, if both are there."""
    ended = [row for row in answers if row["ended"] and row["text"].strip()]
    sides = [next((row["text"] for row in ended if row["correct"] == right), None) for right in (True, False)]
    if None in sides:
        return []
    chosen, rejected = ([{"role": "assistant", "content": side}] for side in sides)
    return [{"prompt": answers[0]["prompt"], "chosen": chosen, "rejected": rejected}]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    # In place of the model's own, whose filters and penalties would sample from another distribution than its own.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = random.Random(0)
    sums = [(generator.randint(2, 12), generator.randint(2, 12)) for _ in range(args.sums)]
    torch.manual_seed(0)
    held_out = max(1, args.sums // 4)
    folder = Path(args.output_dir)
    (folder / "preferences").mkdir(parents=True, exist_ok=True)
    pairs: dict[str, list] = {"train": [], "test": []}
    responses = []
    for place, numbers in enumerate(sums):
        answers = answer(model, tokenizer, numbers, args.samples)
        split = "test" if place < held_out else "train"
        pairs[split] += pair(answers)
        if split == "test":
            names = ("prompt", "response_ids", "correct")
            responses += [
                {"id": f"{numbers[0]}+{numbers[1]}/{number}", **{name: row[name] for name in names}}
                for number, row in enumerate(answers)
            ]
    for split, found in pairs.items():
        write(folder / "preferences" / f"{split}.jsonl", found)
    write(folder / "responses.jsonl", responses)
    right = sum(row["correct"] for row in responses)
    print(f"{len(pairs['train'])} pairs, {len(pairs['test'])} held out")
    print(f"{right} of {len(responses)} held-out answers are right")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
