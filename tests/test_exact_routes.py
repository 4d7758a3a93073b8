"""How GRPO and DPO get log-probs, entropy and the exact KL: values, products of matrices, and what is kept."""

import types
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from support.tiny import tiny_dataset, tiny_model
from test_grpo import make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Trainer
from trl.trainer import utils as trl_utils

from trl_klx import KLXGRPOTrainer
from trl_klx.kl import exact_kl
from trl_klx.trainers.exact.forward import ExactKLForward
from trl_klx.trainers.exact.tokens import AnswerTokens
from trl_klx.trainers.seams import FUSED_LM_HEAD

pytestmark = pytest.mark.trl

ROUTES = ["logits", *["fused"] * FUSED_LM_HEAD]
TEMPERATURE, VOCAB, HIDDEN = 0.7, 61, 16


class Models(NamedTuple):
    policy: PreTrainedModel
    reference: PreTrainedModel
    exact: ExactKLForward


def models(
    route: str, apart: float = 0.003, direction: Any = "reverse", outputs: Any = ("log_probs", "entropy")
) -> Models:
    """A policy close to its reference, as one after a few steps of training is."""
    policy, reference = tiny_model(vocab=VOCAB), tiny_model(vocab=VOCAB)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(apart * torch.randn(parameter.shape, generator=generator))
    if route == "fused":
        trl_utils.add_fused_lm_head(policy, temperature=TEMPERATURE, outputs=outputs)
        trl_utils.add_fused_lm_head(reference, temperature=TEMPERATURE)
    exact = ExactKLForward(policy, reference, temperature=TEMPERATURE, direction=direction)
    exact.check()
    return Models(policy, reference, exact)


class Answers(NamedTuple):
    """Three answers of up to five tokens to prompts of two; one has a tool's output in it, one is empty."""

    ids: Tensor  # (3, 7)
    scored: Tensor  # (3, 5) bool
    mask: Tensor  # (3, 5) bool

    @property
    def tokens(self) -> AnswerTokens:
        return AnswerTokens.of(self.mask, self.scored)

    @property
    def inputs(self) -> dict[str, Tensor]:
        attention = torch.cat([torch.ones(3, 2), self.scored], 1).long()
        return {"input_ids": self.ids, "attention_mask": attention}

    @property
    def labels(self) -> Tensor:
        labels = self.ids.masked_fill(self.inputs["attention_mask"] == 0, -100)
        labels[:, :2] = -100
        return labels


