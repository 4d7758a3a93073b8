"""What else in a recipe acts on its KL: one sentence per finding, from the fields of the trainer's config."""

from collections.abc import Iterator
from typing import Any

from ...kl.gradients import gradient_sentence
from ...kl.sampling import KL, enumerated_policy, reading, sampler_logits
from ...trainers.grpo.sampling_settings import changed_sampling, in_words, settings_of


def sentence(algorithm: str, args: Any) -> str:
    """The gradient of a recipe's KL, as one sentence."""
    on_data = algorithm == "dpo"
    if not args.kl_is_measured and not (on_data and args.kl_is_penalised):
        return "There is no KL to the reference, neither penalised nor measured."
    acts = args.kl_in_loss if on_data else args.kl_is_penalised
    return gradient_sentence(
        args.kl_estimator,
        args.kl_placement if acts else "none",
        args.kl_credit,
        args.kl_importance_sampling,
        direction=args.kl_direction,
        on_data=on_data,
    )


def notes(algorithm: str, args: Any) -> list[str]:
    """Everything beside estimator, placement and weight that changes what the KL does, or says that nothing does."""
    own = {"grpo": _grpo, "ppo": _ppo, "dpo": _dpo}[algorithm]
    return [*own(args), *_shared(args)]


def _grpo(args: Any) -> Iterator[str]:
    rollouts_per_batch = args.num_iterations * (args.steps_per_generation or 1) / args.gradient_accumulation_steps
    reused = rollouts_per_batch > 1
    term = args.kl_term()
    if args.kl_is_penalised and (reused or args.use_vllm):
        sources = [
            f"num_iterations={args.num_iterations} and steps_per_generation={args.steps_per_generation}"
        ] * reused
        sources += ["vLLM, whose log-probs differ a little from the trainer's"] * bool(args.use_vllm)
        yield f"Off-policy: answers come from another policy than the one that learns ({'; '.join(sources)}). " + (
            _off_policy(term)
        )
    if term.in_reward and args.kl_is_penalised and args.scale_rewards not in ("none", False):
        yield (
            f"scale_rewards={args.scale_rewards!r} divides the rewards by their standard deviation. The KL is "
            "subtracted afterwards, so it is not amplified where all answers score alike; beta weighs nats against "
            "rewards of standard deviation one."
        )
    if args.loss_type in ("grpo", "sapo") and args.kl_is_penalised:
        yield (
            f"loss_type={args.loss_type!r} divides by each answer's length: short answers weigh more per token, and "
            "the KL's gradient is no multiple of the one above (7 to 38 % off on enumerated policies). 'dapo' and "
            "'dr_grpo' keep its direction."
        )
    if args.sync_ref_model:
        yield "sync_ref_model=true moves the reference after the policy: a KL to a moving target bounds no drift."
    if changed_sampling(args):
        yield _changed_sampling(args)
    if args.mask_truncated_completions:
        yield "mask_truncated_completions=true: the KL of answers that were cut off is neither penalised nor counted."


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
        f"never samples{example if round(k3, 3) != KL else ''}, and a KL in the reward is not; the run says at its "
        "first rollout how far the two are apart."
    )


def _off_policy(term: Any) -> str:
    if term.placement == "reward":
        return (
            "A KL in the reward keeps the values of the policy that sampled, and the policy gradient's token ratio "
            "does not make up for it: its gradient is biased, more so the more steps a rollout serves. 'exact in both' "
            "has most of its gradient in the loss, where it is not."
        )
    loss = {
        True: f"The weight on the KL loss ({term.weight_level}) corrects for it"
        + ("." if term.weight_level in ("prefix", "sequence") else ", up to the states, which stay the sampler's."),
        False: "The KL loss has no weight, so its gradient is biased: kl_importance_sampling='token' corrects it.",
    }[term.takes_weights]
    if term.estimator == "exact" and not term.takes_weights:
        loss = "The exact KL in the loss needs no weight: it averages over the policy's own tokens itself."
    return loss + (" Its half in the reward stays biased." if term.placement == "both" else "")


def _ppo(args: Any) -> Iterator[str]:
    updates = args.num_ppo_epochs * args.num_mini_batches
    term = args.kl_term()
    if updates > 1 and args.kl_is_penalised:
        yield (
            f"Off-policy: a rollout serves {updates} optimizer steps (num_ppo_epochs={args.num_ppo_epochs}, "
            f"num_mini_batches={args.num_mini_batches}). {_off_policy(term)}"
        )
    if args.gamma < 1 and term.in_reward:
        yield f"gamma={args.gamma} discounts later tokens' KL: the gradient moves from KLseq towards P."
    if args.lam < 1 and term.in_reward:
        yield f"lam={args.lam}: a KL in the reward is unbiased only as far as the value model predicts it."
    if args.whiten_rewards and term.in_reward:
        yield "whiten_rewards=true divides reward and KL by one number, so kl_coef keeps its meaning."


def _dpo(args: Any) -> Iterator[str]:
    yield (
        f"DPO's own loss holds the policy near the reference with beta={args.beta}, on the log-ratios of the pairs; "
        "those are no KL. kl_coef adds the exact KL at the data's prefixes."
    )
    if args.kl_probe_steps is None:
        yield "No probe: the policy's own KL is not measured; kl_probe_steps=100 samples answers and logs it."
    if args.kl_controls == "beta" and args.kl_controller != "fixed":
        yield "kl_controls='beta': beta also scales DPO's gradient, so the controller is a learning-rate schedule too."


def _shared(args: Any) -> Iterator[str]:
    name, start = args.kl_coef_name, args.kl_coef_start
    if not args.kl_is_penalised:
        placement = args.kl_placement
        yield f"No penalty acts ({name}={start}, kl_placement={placement!r}): the reward alone moves the policy."
        return
    if args.kl_controller == "fixed":
        yield f"{name}={start} is fixed: the KL ends where reward and penalty balance, which nothing says beforehand."
    elif args.kl_controller in ("linear", "cosine"):
        yield f"{args.kl_controller}: {name} goes from {start} to {args.kl_coef_end} whatever the KL does."
    elif args.kl_target is not None:
        yield _target(args)
    if args.kl_direction == "forward":
        yield "kl_direction='forward' covers the reference's modes; target, budget and kl/sequence stay reverse."
    if args.kl_is_cap is not None:
        yield (
            f"kl_is_cap={args.kl_is_cap}: weights above it are {args.kl_is_mode}d, which trades variance for a bias on "
            "exactly these tokens."
        )
    if args.kl_value_cap is not None:
        yield f"kl_value_cap={args.kl_value_cap} bounds the logged loss of a token, and keeps its gradient."


def _target(args: Any) -> str:
    length = {"grpo": "max_completion_length", "ppo": "response_length"}
    longest = next((getattr(args, name) for name in length.values() if name in vars(args)), None)
    text = (
        f"{args.kl_controller} moves {args.kl_coef_name} from {args.kl_coef_start} to hold {args.kl_target:g} nats per "
    )
    text += f"{args.kl_target_unit}, read from {args.kl_reading}"
    if longest and args.kl_target_unit == "token":
        return f"{text}: up to {args.kl_target * longest:.3g} nats in an answer of {longest} tokens."
    if longest:
        return f"{text}: {args.kl_target / longest:.2g} nats per token in an answer of {longest} tokens."
    return f"{text}."
