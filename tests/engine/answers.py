"""All 259 answers of at most three tokens: what the engine makes of them, and the true gradients over them."""

import itertools
import math
from collections import Counter
from typing import Any

import torch
import vllm_engine
from scipy.stats import chi2
from torch import Tensor
from transformers import PreTrainedModel
from vllm import SamplingParams

PROMPT, LENGTH = "ab", 3
OTHERS = [token for token in range(len(vllm_engine.TOKENS)) if token != 1]
ANSWERS = [
    *((*start, 1) for n in range(LENGTH - 1) for start in itertools.product(OTHERS, repeat=n)),
    *((*start, end) for start in itertools.product(OTHERS, repeat=LENGTH - 1) for end in range(7)),
]
IN_SYNC, STALE = 0.0, 0.16  # how far the policy moves once the engine has its weights


def engine_scores(llm: Any, prompt: list[int]) -> tuple[list[list[float]], Tensor]:
    """The engine's log-probs of the tokens of each answer, as it reports them while it samples; and (259,) probs."""
    asked = [{"prompt_token_ids": [*prompt, *answer]} for answer in ANSWERS]
    scored = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    logps = [
        [scored[n].prompt_logprobs[len(prompt) + t][token].logprob for t, token in enumerate(answer)]
        for n, answer in enumerate(ANSWERS)
    ]
    probs = torch.tensor([math.exp(sum(values)) for values in logps], dtype=torch.double)
    assert abs(float(probs.sum()) - 1.0) < 1e-5
    return logps, probs


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """In float64, and without the head that TRL 1.16 puts in: a deepcopy's would still score the original."""
    copied = type(model)(model.config).double().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def truths(
    policy: PreTrainedModel, reference: PreTrainedModel, prompt: list[int], engine_probs: Tensor, rewards: Tensor
) -> dict[str, Tensor]:
    """The gradients by definition, in float64 by autograd (as `enumeration.targets`).

    P, P_mu: of the KL in the policy's own states, and in the engine's; KLseq: of the whole KL; reward: of its mean.
    """
    policy, reference = plain_copy(policy), plain_copy(reference)
    ids = torch.tensor([prompt + list(answer) + [0] * (LENGTH - len(answer)) for answer in ANSWERS])
    mask = torch.tensor([[t < len(answer) for t in range(LENGTH)] for answer in ANSWERS])
    logps, ref_logps = (
        model(ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        for model in (policy, reference)
    )
    probs = (logps.gather(-1, ids[:, len(prompt) :, None])[..., 0] * mask).sum(-1).exp()
    kl = ((logps.exp() * (logps - ref_logps.detach())).sum(-1) * mask).sum(-1)

    def gradient(objective: Tensor) -> Tensor:
        found = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
        return torch.cat([each.flatten() for each in found])

    kls = {"P": probs.detach(), "P_mu": engine_probs, "KLseq": probs}
    return {name: gradient((of * kl).sum()) for name, of in kls.items()} | {"reward": gradient((probs * rewards).sum())}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def drawn_as_reported(answers: list[list[int]], logps: list[list[float]]) -> float:
    """The probability of answers that are further from the reported log-probs than these (chi-squared)."""
    counts = Counter(map(tuple, answers))
    probs = {tuple(answer): math.exp(sum(own)) for answer, own in zip(answers, logps, strict=True)}
    drawn = counts.total()
    common = [answer for answer, prob in probs.items() if drawn * prob >= 5]
    rest, rest_prob = drawn - sum(counts[a] for a in common), max(1 - sum(probs[a] for a in common), 1e-9)
    distance = sum((counts[a] - drawn * probs[a]) ** 2 / (drawn * probs[a]) for a in common)
    distance += (rest - drawn * rest_prob) ** 2 / (drawn * rest_prob)
    return float(chi2.sf(distance, len(common)))
