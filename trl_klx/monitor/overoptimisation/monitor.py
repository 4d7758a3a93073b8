"""Over-optimisation of one run: gold and proxy reward against the KL, as table, picture and verdict.

The numbers come from evaluations; `law` has the laws, `turn` the test.
"""

import csv
import logging
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import whole
from ..metrics import finite
from ..uncertainty import ratio
from .law import LawFit, fit_law
from .plot import plot_overoptimisation
from .turn import FALSE_ALARM_RATE, Turn, find_turn

TABLE, PICTURE = "overoptimisation.csv", "overoptimisation.png"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: means over prompts, with standard errors that count prompts as independent.

    Attributes:
        step: of training.
        kl, kl_se: KL(policy || reference), nats per sequence.
        proxy, proxy_se: the reward that training maximises.
        gold, gold_se: the reward that it is meant to raise.
        by_prompt: gold reward by prompt number.
    """

    step: int
    kl: float
    kl_se: float
    proxy: float
    proxy_se: float
    gold: float
    gold_se: float
    by_prompt: dict[int, float] = field(repr=False)

    @property
    def d(self) -> float:
        """The square root of the KL; an estimate below 0 is noise, and counts as 0."""
        return math.sqrt(max(self.kl, 0.0))


class OveroptimisationMonitor(TrainerCallback):
    """Follows the gold reward over a run's evaluations, the same on every process.

    The trainer hands it the rewards of an evaluation (`measure`, `end_evaluation`); as a callback it writes
    `<output_dir>/overoptimisation.csv` and `.png` after each, reports when the gold reward has turned, and stops the
    run there if asked to.

    Args:
        action: "warn" or "stop".

    Attributes:
        evaluations: so far, in the order of their steps.
        fit: the law fitted to them, up to the turn: what comes long after it follows no law. None where there are too
            few.
        turn: of the last evaluation; None while the gold reward is not below its best.
        turned_at: the step at which that began; None likewise.
    """

    def __init__(self, action: str = "warn") -> None:
        self._action = action
        self._planned = 0  # evaluations of the run
        self.restart()

    def restart(self) -> None:
        """Begin a run."""
        self.evaluations: list[Evaluation] = []
        self.fit: LawFit | None = None
        self.turn: Turn | None = None
        self.turned_at: int | None = None
        self._rows: list[tuple[NDArray, NDArray, NDArray]] = []

    @property
    def safe_budget(self) -> float | None:
        """Half the KL at the fitted peak, nats per sequence; None until the evaluations determine where the peak is."""
        return None if self.fit is None else self.fit.safe_budget

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the highest gold reward."""
        return max(self.evaluations, key=lambda evaluation: evaluation.gold, default=None)

    @property
    def gold_by_prompt(self) -> NDArray:
        """(E, P) gold reward of each evaluation by prompt, NaN where there is none."""
        prompts = sorted({prompt for evaluation in self.evaluations for prompt in evaluation.by_prompt})
        rows = [[e.by_prompt.get(prompt, math.nan) for prompt in prompts] for e in self.evaluations]
        return np.array(rows, dtype=float).reshape(len(self.evaluations), len(prompts))

    @property
    def ends_run(self) -> bool:
        """Whether training ends here because the gold reward has turned."""
        return self._action == "stop" and self.turn is not None

    @property
    def is_measuring(self) -> bool:
        """Whether answers were measured since the last evaluation ended."""
        return bool(self._rows)

    def measure(self, prompts: Tensor, proxy: Tensor, gold: Tensor) -> None:
        """Add answers of the running evaluation, of all processes: (B,) prompt numbers, proxy and gold rewards.

        The number of a prompt has to be the same at every evaluation. A reward that is not finite does not count.
        """
        self._rows.append((prompts.cpu().numpy(), proxy.cpu().double().numpy(), gold.cpu().double().numpy()))

    def end_evaluation(self, step: int, kl: float | None, kl_se: float | None) -> dict[str, float]:
        """Close the running evaluation; returns its metrics, without those that there is too little data for.

        Args:
            step: of training.
            kl, kl_se: nats per sequence; without a KL the evaluation is logged only.
        """
        rows, self._rows = self._rows, []
        prompts, proxy, gold = (np.concatenate(column) for column in zip(*rows, strict=True))
        gold_of, proxy_of = _by_prompt(prompts, gold), _by_prompt(prompts, proxy)
        of_gold, of_proxy = (ratio(np.array(list(of.values())), np.ones(len(of))) for of in (gold_of, proxy_of))
        metrics = {"rewards/gold/mean": of_gold.mean, "rewards/gold/se": of_gold.se}
        if kl is not None and math.isfinite(of_gold.mean):
            # An evaluation at the same step, or a later one of a run that was resumed, is the same one made again.
            self.evaluations = [e for e in self.evaluations if e.step < step]
            self.turned_at = None if self.turned_at == step else self.turned_at
            kl_se = math.nan if kl_se is None else kl_se
            self.evaluations.append(Evaluation(step, kl, kl_se, *of_proxy[:2], *of_gold[:2], gold_of))
            self._judge()
            metrics |= self._metrics()
        return finite(metrics)

    def _judge(self) -> None:
        gold = self.gold_by_prompt
        self.turn = find_turn(gold, self._planned)
        if self.turn is None:
            self.turned_at = None
        elif self.turned_at is None:
            self.turned_at = self.evaluations[-1].step
        fitted = self._fitted
        self.fit = fit_law([e.kl for e in fitted], gold[: len(fitted)], [e.kl_se for e in fitted])

    @property
    def _fitted(self) -> list[Evaluation]:
        """The evaluations up to the turn."""
        return [e for e in self.evaluations if self.turned_at is None or e.step <= self.turned_at]

    def _metrics(self) -> dict[str, float]:
        numbers = {"turned": float(self.turn is not None)}
        if self.fit is not None:
            low, high = self.fit.peak_kl_interval
            numbers |= {"alpha": self.fit.alpha, "beta": self.fit.beta, "peak_kl": self.fit.peak_kl}
            numbers |= {"peak_kl_low": low, "peak_kl_high": high}
        if self.safe_budget is not None:
            numbers["safe_budget"] = self.safe_budget
        return {f"overoptimisation/{name}": number for name, number in numbers.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.eval_strategy == IntervalStrategy.STEPS:
            self._planned = state.max_steps // max(int(state.eval_steps), 1)
        else:
            self._planned = math.ceil(state.num_train_epochs)
        self._planned += bool(args.eval_on_start)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.evaluations:
            return
        folder = Path(args.output_dir or ".")
        if state.is_world_process_zero:
            self._write(folder)
            if self.turn is not None and self.turned_at == self.evaluations[-1].step:
                logger.warning(self._announcement(self.turn, folder))
        if self.ends_run:
            control.should_save = control.should_training_stop = True

    def _announcement(self, turn: Turn, folder: Path) -> str:
        best, now = self.evaluations[turn.best], self.evaluations[-1]
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{best.step}"
        kept = "no checkpoint of the best was written (save_strategy='best' writes one)"
        if best.step == 0:
            kept = "the best is where the run started"
        elif checkpoint.is_dir():
            kept = f"the best is kept in {checkpoint}"
        return (
            f"The gold reward has turned: {now.gold:.3g} at step {now.step} (KL {now.kl:.3g} nats per sequence), "
            f"{turn.fall:.2g} ± {turn.fall_se:.2g} below the {best.gold:.3g} at step {best.step} (KL {best.kl:.3g}), "
            f"while the reward that is trained on went from {best.proxy:.3g} to {now.proxy:.3g}; {kept}; "
            f"{'training stops here' if self._action == 'stop' else 'training continues'}. (In a run whose gold reward "
            f"never falls, the chance of this message is at most {100 * FALSE_ALARM_RATE:g} %.)"
        )

    def summary(self) -> str:
        """What the run did to the gold reward, in two or three sentences."""
        if not self.evaluations or self.best is None:
            return "Over-optimisation: there was no evaluation."
        named = {"first": self.evaluations[0], "at its best": self.best, "last": self.evaluations[-1]}
        texts = [f"{e.gold:.3f} ± {e.gold_se:.3f} {where} (step {e.step}, KL {e.kl:.3g})" for where, e in named.items()]
        text = f"Gold reward: {', '.join(texts)}; it has {'turned' if self.turn else 'not turned'}."
        if self.fit is None:
            return f"{text} There are too few evaluations for a law."
        low, high = self.fit.peak_kl_interval
        text += (
            f" The fitted law peaks at a KL of {self.fit.peak_kl:.3g} nats per sequence (95 %: {low:.3g} to {high:.3g})"
        )
        budget = self.safe_budget
        return f"{text}: {'too wide for a budget' if budget is None else f'a safe budget is {budget:.3g}'}."

    def _write(self, folder: Path) -> None:
        """The table and the picture, each whole or not at all."""
        try:
            rows = self.table()
            with whole(folder / TABLE) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            with whole(folder / PICTURE) as partial:
                plot_overoptimisation(rows, partial, self.fit, self.turned_at)
        except OSError as error:  # a full disk must not cost the run; the next checkpoint reports it
            logger.warning("%s and %s could not be written (%s)", folder / TABLE, PICTURE, error)

    def table(self) -> list[dict[str, float]]:
        """One row per evaluation: step, KL, d, both rewards with errors; up to the turn, the law with its band."""
        rows = [{**asdict(evaluation), "d": evaluation.d} for evaluation in self.evaluations]
        for row in rows:
            del row["by_prompt"]
        if self.fit is not None:
            d = np.array([evaluation.d for evaluation in self._fitted])
            columns = zip(self.fit.gold(d), *self.fit.band(d), strict=True)
            for row, numbers in zip(rows, columns, strict=False):
                row |= dict(zip(("law", "law_low", "law_high"), map(float, numbers), strict=True))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable."""
        evaluations = [asdict(evaluation) for evaluation in self.evaluations]
        return {"evaluations": evaluations, "turned_at": self.turned_at, "planned": self._planned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.restart()
        for row in state["evaluations"]:
            by_prompt = {int(prompt): float(value) for prompt, value in row["by_prompt"].items()}
            self.evaluations.append(Evaluation(**{**row, "by_prompt": by_prompt}))
        self.turned_at, self._planned = state["turned_at"], int(state["planned"])
        if self.evaluations:
            self._judge()


def _by_prompt(prompts: NDArray, values: NDArray) -> dict[int, float]:
    """The mean over each prompt's answers that have a value."""
    collected: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            collected[prompt].append(value)
    # Seven digits, more than any reward has: every checkpoint keeps all of them.
    return {prompt: float(f"{sum(found) / len(found):.7g}") for prompt, found in sorted(collected.items())}