def answers() -> Answers:
    ids = torch.randint(2, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    scored = torch.arange(5) < torch.tensor([[5], [3], [0]])
    mask = scored.clone()
    mask[0, 1:3] = False
    return Answers(ids, scored, mask)


def run(model: PreTrainedModel, route: str, given: Answers, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(rows, 5) log-probs and entropy of a forward, as TRL makes them; 0 where nothing is scored."""
    inputs = {name: value[rows] for name, value in given.inputs.items()}
    if route == "fused":
        output = model(**inputs, labels=given.labels[rows], fused_lm_head=True)
        entropy = output.log_probs if output.entropy is None else output.entropy
        return output.log_probs[:, -5:], entropy[:, -5:]
    logps = (model(**inputs).logits[:, -6:-1] / TEMPERATURE).log_softmax(-1)
    chosen = logps.gather(-1, given.ids[rows, -5:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    scored = given.scored[rows]
    return torch.where(scored, chosen, 0.0), torch.where(scored, entropy, 0.0)


def dense(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, given: Answers, direction: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and exact KL, (3, 5) each, of float64 tensors."""
    logits, ref_logits = (h[:, -6:-1] @ w.t() / TEMPERATURE for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    logps = logits.log_softmax(-1)
    found = [logps.gather(-1, given.ids[:, -5:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)]
    exact = exact_kl(logits, ref_logits, direction)
    logps, entropy = (torch.where(given.scored, values, 0.0) for values in found)
    return logps, entropy, torch.where(given.mask, exact, 0.0)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("route", [*ROUTES, *["fused, of labelled rows alone"] * FUSED_LM_HEAD])
def test_values_and_gradients_are_those_of_float64(
    route: str, half: bool, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch in two forwards, from the hidden states and weights in the precision in which the head takes them."""
    if route not in ROUTES:  # as TRL's fused head hands them over where it has Triton
        monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
        route = "fused"
    (policy, reference, exact), given = models(route, direction=direction), answers()
    backbones: dict[str, list[Tensor]] = {"policy": [], "reference": []}

    def keep(name: str) -> Any:
        return lambda _module, _args, output: backbones[name].append(output.last_hidden_state)

    for name, model in (("policy", policy), ("reference", reference)):
        model.base_model.register_forward_hook(keep(name))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast, torch.no_grad(), exact.hidden_states(given.tokens) as ref_hidden:
        run(reference, route, given)
    wanted_dtype = torch.bfloat16 if half else torch.float32
    assert [(len(states), states.dtype) for states in ref_hidden] == [(n, wanted_dtype) for n in (3, 3, 0)]
    with autocast, exact.exact_kl(policy, given.tokens, ref_hidden, with_grad=True) as parts:
        runs = [run(policy, route, given, rows) for rows in (slice(2), slice(2, 3))]
    found = [torch.cat(values) for values in (*zip(*runs, strict=True), parts)]
    weights = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(7))
    for hidden in backbones["policy"]:
        hidden.retain_grad()
    sum((w * values).sum() for w, values in zip(weights, found, strict=True)).backward()

    as_taken = lambda tensor: tensor.detach().to(wanted_dtype).double()  # noqa: E731
    hidden = as_taken(torch.cat(backbones["policy"])).requires_grad_()
    weight = as_taken(policy.lm_head.weight).requires_grad_()
    frozen = as_taken(backbones["reference"][0]), as_taken(reference.lm_head.weight)
    wanted = dense(hidden, weight, *frozen, given, direction)
    sum((w * values).sum() for w, values in zip(weights.double(), wanted, strict=True)).backward()
    assert 1e-5 < wanted[2].sum() / 6 < 1e-2
    # The gradient at the logits is rounded before it is multiplied; values are not.
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-4
    assert relative_error(torch.cat([h.grad for h in backbones["policy"]]), hidden.grad) < (0.01 if half else 2e-5)
    assert relative_error(policy.lm_head.weight.grad, weight.grad) < (0.01 if half else 2e-5)


def relative_error(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None and wanted is not None
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("route", ROUTES)
def test_the_gradient_of_a_small_kl_is_true_in_bfloat16(route: str) -> None:
    """2 % at 0.0002 nats per token, where rounded logits are off by more than half of it."""
    (policy, reference, exact), given = models(route, apart=0.003), answers()
    policy.bfloat16(), reference.bfloat16()
    heads: dict[str, Tensor] = {}
    policy.base_model.register_forward_hook(lambda _m, _a, output: heads.update(policy=output.last_hidden_state))
    reference.base_model.register_forward_hook(lambda _m, _a, output: heads.update(reference=output.last_hidden_state))
    with torch.no_grad(), exact.hidden_states(given.tokens) as ref_hidden:
        run(reference, route, given)
    with exact.exact_kl(policy, given.tokens, ref_hidden, with_grad=True) as parts:
        run(policy, route, given)
    heads["policy"].retain_grad()
    parts[0].sum().backward()
    hidden = heads["policy"].detach().double().requires_grad_()
    ref_weight = reference.lm_head.weight.detach().double()
    weight = policy.lm_head.weight.detach().double()
    wanted = dense(hidden, weight, heads["reference"].double(), ref_weight, given, "reverse")[2]
    wanted.sum().backward()
    assert 5e-5 < wanted.sum() / 6 < 5e-3
    assert relative_error(parts[0], wanted.detach()) < 1e-4
    assert relative_error(heads["policy"].grad, hidden.grad) < 0.02


@pytest.mark.parametrize("route", ROUTES)
def test_policy_and_reference_are_scored_alike(route: str) -> None:
    """Equal models have equal log-probs, to the last bit, in bfloat16 too: log-ratios have no noise of rounding."""
    (policy, reference, exact), given = models(route, apart=0.0), answers()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), exact.hidden_states(given.tokens) as ref_hidden:
            ref_logps = run(reference, route, given)[0]
        with exact.exact_kl(policy, given.tokens, ref_hidden, with_grad=True) as parts:
            logps = run(policy, route, given)[0]
        with torch.no_grad(), exact.log_probs(given.tokens):
            old_logps = run(policy, route, given)[0]
    assert torch.equal(logps, ref_logps)
    assert torch.equal(logps, old_logps)
    assert parts[0].abs().max() < 1e-9


class Products(TorchDispatchMode):
    """Counts matrix products with the vocabulary in their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            self.count += any(isinstance(arg, Tensor) and VOCAB in arg.shape for arg in args)
        return func(*args, **(kwargs or {}))


def products(route: str, *, trains_head: bool, asks: bool, **options: Any) -> int:
    """Of one loss of log-probs and exact KL, forward and backward; the entropy is only logged."""
    (policy, reference, exact), given = models(route, **options), answers()
    policy.lm_head.weight.requires_grad_(trains_head)
    with torch.no_grad(), exact.hidden_states(given.tokens) as ref_hidden:
        run(reference, route, given)
    request: Any = exact.exact_kl(policy, given.tokens, ref_hidden, with_grad=True) if asks else nullcontext([])
    with Products() as counted:
        with request as parts:
            loss = run(policy, route, given)[0].sum()
        sum((part.sum() for part in parts), loss).backward()
    return counted.count


@pytest.mark.skipif(not FUSED_LM_HEAD, reason="needs TRL's fused head")
def test_the_fused_head_projects_policy_and_reference_once() -> None:
    """Policy and reference, and two gradients of hidden states; with a trained head both again, for two gradients."""
    one_more = 2  # rows that have a log-prob and no KL are scored for themselves: a projection, and gradients
    assert products("fused", trains_head=False, asks=True) == 4 + one_more
    assert products("fused", trains_head=True, asks=True) == 6 + one_more + 2
    more = ("log_probs", "entropy", "mean_logits", "is_top1")  # DPO's metrics: TRL's own projection
    assert products("fused", trains_head=False, asks=True, outputs=more) == 4 + one_more + 1


@pytest.mark.parametrize("trains_head", [False, True])
def test_logits_take_one_product_more_than_without_the_exact_kl(trains_head: bool) -> None:
    without = products("logits", trains_head=trains_head, asks=False)
    assert without == 2 + trains_head
    assert products("logits", trains_head=trains_head, asks=True) == without + 1


class Kept(TorchDispatchMode):
    """Follows the memory of hidden states, (..., H), that outlives the forwards of some models."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self._running, self._made = 0, list[weakref.ref]()
        self.peak = 0
        self._weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        for model in models:
            model.register_forward_pre_hook(lambda *_: self._run(1))
            model.register_forward_hook(lambda *_: self._run(-1))

    def _run(self, change: int) -> None:
        self._running += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[1:][-1:] == (HIDDEN,):
                self._made.append(weakref.ref(tensor))
        if not self._running:
            self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        storages = [tensor.untyped_storage() for made in self._made if (tensor := made()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for place, size in sizes.items() if place not in self._weights)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, 1.0),
        ({"bf16": True}, 0.5),  # float32 weights: the head takes bfloat16
        # TRL scores the policy, whose hidden states serve the KL in the reward; that is computed two answers at a time.
        ({"kl_placement": "both", "num_iterations": 2}, 2.0 + 2 * 2.5 / 8),
    ],
    ids=["loss", "bfloat16", "both"],
)
def test_one_copy_of_the_references_hidden_states(settings: dict, copies: float, tmp_path: Path) -> None:
    """Of real tokens, from the reference's scoring through TRL's shuffle to the loss; gone when TRL samples again."""
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tiny_model(), tmp_path, kl_estimator="exact", **size, **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    rows = [row for row in tiny_dataset(2).to_list() for _ in range(4)]
    kept, at_the_start = Kept(trainer.model, trainer.ref_model), []
    sample = trainer._generate_single_turn

    def sampled(*args: Any, **kwargs: Any) -> Any:
        at_the_start.append(kept.bytes())
        return sample(*args, **kwargs)

    trainer._generate_single_turn = sampled
    with kept:
        batch = trainer._prepare_inputs(rows)
        trainer._step += trainer.args.micro_batches_per_rollout * trainer.num_iterations
        tokens = sum(int(part["completion_mask"].sum()) for part in trainer._buffered_inputs)
        one_copy = tokens * HIDDEN * 4
        del batch
        assert kept.bytes() == one_copy * (0.5 if trainer.args.bf16 else 1)
        assert kept.peak <= copies * one_copy
        trainer._prepare_inputs(rows)
    assert at_the_start == [0, 0]
    assert tokens < 8 * 6  # some answers are shorter: there is padding


@pytest.mark.parametrize("needs_exact", [True, False])
def test_fsdp2_does_not_round_scores_next_to_an_exact_kl(needs_exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate has it round all that a model gives; where no exact KL is wanted that stays."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16", reshard_after_forward=True)
    trainer = object.__new__(KLXGRPOTrainer)
    trainer.args = types.SimpleNamespace(kl_needs_exact=needs_exact)

    def create(self: Trainer) -> None:
        self.is_fsdp_enabled = True
        self.accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    trainer.create_accelerator_and_postprocess()
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.output_dtype == (None if needs_exact else torch.bfloat16)
