"""DPO's recipes."""

from collections.abc import Iterator
from typing import Any

from ...trainers.checks.rows import PAIRS
from ...trainers.seams import FUSED_LM_HEAD
from .algorithm import Algorithm, Batches, Inputs, Shape, trainer_arguments
from .arguments import Recipe

_MAX_LENGTH = 1024  # assumed, where max_length is null


class _DPO(Algorithm):
    """Pairs of answers, whose prompt may be left to TRL to find; the KL is probed on prompts of the test split."""

    name = "dpo"
    rows = PAIRS

    @property
    def config(self) -> type:
        from ...trainers.dpo.config import KLXDPOConfig

        return KLXDPOConfig

    def build(self, recipe: Recipe, inputs: Inputs) -> Any:
        """Its reference is the model that it starts from."""
        from ...trainers.dpo.trainer import KLXDPOTrainer

        return KLXDPOTrainer(**trainer_arguments(recipe, inputs))

    def shape(self, args: Any) -> Shape:
        rows, length = 2 * args.per_device_train_batch_size, args.max_length or _MAX_LENGTH
        probed = 0 if args.kl_probe_steps is None else args.per_device_eval_batch_size
        return Shape(rows, length, length, generated=probed, kept=rows, fuses_head=FUSED_LM_HEAD)

    def batches(self, args: Any, processes: int) -> Batches:
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        return Batches([f"a step: {pairs} pairs"], pairs, uses_rest=True)

    def notes(self, args: Any) -> Iterator[str]:
        yield (
            f"DPO's own loss holds the policy near the reference with beta={args.beta}, on the log-ratios of the "
            "pairs; those are not a KL. kl_coef adds the exact KL at the data's prefixes."
        )
        if args.kl_probe_steps is None:
            yield "No probe: the policy's own KL is not measured; kl_probe_steps=100 samples answers and logs it."
        if args.kl_controls == "beta" and args.kl_controller != "fixed":
            yield (
                "kl_controls='beta': beta also scales DPO's gradient, so the controller is a learning-rate schedule "
                "too."
            )


DPO = _DPO()
