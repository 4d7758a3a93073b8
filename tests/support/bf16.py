"""What trainers report and train by in bfloat16, beside float64 on the tensors that the output heads were given."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from support import tiny_dpo
from support.device import DEVICE, PLAIN
from support.tiny import tiny_dataset, tiny_tokenizer
from trl_klx import KLXGRPOConfig, KLXGRPOTrainer
from trl_klx.kl import exact_kl, kl_estimate, leave_one_out_baseline
from trl_klx.kl.estimators import SAMPLED_ESTIMATORS
from trl_klx.trainers.reference.build import causal_lm

LENGTH = 6  # tokens of an answer
MONITOR = ["k1", "k2", "k3", "exact"]
# Nothing but the KL has a gradient: all rewards are equal, and DPO's loss weighs next to nothing.
LORA = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
ALONE = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "kl_estimator": "exact"}


def wide_model(seed: int = 0) -> Qwen3ForCausalLM:
    """A model whose largest logits are near 25, as in language models: bfloat16 has steps of 0.125 there."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config).to(DEVICE)
    with torch.no_grad():
        logits = model(_probe_ids()).logits
        model.lm_head.weight.mul_(25 / logits.amax(-1).mean())
    return model


def _probe_ids() -> Tensor:
    return torch.arange(3, 75, device=DEVICE).view(6, 12)


@cache
def starting_model() -> Qwen3ForCausalLM:
    return wide_model()


@cache
def moved(kl: float, *, lora: bool) -> dict[str, Tensor]:
    """What puts `starting_model` at about `kl` nats per token: other weights by name, those of an adapter with `lora`.

    Without it the head is another one, too.
    """
    generator = torch.Generator().manual_seed(1)
    reference, policy = starting_model(), copy.deepcopy(starting_model())
    if lora:
        policy = get_peft_model(policy, LORA)
    names = ("down_proj.lora_B",) if lora else ("down_proj.weight", "lm_head.weight")
    weights = {name: w for name, w in policy.named_parameters() if any(part in name for part in names)}
    noise = {name: torch.randn(w.shape, generator=generator).to(w.device) for name, w in weights.items()}
    start = {name: w.detach().clone() for name, w in weights.items()}
    size = 0.1
    with torch.no_grad():
        for _ in range(20):
            for name, weight in weights.items():
                weight.copy_(start[name] + size * (1.0 if lora else start[name].std()) * noise[name])
            value = float(exact_kl(policy(_probe_ids()).logits, reference(_probe_ids()).logits).mean())
            if abs(value / kl - 1) < 0.05:
                break
            size *= (kl / value) ** 0.5
    return {name: w.detach() for name, w in weights.items()}


