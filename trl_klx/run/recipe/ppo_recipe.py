"""PPO's recipes."""

from collections.abc import Iterator
from typing import Any

from ...trainers.checks.rows import PROMPTS_OR_TOKENS
from .algorithm import PROMPT_TOKENS, Algorithm, Batches, Inputs, Shape, off_policy_note, trainer_arguments, vllm_notes
from .arguments import Recipe


class _PPO(Algorithm):
    """Prompts, and rewards from functions, a model or both; a value model may start from a model of its own."""

    name = "ppo"
    rows = PROMPTS_OR_TOKENS
    has_value_model = True
    halves_adapters = False
    scores_answers = True

    @property
    def config(self) -> type:
        from ...trainers.ppo.config import KLXPPOConfig

        return KLXPPOConfig

    def build(self, recipe: Recipe, inputs: Inputs) -> Any:
        from ...trainers.ppo.trainer import KLXPPOTrainer

        return KLXPPOTrainer(
            reward_funcs=inputs.rewards,
            gold_reward_func=inputs.gold,
            reward_model=recipe.args.reward_model_path,
            value_model=recipe.args.value_model_path,
            **trainer_arguments(recipe, inputs),
        )

    def shape(self, args: Any) -> Shape:
        rows, answer = args.per_device_train_batch_size, args.response_length
        at_once = min(args.rollout_size, args.local_rollout_forward_batch_size)
        memory = {"generated": at_once, "kept": args.rollout_size, "scored_at_once": at_once}
        lengths = {"tokens": PROMPT_TOKENS + answer, "scored": answer}
        return Shape(rows, **lengths, **memory, fuses_head=True, scores_in_chunks=True)

    def updates_per_rollout(self, args: Any) -> float:
        return args.num_ppo_epochs * args.num_mini_batches

    def batches(self, args: Any, processes: int) -> Batches:
        rollout, updates = args.rollout_size * processes, self.updates_per_rollout(args)
        line = f"a step: a rollout of {rollout} prompts, one answer each, and {updates} optimizer steps on it"
        return Batches([line], rollout)

    def problems(self, args: Any, rows: int, processes: int) -> Iterator[str]:
        rollout = args.rollout_size * processes
        if rows < rollout:
            yield (
                f"the dataset has {rows} prompts and a rollout takes {rollout} "
                "(per_device_train_batch_size * gradient_accumulation_steps * processes): lower one of these."
            )

    def notes(self, args: Any) -> Iterator[str]:
        updates, term = self.updates_per_rollout(args), args.kl_term()
        if updates > 1 and args.kl_is_penalised:
            yield (
                f"Off-policy: a rollout serves {updates} optimizer steps (num_ppo_epochs={args.num_ppo_epochs}, "
                f"num_mini_batches={args.num_mini_batches}). {off_policy_note(term)}"
            )
        if args.use_vllm and args.kl_is_penalised:
            yield from vllm_notes(args)
        in_advantages = term.in_reward and not term.reward_at_update
        if args.gamma < 1 and in_advantages:
            yield f"gamma={args.gamma} discounts later tokens' KL: the gradient moves from KLseq towards P."
        if args.lam < 1 and in_advantages:
            yield f"lam={args.lam}: a KL in the reward is unbiased only as far as the value model predicts it."
        if args.whiten_rewards and term.in_reward:
            yield "whiten_rewards=true divides reward and KL by one number, so kl_coef keeps its meaning."


PPO = _PPO()
