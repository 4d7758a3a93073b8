"""Datasets of real tasks in the form that the trainers take: functions of one row, for `dataset_prepare`."""

from typing import Any

_INSTRUCTION = "Reason step by step, and give the final answer as a number after ####."


def gsm8k_prompts(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K as a conversational prompt and its answer, the number after `####` without commas.

    Args:
        row: of `openai/gsm8k`: `question`, and `answer`, a worked solution that ends in `#### 1,234`.

    Returns:
        `prompt`, a list with one user message, and `answer`, for `trl_klx.rewards.final_number`.

    Raises:
        ValueError: the worked solution has no `####`.

    Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems" (2021).
    """
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"the answer {solution or answer!r} has no ####: GSM8K's solutions end in #### and a number.")
    prompt = [{"role": "user", "content": f"{row['question']}\n{_INSTRUCTION}"}]
    return {"prompt": prompt, "answer": answer.strip().replace(",", "")}