@dataclass
class Step:
    """One optimizer step: the tensors that the heads were given, and what the trainer made of them."""

    hidden: Tensor  # (N, H) of the policy, as its head takes them
    ref_hidden: Tensor  # (N, H)
    targets: Tensor  # (N,)
    weight: Tensor  # (V, H)
    ref_weight: Tensor
    reported: dict[str, float]
    hidden_grad: Tensor  # (N, H)
    weight_grad: Tensor | None  # (V, H), None where the head is frozen
    coef: float

    def truth(self, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, float], Tensor, Tensor]:
        """Float64: each estimate's mean, and the gradients of `coef` times the exact KL's.

        `dtype` is what the heads take hidden states and weights in; autocast rounds float32 ones.
        """
        hidden, weight = (t.to(dtype).double().requires_grad_() for t in (self.hidden, self.weight))
        logits = hidden @ weight.t()
        ref_logits = self.ref_hidden.to(dtype).double() @ self.ref_weight.to(dtype).double().t()
        kl = exact_kl(logits, ref_logits).mean()
        grads = torch.autograd.grad(self.coef * kl, (hidden, weight))
        logps, ref_logps = (
            x.detach().log_softmax(-1).gather(-1, self.targets.unsqueeze(-1)).squeeze(-1) for x in (logits, ref_logits)
        )
        values = {name: float(kl_estimate(logps, ref_logps, name).mean()) for name in SAMPLED_ESTIMATORS}
        return {**values, "exact": float(kl.detach())}, grads[0], grads[1]

    def errors_of_values(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
        """Errors of the estimates that are reported, relative to them or, where they are smaller, to the exact KL.

        (k1 may be 0.)
        """
        values, *_ = self.truth(dtype)
        reported = {name.removeprefix("kl/").removeprefix("data_"): value for name, value in self.reported.items()}
        found = {name: abs(reported[name] - value) for name, value in values.items() if name in reported}
        return {name: error / max(abs(values[name]), values["exact"]) for name, error in found.items()}

    def errors_of_gradients(self) -> dict[str, float]:
        """Relative errors, by norm."""
        _, hidden_grad, weight_grad = self.truth()
        found = {"hidden": _relative(self.hidden_grad, hidden_grad)}
        if self.weight_grad is not None:
            found["head"] = _relative(self.weight_grad, weight_grad)
        return found


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


class _Output(NamedTuple):
    """Of one forward of a backbone."""

    backbone: nn.Module
    ids: Tensor  # (B, L)
    hidden: Tensor  # (B, L, H)
    with_grad: bool


@dataclass
class _Seen:
    """What passes by in the backbones of policy and reference while a trainer takes a step."""

    outputs: list["_Output"] = field(default_factory=list)
    hidden_grad: Tensor | None = None
    weight_grad: Tensor | None = None

    def add(self, backbone: nn.Module, args: Any, kwargs: dict, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: setattr(self, "hidden_grad", grad.detach().clone()))
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        self.outputs.append(_Output(backbone, ids, hidden.detach().clone(), hidden.requires_grad))

    def of_policy(self) -> _Output:
        """Its forward with gradient."""
        return next(output for output in self.outputs if output.with_grad)

    def of_reference(self, ids: Tensor) -> Tensor:
        """(B, L, H), in the order of `ids`: trainers shuffle answers. The reference is the first that scores them."""
        found = next(output for output in self.outputs if not output.with_grad and output.ids.shape == ids.shape)
        return found.hidden[[int((found.ids == row).all(1).nonzero()[0]) for row in ids]]


@contextmanager
def _watching(policy: Any, reference: Any) -> Iterator[_Seen]:
    seen = _Seen()
    backbones = {id(model): model.base_model for model in (policy, reference)}
    handles = [backbone.register_forward_hook(seen.add, with_kwargs=True) for backbone in backbones.values()]
    if policy.lm_head.weight.requires_grad:
        handles.append(policy.lm_head.weight.register_hook(lambda g: setattr(seen, "weight_grad", g.detach().clone())))
    yield seen
    for handle in handles:
        handle.remove()


def step_of(trainer: Any, mask_of: Callable[[Tensor], Tensor], coef: float = 1.0) -> Step:
    """Let a trainer take its one step, in one forward of policy and reference each.

    Args:
        mask_of: from ids (B, L) to the tokens that count, a mask (B, L).
        coef: what the trainer multiplies the mean KL per token by.
    """
    policy = causal_lm(getattr(trainer.accelerator.unwrap_model(trainer.model), "policy", trainer.model))
    reference = policy if trainer.ref_model is None else causal_lm(trainer.ref_model)
    with _watching(policy, reference) as seen:
        trainer.train()
    _, ids, hidden, _ = seen.of_policy()
    ref_hidden = seen.of_reference(ids)
    mask = mask_of(ids)[:, 1:]
    assert seen.hidden_grad is not None
    return Step(
        hidden[:, :-1][mask],
        ref_hidden[:, :-1][mask],
        ids[:, 1:][mask],
        policy.lm_head.weight.detach(),
        reference.lm_head.weight.detach(),
        next(entry for entry in trainer.state.log_history if any(key.startswith("kl/") for key in entry)),
        seen.hidden_grad[:, :-1][mask],
        seen.weight_grad,
        coef,
    )


def _policy(*, lora: bool, half: bool) -> Any:
    """A policy at its reference."""
    torch.manual_seed(0)
    policy: Any = copy.deepcopy(starting_model())
    if lora:
        policy = get_peft_model(policy, LORA)
    return policy.bfloat16() if half else policy


@torch.no_grad()
def _move(policy: nn.Module, kl: float, *, lora: bool) -> None:
    """Away from the reference, which the trainer has made of the policy as it was given."""
    weights = dict(policy.named_parameters())
    for name, value in moved(kl, lora=lora).items():
        weights[name].copy_(value)


def _same_reward(completions: list, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def grpo_trainer(folder: Path, kl: float, *, lora: bool, half: bool, **changes: Any) -> KLXGRPOTrainer:
    policy = _policy(lora=lora, half=half)
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LENGTH, "beta": 1.0}
    settings |= {**PLAIN, **ALONE, "bf16": True, "kl_monitor": MONITOR, "disable_dropout": True, **changes}
    trainer = KLXGRPOTrainer(
        policy, _same_reward, KLXGRPOConfig(str(folder), **settings), tiny_dataset(), processing_class=tiny_tokenizer()
    )
    _move(policy, kl, lora=lora)
    return trainer


def grpo_step(folder: Path, kl: float, *, lora: bool, half: bool, **changes: Any) -> Step:
    return step_of(grpo_trainer(folder, kl, lora=lora, half=half, **changes), lambda ids: _last(ids, LENGTH))


def error_of_credit(folder: Path, kl: float, *, half: bool, **changes: Any) -> float:
    """Of the credit that GRPO's advantages are charged with for an exact KL, relative to its norm."""
    trainer = grpo_trainer(folder, kl, lora=False, half=half, kl_placement="both", **changes)
    policy, reference = causal_lm(trainer.model), causal_lm(trainer.ref_model)
    batches: list[dict] = []
    generate = trainer._generate_and_score_completions

    def kept(inputs: Any) -> dict:
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = kept  # type: ignore[method-assign]
    with _watching(policy, reference) as seen:
        trainer.train()
    batch = batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)

    def logits(model: Any) -> Tensor:
        outputs = (o for o in seen.outputs if o.backbone is model.base_model and o.ids.shape == ids.shape)
        hidden = next(o.hidden for o in outputs if not o.with_grad)[:, -LENGTH - 1 : -1]
        return hidden.bfloat16().double() @ model.lm_head.weight.detach().bfloat16().double().t()

    policy_logits, ref_logits = logits(policy), logits(reference)
    logps, ref_logps = (
        x.log_softmax(-1).gather(-1, ids[:, -LENGTH:].unsqueeze(-1)).squeeze(-1) for x in (policy_logits, ref_logits)
    )
    mask = _last(ids, LENGTH)[:, -LENGTH:]
    credit = trainer.kl_term.credit(logps, ref_logps, mask, exact=exact_kl(policy_logits, ref_logits))
    return _relative(batch["kl_credit"], credit - leave_one_out_baseline(credit, mask, trainer.num_generations))


