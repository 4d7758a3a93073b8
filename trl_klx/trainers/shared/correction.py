"""What TRL's correction for vLLM makes of a KL in the reward, with figures."""

from typing import Any

from ...kl.sampling import ENGINES, engine_error

_SAYS = {
    "off": "vllm_importance_sampling_correction=false leaves a KL in the reward to whatever the engine sampled",
    "token": "vllm_importance_sampling_mode={mode!r} weighs tokens, where a KL in the reward needs whole answers "
    "weighed",
    "sequence": "vllm_importance_sampling_mode={mode!r} weighs whole answers: a KL in the reward is exact as far as no "
    "answer is beyond its bound ({bounds})",
    "unbounded": "vllm_importance_sampling_mode={mode!r} without a bound makes a KL in the reward exact",
}


def reward_correction(args: Any) -> str | None:
    """How right the KL in the advantages of a recipe is where vLLM samples; None where there is none.

    The figures are enumerated on small policies: see `trl_klx.kl.sampling`.
    """
    term = args.kl_term()
    if not (args.use_vllm and args.kl_is_penalised and term.in_reward) or term.reward_at_update:
        return None
    kind, mode = _kind_of(args), args.vllm_importance_sampling_mode
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    used = "off" if kind == "off" else mode
    errors = {behind: engine_error(term, behind, used, low, high) for behind in ENGINES}
    text = _SAYS[kind].format(mode=mode, bounds=_bounds(low, high))
    figures = " and ".join(f"{100 * error:.0f} % off at {behind:g}" for behind, error in errors.items())
    text += f" (the whole gradient, on enumerated policies: {figures} nats per answer between policy and engine)"
    if kind in ("off", "token"):
        text += "; vllm_importance_sampling_mode='sequence_mask' with vllm_importance_sampling_clip_max=null is exact"
    elif kind == "sequence":
        text += "; kl/ratio_cut is the share beyond it"
    if term.in_loss and term.weight_level == "token":
        text += ". Its half in the loss is right up to the states, which kl_importance_sampling='prefix' corrects, too"
    return f"{text}."


def uncorrected_reward(args: Any) -> str | None:
    """The same of a recipe whose KL in the reward stays wrong however close the engine is; None of others."""
    return reward_correction(args) if _kind_of(args) in ("off", "token") else None


def _kind_of(args: Any) -> str:
    if not args.vllm_importance_sampling_correction:
        return "off"
    if args.vllm_importance_sampling_mode.startswith("token"):
        return "token"
    bounds = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    return "unbounded" if bounds == (None, None) else "sequence"


def _bounds(low: float | None, high: float | None) -> str:
    named = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    return ", ".join(f"{name}={value:g}" for name, value in named.items() if value is not None)
