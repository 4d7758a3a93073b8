"""Values and gradients of the chunked exact KL and of the scores, against float64 on the same rounded inputs."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpu_check import Report, Settings
from trl_klx.kl import chunked_exact_kl, chunked_exact_kl_from_logits, exact_kl, float32_linear, token_scores

# The most that an error may be of the norm of what float64 gives: (KL, gradients, log-probs and entropy).
BARS = {torch.float32: (2e-3, 1e-3, 1e-5), torch.bfloat16: (1e-2, 2e-2, 1e-4)}


class Case(NamedTuple):
    name: str
    vocabulary: int = 4099
    hidden: int = 192
    tokens: int = 67
    gap: float = 0.1  # of the hidden states: 0.1 is about 0.04 nats per token, 0.007 about 0.0002
    frozen: bool = False
    biased: bool = False
    impossible: str = ""  # whose logits are -inf at a few tokens: policy, reference, both
    options: dict[str, Any] = {}


CASES = (
    Case("plain"),
    Case("frozen head", frozen=True),
    Case("forward", options={"direction": "forward"}),
    Case("temperature", options={"temperature": 0.7}),
    Case("scale", options={"logit_scale": 0.25}),
    Case("softcap", options={"softcap": 5.0}),
    Case("softcap, scale, temperature", options={"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}),
    Case("bias", biased=True),
    Case("padded vocabulary", impossible="both"),
    Case("padded vocabulary, forward", impossible="both", options={"direction": "forward"}),
    Case("reference zeros", impossible="reference"),
    Case("reference zeros, forward", impossible="reference", options={"direction": "forward"}),
    Case("policy zeros", impossible="policy"),
    Case("policy zeros, forward", impossible="policy", options={"direction": "forward"}),
    Case("2e-4 nats", gap=0.007),
    Case("2e-4 nats, forward, frozen head", gap=0.007, frozen=True, options={"direction": "forward"}),
    Case("a vocabulary of 151,936", vocabulary=151_936, hidden=64, tokens=40),
    Case("a vocabulary of 17", vocabulary=17, hidden=33),
    Case("one token", tokens=1),
    Case("chunks of 5 tokens", options={"chunk_size": 5}),
)


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden, weight = normal(case.tokens, case.hidden), normal(case.vocabulary, case.hidden, scale=3 / case.hidden**0.5)
    out = {"hidden": hidden, "weight": weight, "ref_hidden": hidden + normal(case.tokens, case.hidden, scale=case.gap)}
    out["ref_weight"] = weight.clone()
    if case.biased or case.impossible:
        out["bias"], out["ref_bias"] = normal(case.vocabulary), normal(case.vocabulary)
        for name, whose in (("bias", "policy"), ("ref_bias", "reference")):
            if case.impossible in (whose, "both"):
                out[name][[1, case.vocabulary // 2, case.vocabulary - 1]] = -math.inf
    out = {name: tensor.to(device, dtype) for name, tensor in out.items()}
    for name in {"hidden", "weight", "bias"} & out.keys():
        out[name].requires_grad_(name == "hidden" or not case.frozen)
    return out


def transformed(logits: Tensor, options: dict[str, Any]) -> Tensor:
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense(inputs: dict[str, Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """KL, log-probs and entropy by their definitions."""
    temperature = options.get("temperature", 1.0)
    logits = transformed(linear(inputs["hidden"], inputs["weight"], inputs.get("bias")), options) / temperature
    ref_logits = transformed(linear(inputs["ref_hidden"], inputs["ref_weight"], inputs.get("ref_bias")), options)
    logps = logits.log_softmax(-1)
    return {
        "exact": exact_kl(logits, ref_logits / temperature, options.get("direction", "reverse")),
        "logps": logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": torch.special.entr(logps.exp()).sum(-1),
    }


def by_chunks(inputs: dict[str, Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    return {"exact": chunked_exact_kl(**inputs, **options)}


def from_logits(inputs: dict[str, Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    logits = transformed(float32_linear(inputs["hidden"], inputs["weight"], inputs.get("bias")), options)
    ref = {name: tensor for name, tensor in inputs.items() if name.startswith("ref_")}
    return {"exact": chunked_exact_kl_from_logits(logits, **ref, **options)}


def scores(inputs: dict[str, Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    found = token_scores(**inputs, targets=targets, with_entropy=True, **options)
    assert found.exact is not None and found.logps is not None and found.entropy is not None
    return {"exact": found.exact, "logps": found.logps.detach(), "entropy": found.entropy.detach()}


def scores_alone(inputs: dict[str, Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Without a reference."""
    policy = {name: tensor for name, tensor in inputs.items() if not name.startswith("ref_")}
    found = token_scores(**policy, targets=targets, with_entropy=True, **options)
    assert found.logps is not None and found.entropy is not None
    return {"logps": found.logps, "entropy": found.entropy.detach()}


FUNCTIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "chunked_exact_kl": by_chunks,
    "chunked_exact_kl_from_logits": from_logits,
    "token_scores": scores,
    "token_scores, log-probs alone": scores_alone,
}


def errors(name: str, case: Case, device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what, error over the norm of what float64 gives): values, then gradients."""
    inputs = make_inputs(case, device, dtype)
    possible = torch.arange(case.tokens, device=device) * 7 % max(1, case.vocabulary // 2 - 2) + 2
    targets = possible % case.vocabulary
    weights = torch.linspace(0.2, 1.7, case.tokens, device=device)
    wide = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in inputs.items()}
    found, wanted = FUNCTIONS[name](inputs, targets, case.options), dense(wide, targets, case.options)
    for key, value in found.items():
        yield key, distance(value.detach(), wanted[key].detach())
    differentiated = next(iter(found))
    gradients = []
    for results, tensors in ((found, inputs), (wanted, wide)):
        output, leaves = results[differentiated], {key: x for key, x in tensors.items() if x.requires_grad}
        made = torch.autograd.grad(output, list(leaves.values()), weights.to(output.dtype))
        gradients.append(dict(zip(leaves, made, strict=True)))
    for key, gradient in gradients[0].items():
        yield f"gradient of {key}", distance(gradient, gradients[1][key])


def distance(found: Tensor, wanted: Tensor) -> float:
    """Over the finite entries; inf where those that are not finite are not the same."""
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite].double(), wanted[~finite]):
        return math.inf
    if not finite.any():
        return 0.0
    off = float((found.double() - wanted)[finite].norm() / wanted[finite].norm())
    return math.inf if math.isnan(off) else off


def check(settings: Settings, report: Report) -> None:
    small = [case._replace(vocabulary=min(case.vocabulary, 301), hidden=48) for case in CASES]
    for name in FUNCTIONS:
        for dtype, bars in BARS.items():
            worst = {"KL": (0.0, ""), "gradients": (0.0, ""), "log-probs and entropy": (0.0, "")}
            for case in CASES if not settings.is_try else small:
                for what, error in errors(name, case, settings.device, dtype):
                    kind = "KL" if what == "exact" else "gradients" if "gradient" in what else "log-probs and entropy"
                    print(name, dtype, case.name, what, error, flush=True)
                    if error > worst[kind][0]:
                        worst[kind] = (error, case.name)
            for (kind, (error, where)), bar in zip(worst.items(), bars, strict=True):
                if where:
                    report.at_most(f"{name}, {str(dtype)[6:]}, error of {kind}, worst at: {where}", error, bar)