def _last(ids: Tensor, length: int) -> Tensor:
    """The answers' tokens up to their end."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    ended = (ids[:, -length:] == 1).cumsum(1) - (ids[:, -length:] == 1).int()
    mask[:, -length:] = ended == 0
    return mask


def dpo_probe(folder: Path, kl: float, *, half: bool) -> Step:
    """What DPO's probe reports; nothing trains by it."""
    policy = _policy(lora=False, half=half)
    settings = {**ALONE, "bf16": True, "kl_coef": 0.0, "kl_probe_steps": 1, "kl_monitor": MONITOR}
    settings |= {"kl_probe_prompts": 6, "kl_probe_max_new_tokens": LENGTH, "per_device_eval_batch_size": 6}
    trainer = tiny_dpo.make_trainer(policy, folder, **settings)
    _move(policy, kl, lora=False)
    probe: Any = trainer._probe
    values, found = probe.values, []

    def kept(policy: Any, reference: Any, as_reference: Any, batch: Any, moving: Any) -> Any:
        with _watching(causal_lm(policy), causal_lm(reference)) as seen:
            out = values(policy, reference, as_reference, batch, moving)
        found.append((batch, *(output.hidden for output in seen.outputs)))
        return out

    probe.values = kept
    trainer.train()
    batch, ref_hidden, hidden = found[0]
    mask, head = batch.target_mask, causal_lm(trainer.model).lm_head.weight.detach()
    ref_head, entry = causal_lm(trainer.ref_model).lm_head.weight.detach(), trainer.state.log_history[0]
    targets, nothing = batch.input_ids[:, 1:][mask], torch.empty(0)
    return Step(hidden[:, :-1][mask], ref_hidden[:, :-1][mask], targets, head, ref_head, entry, nothing, None, coef=0.0)


def dpo_step(folder: Path, kl: float, *, lora: bool, half: bool, **changes: Any) -> Step:
    policy = _policy(lora=lora, half=half)
    settings = {**ALONE, "bf16": True, "beta": 1e-9, "kl_coef": 1.0, "max_steps": 1, **changes}
    trainer = tiny_dpo.make_trainer(policy, folder, **settings)
    _move(policy, kl, lora=lora)
    masks: list[Tensor] = []
    compute_loss = trainer.compute_loss

    def kept(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        masks.append(inputs["completion_mask"].bool())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = kept
    return step_of(trainer, lambda ids: masks[-1])


def ppo_step(folder: Path, kl: float, *, lora: bool, half: bool, **changes: Any) -> Step:
    from support import ppo_tools

    policy = _policy(lora=lora, half=half)
    settings = {**ALONE, "bf16": True, "kl_coef": 1.0, "kl_placement": "loss", "kl_monitor": MONITOR, **changes}
    trainer = ppo_tools.trainer(folder, model=policy, reward_funcs=_same_reward, **settings)
    _move(policy, kl, lora=lora)
    # Rewards that are all equal are whitened by the root of 1e-8, and the KL in the loss stays in proportion.
    return step_of(trainer, lambda ids: _last(ids, LENGTH), coef=1e4)


STEPS = {"GRPO": grpo_step, "DPO": dpo_step, "PPO": ppo_step}
