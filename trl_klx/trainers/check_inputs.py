"""What is wrong with data and rewards, found before a model is loaded: the same for runs, dry runs and Python."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from .reward_calls import check_call, check_names, check_weights


def check_inputs(
    algorithm: str, args: Any, train_dataset: Any, eval_dataset: Any, rewards: Sequence[Any] = (), *, more: bool = False
) -> None:
    """Refuse data and rewards that a trainer cannot use.

    Args:
        algorithm: grpo, ppo or dpo.
        args: the config.
        train_dataset, eval_dataset: as the trainers take them; the latter may be a mapping of named ones.
        rewards: functions, models or their paths.
        more: whether a rollout function or an environment gives the reward functions more than the dataset does.

    Raises:
        ValueError: the first problem, in one sentence.
    """
    check_weights(getattr(args, "reward_weights", None), len(rewards) or None)
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    for split, dataset in {"train_dataset": train_dataset, **named}.items():
        if isinstance(dataset, (Dataset, IterableDataset)):
            for problem in split_problems(algorithm, split, dataset, rewards, more=more):
                raise ValueError(problem)


def split_problems(
    algorithm: str, split: str, dataset: Dataset | IterableDataset, rewards: Sequence[Any], *, more: bool = False
) -> Iterator[str]:
    """A sentence for everything that is wrong with a dataset, and with the rewards that read it."""
    columns = dataset.column_names  # None: a stream does not know them before it is read
    for reward in rewards:
        yield from _sentence(check_call, reward, columns, split, more=more)
    if rewards:
        yield from _sentence(check_names, columns, split)


def _sentence(check: Callable[..., None], *args: Any, **kwargs: Any) -> Iterator[str]:
    """What a check says; nothing where it passes."""
    try:
        check(*args, **kwargs)
    except ValueError as error:
        yield str(error)
