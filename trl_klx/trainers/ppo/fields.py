"""PPO's own options: those of TRL's `PPOConfig`, which only TRL 1.12 has, under its names, and a few more."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..shared.vllm_options import VLLMArguments


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOArguments(VLLMArguments):
    """What PPO needs beside transformers' options and the KL's, one declaration for every version of TRL.

    It is not TRL's `PPOConfig`, nor a subclass of it, so that a config is the same class with the same fields
    everywhere. Nothing but TRL's own PPO trainer reads that class. Its fields that hold a result and not a choice
    (`batch_size`, `world_size` and the like) do not exist here.
    """

    learning_rate: float = _option(3e-6, "Learning rate of policy and value model, at the peak of its schedule.")
    # The length of a run, and what a step is
    total_episodes: int | None = _option(
        None, "Length of the run in sampled answers, in place of max_steps or num_train_epochs."
    )
    num_ppo_epochs: int = _option(4, "How often the updates of a rollout go through all of its answers.")
    num_mini_batches: int = _option(1, "Optimizer steps in each of these passes; must divide a process's answers.")
    # Sampling
    response_length: int = _option(53, "Most tokens of an answer.")
    temperature: float = _option(0.7, "Sampling temperature, by which log-probs and KL are scored too.")
    stop_token: str | None = _option(
        "eos",
        "Where an answer ends: 'eos' (the tokenizer's end token or one of the model's generation config), or null with "
        "stop_token_id, which then is the only end, or for answers of full length.",
    )
    stop_token_id: int | None = _option(None, "Id of the one token that ends an answer, in place of stop_token.")
    local_rollout_forward_batch_size: int = _option(
        64,
        "Answers that a process samples, and scores without gradient, at a time. No logits are kept for it: what it "
        "costs is the activations of a layer, and keys and values while sampling.",
    )
    ds3_gather_for_generation: bool = _option(
        True,
        "With ZeRO-3: gather all of the policy's weights once while answers are sampled. False gathers them layer by "
        "layer for each token, which is slow and fits a policy larger than one GPU.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments for the chat template of conversational prompts."
    )
    num_sample_generations: int = _option(0, "How often in the run to print a few sampled answers with their rewards.")
    # Rewards
    reward_model_path: str | None = _option(None, "Reward model with one output, beside or instead of reward_funcs.")
    reward_weights: list[float] | None = _option(None, "Weight of each reward function. Default: 1 each.")
    missing_eos_penalty: float | None = _option(
        None, "Taken off the reward of an answer that has not ended by response_length; above 0."
    )
    whiten_rewards: bool = _option(
        False, "Divide rewards (the KL among them) by their standard deviation over all processes."
    )
    # Losses and advantages
    kl_coef: float = _option(0.05, "Beta: weight of the KL, in the reward's units per nat.")
    cliprange: float = _option(
        0.2, "How far the ratio of new to old policy may move from 1 before a token's policy loss stops rewarding it."
    )
    vf_coef: float = _option(0.1, "Weight of the value model's loss.")
    cliprange_value: float = _option(
        0.2, "How far a value may move from the rollout's before its loss stops rewarding it."
    )
    entropy_coef: float = _option(0.0, "Weight of the entropy bonus in the loss.")
    gamma: float = _option(1.0, "Discount of later rewards, per token.")
    lam: float = _option(
        0.95, "Lambda of generalized advantage estimation: 1 trusts the rewards that came, 0 the value model alone."
    )
    whiten_advantages: bool = _option(
        True,
        "Centre the advantages and divide the objective (advantages and KL loss) by their standard deviation over all "
        "processes, as TRL does with the advantages.",
    )
    # Models and data
    value_model_path: str | None = _option(
        None, "Model that the value model starts from. Default: the policy, with a head of zeros."
    )
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments for loading models that are given by their path."
    )
    model_adapter_name: str | None = _option(None, "Of a policy with several PEFT adapters, the one to train.")
    ref_adapter_name: str | None = _option(None, "Of a policy with several PEFT adapters, the reference.")
    remove_unused_columns: bool = _option(False, "Keep false: reward functions read the dataset's columns.")
    sft_model_path: str | None = _option(
        None,
        "In a recipe the policy, another name of model_name_or_path. In Python the trainer does not read it, as TRL's: "
        "it is given its model.",
    )
    dataset_num_proc: int | None = _option(
        None, "Not read, as in TRL's trainer: prompts are tokenised as they come up."
    )

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]
