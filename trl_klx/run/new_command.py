"""`trl-klx new`: a recipe, a reward and two rows of data for a model, which run as they are and are to be changed."""

import json
import sys
from pathlib import Path

from transformers.utils import is_torch_bf16_gpu_available, is_torch_cuda_available

from ..cli.parser import CommandParser, UsageError
from ..trainers.checks.start import load_tokenizer

_QUESTIONS = {"What is 17 + 25? Answer with the number.": "42", "What is 9 * 8? Answer with the number.": "72"}
_WRONG = "I do not know."
_REWARD = '''\
"""A reward: one number per answer, higher is better. It is called with lists that have one entry per answer."""


def my_reward(completions, answer, **kwargs):
    """1 for an answer that contains the expected one, which is the column `answer` of the data, and 0 for any other."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(wanted in text) for text, wanted in zip(texts, answer)]
'''
_RECIPE = """\
# Run it with `trl-klx {algorithm} --config {recipe}`; with --dry_run it is only checked.
# `trl-klx {algorithm} --help` has every field, and `trl-klx explain --config {recipe}` the gradient of its KL.
# Paths begin in the folder in which the command runs.
model_name_or_path: {model}
dataset_name: {data}{rewards}
output_dir: {output}

{of_algorithm}
learning_rate: {rate}
max_steps: 10  # two rows are enough to see it run: give it more of both
seed: 0

# Machine
{machine}
logging_steps: 1
save_strategy: 'no'  # the model is saved at the end
report_to: none
"""
_HELD = """\
# The exact KL in reward and loss: the gradient of the sequence KL at its lowest variance. PID moves {beta} so that
# the KL stays at its target.
kl_estimator: exact
kl_placement: both
kl_controller: pid
kl_target: 0.02  # nats per token
{beta}: 0.02  # where it starts
"""
_OF_ALGORITHM = {
    "grpo": _HELD.format(beta="beta")
    + """
# A step: 8 answers to one prompt
per_device_train_batch_size: 8
num_generations: 8
max_completion_length: 128""",
    "ppo": _HELD.format(beta="kl_coef")
    + """
# A step: one answer to each of 2 prompts, and 4 passes over them
per_device_train_batch_size: 2
response_length: 128""",
    "dpo": """\
# DPO's loss, and the exact KL at the data's prefixes
beta: 0.1  # the scale of DPO's implicit reward
kl_coef: 0.1

# A step: 2 pairs
per_device_train_batch_size: 2
max_length: 512""",
}
_RATES = {"grpo": "1.0e-6", "ppo": "1.0e-6", "dpo": "5.0e-7"}


def command_parser(program: str) -> CommandParser:
    """What `trl-klx new` takes."""
    parser = CommandParser(
        prog=program,
        description="Write a recipe, a reward function (not for DPO) and two rows of data, which run as they are and "
        "are to be changed.",
    )
    parser.add_argument("algorithm", choices=list(_OF_ALGORITHM), help="what to train with")
    parser.add_argument("--model_name_or_path", required=True, help="a folder, or the name of a model on the Hub")
    parser.add_argument("--to", default=".", help="the folder to write to (default: this one)")
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx new") -> int:
    """Returns the exit status."""
    try:
        args = command_parser(program).parse_args(argv)
        recipe = write(args.algorithm, args.model_name_or_path, Path(args.to))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"run it: trl-klx {args.algorithm} --config {recipe}")
    return 0


def write(algorithm: str, model: str, folder: Path) -> Path:
    """Write the files of a new run; returns the recipe's path.

    Args:
        algorithm: grpo, ppo or dpo.
        model: a path, or a name on the Hub. Where its tokenizer has a chat template, the data is messages.
        folder: made where it is not there. The recipe's paths begin with it.

    Raises:
        ValueError: the model has no tokenizer, or a file is in the way or cannot be written.
    """
    tokenizer = load_tokenizer(model, f"model_name_or_path={model!r}", revision=None, trust_remote_code=False)
    is_chat, is_pairs = tokenizer.chat_template is not None, algorithm == "dpo"
    recipe, reward = folder / f"{algorithm}.yaml", folder / "my_reward.py"
    data = folder / ("pairs.jsonl" if is_pairs else "prompts.jsonl")
    text = _RECIPE.format(
        algorithm=algorithm,
        recipe=recipe.as_posix(),
        model=json.dumps(model),  # which YAML reads, whatever the path
        data=json.dumps(data.as_posix()),
        rewards="" if is_pairs else f"\nreward_funcs: [{json.dumps(f'{reward.as_posix()}:my_reward')}]",
        output=json.dumps((folder / "run").as_posix()),
        of_algorithm=_OF_ALGORITHM[algorithm],
        rate=_RATES[algorithm],
        machine=_machine(),
    )
    files = {recipe: text, data: _rows(is_chat=is_chat, is_pairs=is_pairs)}
    files |= {} if is_pairs else {reward: _REWARD}
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists: name another folder by --to, or move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_text(content)
            print(f"wrote {path}")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): name another folder by --to.") from error
    return recipe


def _rows(*, is_chat: bool, is_pairs: bool) -> str:
    """Two rows of data, as JSON lines."""

    def said(role: str, text: str) -> object:
        return [{"role": role, "content": text}] if is_chat else text

    rows = [
        {"prompt": said("user", question), "chosen": said("assistant", answer), "rejected": said("assistant", _WRONG)}
        if is_pairs
        else {"prompt": said("user", question), "answer": answer}
        for question, answer in _QUESTIONS.items()
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _machine() -> str:
    """What this machine can do, as fields."""
    if is_torch_cuda_available():
        return f"bf16: {str(is_torch_bf16_gpu_available()).lower()}"
    return "use_cpu: true\nbf16: false"
