"""GRPO's recipes."""

from collections.abc import Iterator
from typing import Any

from ...kl.sampling import KL, enumerated_policy, reading, sampler_logits
from ...trainers.checks.rows import PROMPTS
from ...trainers.grpo.precision import rounded_target
from ...trainers.grpo.sampling_settings import changed_sampling, in_words, settings_of
from ...trainers.seams import FUSED_LM_HEAD
from .algorithm import (
    PROMPT_TOKENS,
    Algorithm,
    Batches,
    Inputs,
    Shape,
    off_policy_note,
    trainer_arguments,
    vllm_notes,
)
from .arguments import Recipe


class _GRPO(Algorithm):
    """Prompts, and reward functions with the columns that they read."""

    name = "grpo"
    rows = PROMPTS

    @property
    def config(self) -> type:
        from ...trainers.grpo.config import KLXGRPOConfig

        return KLXGRPOConfig

    def build(self, recipe: Recipe, inputs: Inputs) -> Any:
        from ...trainers.grpo.trainer import KLXGRPOTrainer

        model = recipe.run.reward_model_name_or_path
        rewards = [*([] if model is None else [model]), *inputs.rewards]  # in the order of TRL's script
        return KLXGRPOTrainer(reward_funcs=rewards, gold_reward_func=inputs.gold, **trainer_arguments(recipe, inputs))

    def shape(self, args: Any) -> Shape:
        rows, answer = args.per_device_train_batch_size, args.max_completion_length
        rollout = rows * args.steps_per_generation
        return Shape(rows, PROMPT_TOKENS + answer, answer, generated=rollout, kept=rollout, fuses_head=FUSED_LM_HEAD)

    def batches(self, args: Any, processes: int) -> Batches:
        answers = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        prompts = args.per_device_train_batch_size * args.steps_per_generation * processes // args.num_generations
        steps = self.updates_per_rollout(args)
        lines = [
            f"a step: {answers} answers; a rollout: {prompts} prompts, {args.num_generations} answers each",
            f"optimizer steps per rollout: {steps:g}",
        ]
        return Batches(lines, prompts, steps)

    def updates_per_rollout(self, args: Any) -> float:
        return args.num_iterations * (args.steps_per_generation or 1) / args.gradient_accumulation_steps

    def notes(self, args: Any) -> Iterator[str]:
        term = args.kl_term()
        if args.kl_is_penalised and self.updates_per_rollout(args) > 1:
            yield (
                "Off-policy: answers come from another policy than the one that learns (num_iterations="
                f"{args.num_iterations} and steps_per_generation={args.steps_per_generation}). {off_policy_note(term)}"
            )
        if args.kl_is_penalised and args.use_vllm:
            yield from vllm_notes(args)
        if term.in_reward and args.kl_is_penalised and args.scale_rewards not in ("none", False):
            yield (
                f"scale_rewards={args.scale_rewards!r} divides the rewards by their standard deviation. The KL is "
                "subtracted afterwards, so it is not amplified where all answers score alike; beta weighs nats against "
                "rewards of standard deviation one."
            )
        if args.loss_type in ("grpo", "sapo") and args.kl_is_penalised:
            yield (
                f"loss_type={args.loss_type!r} divides by each answer's length: short answers weigh more per "
                "token, and the KL's gradient is not a multiple of the one above (7 to 38 % off on enumerated "
                "policies). "
                "'dapo' and 'dr_grpo' keep its direction."
            )
        rounded = rounded_target(args)
        if rounded is not None:
            yield rounded
        if changed_sampling(args):
            yield _changed_sampling(args)
        if args.mask_truncated_completions:
            yield (
                "mask_truncated_completions=true: the KL of answers that were cut off is neither penalised nor counted."
            )


def _changed_sampling(args: Any) -> str:
    """Of a recipe that samples from another distribution than it scores: what is done, and what stays wrong."""
    asked = in_words(changed_sampling(args))
    start = f"{asked}: answers are sampled from another distribution than the one that is scored; "
    if args.use_transformers_continuous_batching and not args.use_vllm:
        return f"{start}with use_transformers_continuous_batching nothing measures or corrects it."
    given = settings_of(args)
    sampler = sampler_logits(
        enumerated_policy().policy,
        temperature=given.get("temperature", args.temperature) / args.temperature,
        top_p=given.get("top_p", args.top_p) or 1.0,
        min_p=given.get("min_p", args.min_p) or 0.0,
    )
    k1, k3 = (reading(name, sampler, is_weighted=True) for name in ("k1", "k3"))
    example = f" (k1 reads {k1:.3f} and k3 {k3:.3f} on enumerated policies where {KL:.3f} is right)"
    return (
        f"{start}logged estimates and a weighted KL loss are corrected by the sampler's own log-probs, up to what it "
        f"never samples{example if round(k3, 3) != KL else ''}, and a KL in the reward "
        f"{'too' if args.kl_term().reward_at_update else 'is not'}; the run reports at its first rollout how far the "
        "two are apart."
    )


GRPO = _GRPO()
