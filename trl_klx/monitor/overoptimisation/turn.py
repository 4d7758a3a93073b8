"""The turn: when the gold reward is below its best by more than chance, over a whole run.

Shape legend: E evaluations, P prompts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

FALSE_ALARM_RATE = 0.05  # of a whole run whose gold reward never falls


@dataclass(frozen=True)
class Turn:
    """How far the gold reward at the last evaluation is below that of evaluation `best`, with its standard error."""

    best: int
    fall: float
    fall_se: float


def find_turn(gold: ArrayLike, evaluations: int, *, false_alarm_rate: float = FALSE_ALARM_RATE) -> Turn | None:
    r"""The turn, if the last of E evaluations is below an earlier one by more than chance; None otherwise.

    The last evaluation is compared with each earlier one, prompt by prompt: a prompt's difficulty cancels, and
    prompts, not answers, are independent. For the differences D_p between an earlier evaluation and the last,

        t = mean(D) / (std(D) / sqrt(P)),     p-value = P(Student's t with P - 1 degrees of freedom > t)

    and the turn is found where p < false_alarm_rate / (number of pairs of evaluations in the run) (Bonferroni). So the
    chance that any evaluation of a run raises a false alarm is at most `false_alarm_rate`, as far as the t-test holds,
    whether the gold reward is flat or rises. No p-value is taken to be below 2^-P, the smallest that the signs of P
    differences allow: with few prompts, all of them agreeing proves little.

    Args:
        gold: (E, P) gold reward by prompt, the mean over its answers; NaN where there is none. Call it after each
            evaluation: only the last is judged.
        evaluations: how many the run will have; more than that are counted as they come.
        false_alarm_rate: for the run.
    """
    by_prompt = np.asarray(gold, float)
    planned = max(evaluations, len(by_prompt))
    threshold = false_alarm_rate / max(planned * (planned - 1) / 2, 1)
    differences = by_prompt[:-1] - by_prompt[-1:]
    counted = np.isfinite(differences)
    prompts = counted.sum(1)
    fall = np.where(counted, differences, 0.0).sum(1) / np.maximum(prompts, 1)
    squares = np.where(counted, differences - fall[:, None], 0.0) ** 2
    fall_se = np.sqrt(squares.sum(1) / np.maximum(prompts - 1, 1) / np.maximum(prompts, 1))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: nothing has changed
        chance = np.where(fall == 0, 1.0, student.sf(fall / fall_se, np.maximum(prompts - 1, 1)))
    significant = np.maximum(chance, 0.5**prompts) < threshold
    if not significant.any():
        return None
    best = int(np.argmax(np.where(significant, np.nanmean(by_prompt[:-1], axis=1), -np.inf)))
    return Turn(best, float(fall[best]), float(fall_se[best]))
