"""What only one algorithm does with a recipe: an object for each, asked by runs, dry runs and `explain`."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset, IterableDataset
from trl import get_peft_config, get_quantization_config

from ...kl.term import KLTerm
from ...kl.variance import REUSED, stale
from ...trainers.checks.quantised import bits_of
from ...trainers.checks.rows import RowKind
from ...trainers.shared.correction import reward_correction
from .arguments import Recipe
from .help import help_parser

PROMPT_TOKENS = 256  # assumed, where no field bounds the prompts


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, checked and loaded; the models are left to the trainer."""

    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    rewards: list[Callable] = field(default_factory=list)
    gold: Callable | None = None


class Shape(NamedTuple):
    """Rows on one process, and the tokens of each."""

    rows: int  # of a micro-batch
    tokens: int
    scored: int  # of the tokens, those that logits are kept for
    generated: int = 0  # rows of a generation batch
    kept: int = 0  # rows whose hidden states of the reference are kept for an exact KL
    scored_at_once: int = 0  # rows that are scored without a gradient
    fuses_head: bool = False  # whether the loss is computed in chunks of the output head, without whole logits
    scores_in_chunks: bool = False  # whether these are ours, exact KL or not


class Batches(NamedTuple):
    """The arithmetic of a batch over all processes, in words too."""

    lines: list[str]
    rows: int  # of the dataset that are read at once
    steps: float = 1  # that the trainer counts for them
    uses_rest: bool = False  # whether what remains at an epoch's end makes a smaller batch


class Algorithm(ABC):
    """An algorithm's name, what it reads of each row, and what only it does with a recipe."""

    name: ClassVar[str]
    rows: ClassVar[RowKind]
    has_value_model: ClassVar[bool] = False
    halves_adapters: ClassVar[bool] = True  # whether an adapter on a quantised policy becomes bfloat16, as in TRL
    scores_answers: ClassVar[bool] = False  # whether answers are scored under the policy once more, KL or not

    @property
    @abstractmethod
    def config(self) -> type:
        """The trainer's config class, imported when it is asked for. Raises ImportError where TRL lacks it."""

    @abstractmethod
    def build(self, recipe: Recipe, inputs: Inputs) -> Any:
        """The trainer that a recipe describes, which loads the models."""

    @abstractmethod
    def shape(self, args: Any) -> Shape:
        """Rows and tokens on one process."""

    @abstractmethod
    def batches(self, args: Any, processes: int) -> Batches:
        """The batches of all processes."""

    @abstractmethod
    def notes(self, args: Any) -> Iterator[str]:
        """What, beside estimator, placement and weight, changes what the KL does; one sentence each."""

    def updates_per_rollout(self, args: Any) -> float:
        """Optimizer steps that a rollout's answers are used for."""
        return 1

    def is_off_policy(self, args: Any) -> bool:
        """Whether answers come from another policy than the one that learns: an earlier one, or an engine's."""
        return self.updates_per_rollout(args) > 1 or getattr(args, "use_vllm", False)

    def loads_reference(self, args: Any) -> bool:
        """Whether a reference is in memory during training."""
        return bool(args.kl_is_measured)

    def problems(self, args: Any, rows: int, processes: int) -> Iterator[str]:
        """Sentences about a dataset of so many rows."""
        return iter(())

    def command_parser(self, program: str) -> ArgumentParser:
        """What the command takes, for help and completion."""
        return help_parser(program, self.config)


def trainer_arguments(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments that all trainers share, as TRL's own scripts set them."""
    args, model = recipe.args, recipe.model
    args.model_init_kwargs = {
        **(args.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {
        "model": model.model_name_or_path,
        "args": args,
        "train_dataset": inputs.train_dataset,
        "eval_dataset": inputs.eval_dataset,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def off_policy_note(term: KLTerm) -> str:
    """What becomes of the KL's gradient where answers come from another policy than the one that learns."""
    behind = " and ".join(f"{kl:.2f}" for kl in REUSED)
    figures = f"On enumerated policies, {behind} nats per answer from their sampler, the gradient is {_stale(term)}"
    own = f"{figures} times its variance on the policy's own answers."
    if not term.in_reward:
        return f"{loss_off_policy(term)} {own}"
    if term.reward_at_update:
        return (
            "The KL in the reward is charged at every update, at the present policy's values and with the weights "
            f"of the tokens around ({term.weight_level}): only a bound on these biases it. {own}"
        )
    return (
        "A KL in the reward keeps the values of the policy that sampled, and the policy gradient's token ratio does "
        f"not make up for it. {own} kl_importance_sampling='prefix' charges it at every update instead: "
        f"{_stale(replace(term, weight_level='prefix'))} times."
    )


def _stale(term: KLTerm) -> str:
    """Errors and variances of the whole gradient on stale answers."""
    found = [stale(term, behind) for behind in REUSED]
    errors = " and ".join(f"{100 * one.error:.0f} %" for one in found)
    return f"{errors} off, at {' and '.join(f'{one.variance:.1f}' for one in found)}"


def loss_off_policy(term: KLTerm) -> str:
    """The same of a KL in the loss, or of the half that is there."""
    if term.estimator == "exact" and not term.takes_weights:
        return "The exact KL in the loss needs no weight: it averages over the policy's own tokens itself."
    if term.takes_weights:
        up_to = "" if term.weight_level in ("prefix", "sequence") else ", up to the states, which stay the sampler's"
        return f"The weight on the KL loss ({term.weight_level}) corrects for it{up_to}."
    return "The KL loss has no weight, so its gradient is biased: kl_importance_sampling='token' corrects it."


def quantised_notes(recipe: Recipe) -> Iterator[str]:
    """What a quantised policy makes of the KL."""
    bits = bits_of(vars(recipe.model))
    if bits and recipe.args.kl_is_measured:
        yield (
            f"load_in_{bits}bit=true: the reference is the same {bits}-bit weights without the adapter. What rounding "
            "did to them is in both and not in the KL, which is no distance to the model in 16 bits."
        )


def vllm_notes(args: Any) -> Iterator[str]:
    """What an engine's answers make of a KL that is penalised."""
    term, in_reward = args.kl_term(), reward_correction(args)
    if term.in_loss:
        yield f"use_vllm=true: the engine's log-probs differ from the trainer's. {loss_off_policy(term)}"
    if in_reward is not None:
        yield f"{in_reward} kl_importance_sampling='prefix' has weights of its own and is exact in any mode."
    elif term.reward_at_update:
        yield (
            "use_vllm=true: the KL in the reward has weights of policy to engine of its own "
            f"({term.weight_level}); TRL's vllm_importance_sampling_mode acts on the rewards alone."
        )
    if args.vllm_mode == "server":
        yield (
            "vllm_mode='server': start the server with --logprobs-mode processed_logprobs (trl vllm-serve does); raw "
            "log-probs know nothing of temperature and filters, and the weights are then wrong."
        )
