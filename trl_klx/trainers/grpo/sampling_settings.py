"""What a GRPO recipe asks of the sampler: what is not sampling, and what samples from another distribution than scored.

The policy is scored at `temperature`, over its whole vocabulary. Shape legend of the rest: see `grpo`.
"""

import difflib
import json
from typing import Any

from transformers import GenerationConfig

# Settings of `generate` and of vLLM that change the distribution of the next token, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, None),
    **dict.fromkeys(
        ("top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (1, None)
    ),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens"), (0, None)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0, None)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "bad_words", "sequence_bias", "logit_bias"), (None, [], {})),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (None, [], {})),
    **dict.fromkeys(("top_h", "forced_bos_token_id", "forced_eos_token_id"), (None,)),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config"), (None,)),
    **dict.fromkeys(("allowed_token_ids", "structured_outputs"), (None,)),
}
# Settings under which answers are not samples of the policy, or that TRL cannot read, and their harmless values.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_sample": ((True, None), "takes the likeliest answer"),
    "num_beams": ((1, None), "searches for likely answers"),
    "num_beam_groups": ((1, None), "searches for likely answers"),
    "penalty_alpha": ((0, None), "searches for likely answers"),
    "dola_layers": ((None,), "takes the likeliest answer of several layers"),
    "force_words_ids": ((None,), "searches for answers with given words"),
    "constraints": ((None,), "searches for answers with given words"),
    "num_return_sequences": ((1, None), "gives more answers than there are prompts (num_generations sets how many)"),
    "n": ((1,), "gives more answers than there are prompts (num_generations sets how many)"),
    "return_dict_in_generate": ((False, None), "gives the answers in a form that TRL does not read"),
}
_REFUSED_OF_ENGINE: dict[str, tuple[tuple[Any, ...], str]] = {
    "seed": ((None,), "gives all answers to a prompt the same random numbers (the trainer has a seed of its own)"),
    "logprobs": ((0,), "puts the likeliest token's log-prob where TRL reads the sampled one's"),
}
_REFUSED_OF_GENERATE: dict[str, tuple[tuple[Any, ...], str]] = {
    "stop_strings": ((None,), "needs a tokenizer, which TRL does not pass on (eos_token_id takes ids)"),
}


def settings_of(args: Any) -> dict[str, Any]:
    """`generation_kwargs` as a mapping, also where it is JSON; {} where it is neither, which TRL complains about."""
    given = args.generation_kwargs
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return {}
    return given if isinstance(given, dict) else {}


def check_sampling(args: Any) -> None:
    """Refuse `generation_kwargs` that make no samples. Raises ValueError with one sentence."""
    given = settings_of(args)
    refused = _REFUSED | (_REFUSED_OF_ENGINE if args.use_vllm else _REFUSED_OF_GENERATE)
    for name, value in given.items():
        harmless, effect = refused.get(name, ((value,), ""))
        if value not in harmless:
            raise ValueError(
                f"generation_kwargs={{{name!r}: {value!r}}} {effect}: GRPO needs one sample of the policy for each "
                f"prompt; remove {name}."
            )
    if "temperature" in given and not (_is_number(given["temperature"]) and given["temperature"] > 0):
        raise ValueError(
            f"generation_kwargs={{'temperature': {given['temperature']!r}}} is not a temperature to sample at: give a "
            "number above zero, best by the field temperature, at which the policy is scored too."
        )
    known = vars(GenerationConfig())
    for name in () if args.use_vllm else given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]!r}?" if near else "; remove it."
            raise ValueError(f"generation_kwargs names {name!r}, which transformers' generate does not know{hint}")


def changed_sampling(args: Any) -> dict[str, Any]:
    """What makes the sampler's distribution another than the one that is scored, by name as the recipe has it."""
    given = settings_of(args)
    fields = {name: getattr(args, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    fields["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex if args.use_vllm else None
    found = {n: v for n, v in fields.items() if n not in given and v not in NEUTRAL.get(n, (None,))}
    of_kwargs = {n: v for n, v in given.items() if n in NEUTRAL and v not in NEUTRAL[n]}
    if given.get("temperature", args.temperature) != args.temperature:
        of_kwargs["temperature"] = given["temperature"]
    return found | ({"generation_kwargs": of_kwargs} if of_kwargs else {})


def in_words(changed: dict[str, Any]) -> str:
    """`top_p=0.9 and generation_kwargs={'top_k': 3}`."""
    return " and ".join(f"{name}={value!r}" for name, value in changed.items())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
