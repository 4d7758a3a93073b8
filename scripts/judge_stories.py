"""Judges what story models write: proxy and gold reward, how well the two agree, and what best-of-n would do.

python recipes/tinystories-15m/prepare.py
python scripts/judge_stories.py runs/stories/model runs/grpo_exact_none/checkpoint-30 runs/grpo_exact_none

Samples answers to the held-out prompts of recipes/tinystories-15m from each model. For the first model it also predicts
over-optimisation without training: the best of n answers by the proxy, its gold reward, and the law fitted to it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from best_of_n import best_of_n
from numpy.typing import NDArray
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_klx.monitor.overoptimisation.law import fit_law

sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tinystories-15m"))
from rewards import cheerful_story, story_judge, vader_sentiment

Texts = list[list[str]]  # (P, N)
BATCH_SIZE, ANSWER_TOKENS = 64, 40


@torch.inference_mode()
def sample(path: str, prompts: list[str], answers: int, seed: int = 0) -> Texts:
    """(P, N) answers at temperature 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    torch.manual_seed(seed)
    repeated, texts = [prompt for prompt in prompts for _ in range(answers)], []
    for start in range(0, len(repeated), BATCH_SIZE):
        batch = tokenizer(repeated[start : start + BATCH_SIZE], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        tokens = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS)
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[start : start + answers] for start in range(0, len(texts), answers)]


def mean(values: NDArray) -> str:
    """Mean over prompts and answers ± standard error that counts prompts."""
    by_prompt = values.mean(1)
    return f"{by_prompt.mean():.3f} ± {by_prompt.std(ddof=1) / len(by_prompt) ** 0.5:.3f}"


def agreement(proxy: NDArray, gold: NDArray, draws: int = 1000) -> str:
    """Rank correlation of the two rewards over all answers, with a 95 % interval by a bootstrap over prompts."""
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(draws):
        rows = rng.integers(len(proxy), size=len(proxy))
        resampled.append(spearmanr(proxy[rows].ravel(), gold[rows].ravel()).statistic)
    low, high = np.nanquantile(resampled, (0.025, 0.975))  # a draw of equal rewards only has no rank correlation
    return f"{spearmanr(proxy.ravel(), gold.ravel()).statistic:.2f} ({low:.2f} to {high:.2f})"


def judge(path: str, rows: list[dict[str, str]], texts: Texts) -> tuple[NDArray, NDArray]:
    """Print a table's row for a model; returns (P, N) proxy and gold rewards."""
    proxy = np.array([vader_sentiment(answers) for answers in texts])
    gold = np.array(
        [cheerful_story(answers, [row["corpus"]] * len(answers)) for row, answers in zip(rows, texts, strict=True)]
    )
    judged = [[story_judge(row["corpus"]).parts(text) for text in own] for row, own in zip(rows, texts, strict=True)]
    parts = [mean(np.array([[p[name] for p in own] for own in judged])) for name in ("cheer", "fluency", "variety")]
    print(f"| {path} | {mean(proxy)} | {mean(gold)} | {' | '.join(parts)} | {agreement(proxy, gold)} |")
    return proxy, gold


def predict(proxy: NDArray, gold: NDArray) -> None:
    """Print what choosing the best of n answers by the proxy would do, and the law's peak."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= proxy.shape[1]]
    kl, chosen_proxy, chosen_gold = best_of_n(proxy, gold, sizes)
    print("\n| best of | KL, nats per sequence | proxy | gold |\n|---|---|---|---|")
    for n, value, p, g in zip(sizes, kl, chosen_proxy, chosen_gold, strict=True):
        print(f"| {n} | {value:.3f} | {mean(p[:, None])} | {mean(g[:, None])} |")
    fit = fit_law(kl, chosen_gold, law="best_of_n")
    if fit is not None:
        low, high = fit.peak_kl_interval
        print(
            f"\nalpha {fit.alpha:.3f}, beta {fit.beta:.3f}; peak at a KL of {fit.peak_kl:.3g} ({low:.3g} to {high:.3g})"
        )


def main(argv: list[str] | None = None) -> None:
    """Print the tables and an answer of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models; the first is the reference")
    parser.add_argument("--data", default="runs/stories/data", help="folder of the prompts (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=8, help="answers per prompt (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (Path(args.data) / "test.jsonl").read_text().splitlines()][: args.prompts]
    print("| model | proxy | gold | cheer | fluency | variety | rank correlation |\n|---|---|---|---|---|---|---|")
    written = {path: sample(path, [row["prompt"] for row in rows], args.answers) for path in args.models}
    rewards = {path: judge(path, rows, texts) for path, texts in written.items()}
    predict(*rewards[args.models[0]])
    for path, texts in written.items():
        print(f"\n{path}: {rows[0]['prompt']} [{' '.join(texts[0][0].split())}]")


if __name__ == "__main__":
    main()
