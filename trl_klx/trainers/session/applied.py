"""Whether the KL that was asked for really reaches loss, reward and log.

Our KL lives in methods of TRL's trainers. A library that patches TRL, or a subclass, may put others in their place,
and the run would go on without a KL, under the names of one.
"""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunError

# What may be missing, as the KL's code notes it in `KLSession.reached`.
KL_IN_LOSS = "a KL in the loss"
KL_IN_REWARD = "a KL in the reward"
REACHED = {"loss": KL_IN_LOSS, "reward": KL_IN_REWARD}
KL_MEASURED = "a measured KL"
KL_ON_DATA = "the exact KL on the data"
STEP_ENDED = "the end of the step, where beta moves"
_METHODS = (
    "training_step",
    "compute_loss",
    "_compute_loss",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_make_rollout",
    "_shape_rewards",
    "_update",
    "_loss",
)
_OURS = ("trl_klx", "trl", "transformers")


def wanted_kl(args: Any) -> set[str]:
    """Which parts of the KL every step of GRPO or PPO has to compute, by its config."""
    wanted = {KL_MEASURED} if args.kl_is_measured else set()
    if not args.kl_is_penalised:
        return wanted
    term = args.kl_term()
    return wanted | ({KL_IN_LOSS} if term.in_loss else set()) | ({KL_IN_REWARD} if term.in_reward else set())


class AppliedKLCheck(TrainerCallback):
    """Ends the run after its first step where a part of the KL was never reached.

    Args:
        trainer: with its `kl`, a `KLSession`.
        wanted: which of the parts above, besides the step's end.
    """

    def __init__(self, trainer: Any, wanted: set[str]) -> None:
        self._trainer, self._wanted = trainer, {STEP_ENDED, *wanted}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        missing = self._wanted - self._trainer.kl.reached
        # A step that was skipped may have ended early, and one that is left out computes nothing.
        if missing and not self._trainer.guard.in_a_row and not self._trainer.left_out:
            raise not_applied(self._trainer, *sorted(missing))


def the_only(found: Sequence[Any], trainer: Any) -> Any:
    """What one call of TRL's code computes once."""
    if len(found) != 1:
        raise not_applied(trainer, KL_MEASURED)
    return found[0]


def check_rollout(trainer: Any, batch: dict) -> None:
    """Raise where a rollout was not scored by the reference, or not by our code."""
    if "kl_prompts" not in batch or batch.get("ref_per_token_logps") is None:
        raise not_applied(trainer, KL_MEASURED)


def not_applied(trainer: Any, *missing: str) -> RunError:
    """The error of a run whose KL was bypassed by other code."""
    args = trainer.args
    foreign = _foreign_methods(trainer)
    by = f"{', '.join(foreign)} took the place of what computes it" if foreign else "other code took its place"
    return RunError(
        f"at step {trainer.state.global_step} the KL that was asked for ({args.kl_coef_name}={args.kl_coef_start:g}, "
        f"kl_placement={args.kl_placement!r}) was not applied: {' and '.join(missing)} never took place; {by}. Remove "
        "that override, or the import of the library that patches TRL, or train with TRL's own trainer."
    )


def _foreign_methods(trainer: Any) -> list[str]:
    """The methods of loss and rollout that are neither ours nor TRL's, by module and name."""
    places = [vars(trainer), *(vars(cls) for cls in type(trainer).__mro__)]
    found = {name: [place[name] for place in places if name in place] for name in _METHODS}
    functions = [function for versions in found.values() for function in versions if callable(function)]
    named = [f"{getattr(f, '__module__', '?')}.{getattr(f, '__qualname__', f)}" for f in functions]
    return sorted({name for name in named if name.split(".")[0] not in _OURS})
