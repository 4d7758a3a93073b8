"""PPO's scores: true, from as few products as they need, and without tensors of (B, T, V)."""

import copy
import gc
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from support.ppo_tools import ANSWERS, first_rollout, moved, trainer, weights
from support.tiny import drift, tiny_model
from test_ppo import assert_step_is_minus_gradient, chosen, dense, with_tool_output
from test_situations_models import ARCHITECTURES, HiddenHead, OddHead, adapted, architecture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trl_klx.kl import masked_mean, token_scores
from trl_klx.kl.exact import exact_kl
from trl_klx.trainers.exact import scored_head
from trl_klx.trainers.exact.scored_head import Asked, ScoredHead
from trl_klx.trainers.seams import keep_float32_outputs

pytestmark = pytest.mark.trl

VOCAB, TEMPERATURE = 23, 0.7
IDS = torch.tensor([[3, 5, 6, 7, 8, 9], [0, 4, 10, 11, 12, 1]])
MASK = torch.tensor([[True, False, True, True], [True, True, True, False]])
EXACT_LOSS = {"kl_estimator": "exact", "kl_placement": "loss"}


def asked(head: ScoredHead, **more: Any) -> Asked:
    return Asked(head, IDS[:, 2:], MASK, int(MASK.sum()), entropy="trained", **more)


def expected(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, V) log-probs, (B, T) log-probs of the tokens and entropy, from the model's own logits."""
    logps_BTV = (model(IDS).logits[:, 1:-1].float() / TEMPERATURE).log_softmax(-1)
    logps = logps_BTV.gather(-1, IDS[:, 2:, None]).squeeze(-1)
    return logps_BTV, logps, -(logps_BTV.exp() * logps_BTV).sum(-1)


# The same scores, whatever the model ---------------------------------------------------------------------------------


@pytest.mark.situation("PPO: a policy of another architecture", "right")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_architectures(name: str) -> None:
    """Heads with a bias, tied ones, scaled and capped logits; gradients of every parameter too."""
    policy, reference = architecture(name).eval(), architecture(name, seed=1).eval()
    head, ref_head = ScoredHead(policy, TEMPERATURE), ScoredHead(reference, TEMPERATURE)
    head.check()
    with torch.no_grad():
        ref = asked(ref_head, keeps_hidden=True).scores(lambda: reference(IDS))
    assert ref.hidden is not None
    assert ref.hidden.tensor.shape[:-1] == (6,)
    found = asked(head, ref_hidden=ref.hidden.tensor, reference=ref_head).scores(lambda: policy(IDS))
    assert found.entropy is not None
    assert found.exact is not None
    (logps_BTV, logps, entropy), (ref_BTV, ref_logps, _) = expected(policy), expected(reference)
    exact = exact_kl(logps_BTV, ref_BTV.detach())
    pairs = [(found.logps, logps), (found.entropy, entropy), (found.exact, exact), (ref.logps, ref_logps)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs * MASK, rtol=1e-4, atol=1e-5)
    assert exact[MASK].mean() > 0.1
    weight = torch.linspace(0.5, 2.0, MASK.numel()).view_as(MASK) * MASK
    named = {key: p for key, p in policy.named_parameters() if p.requires_grad}
    both = [
        torch.autograd.grad((weight * (a + 0.3 * b + 0.7 * c)).sum(), list(named.values()), materialize_grads=True)
        for a, b, c in ((found.logps, found.entropy, found.exact), (logps, entropy, exact))
    ]
    for key, ours, theirs in zip(named, *both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.situation("PPO: a model whose head does more than is known, without an exact KL", "right")
@pytest.mark.parametrize("model_class", [OddHead, HiddenHead])
def test_a_head_that_is_not_known_is_left_to_itself(model_class: Any) -> None:
    torch.manual_seed(0)
    model = model_class(tiny_model().config)
    found = asked(ScoredHead(model, TEMPERATURE)).scores(lambda: model(IDS))
    _, logps, entropy = expected(model)
    torch.testing.assert_close(found.logps, logps * MASK)
    torch.testing.assert_close(found.entropy, entropy * MASK)


@pytest.mark.situation("PPO: a model whose head does more than is known, with an exact KL", "refused")
@pytest.mark.parametrize("model_class", [OddHead, HiddenHead])
def test_an_exact_kl_of_a_head_that_is_not_known_is_refused(model_class: Any, tmp_path: Path) -> None:
    model = model_class(tiny_model().config)
    with pytest.raises(ValueError, match=rf"{model_class.__name__}.*use kl_estimator k1, k2 or k3"):
        trainer(tmp_path, model=model, **EXACT_LOSS)
    with pytest.raises(ValueError, match=model_class.__name__):  # a sharded one is first seen when it scores
        asked(ScoredHead(model, TEMPERATURE), keeps_hidden=True).scores(lambda: model(IDS))


@pytest.mark.situation("PPO: an adapter on the output head, without an exact KL", "right")
@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_on_the_head(tmp_path: Path, changes: dict) -> None:
    """The update is that of log-probs and entropy from the model's own logits."""
    model = get_peft_model(tiny_model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes}))
    drift(model)
    options = {"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "none", "entropy_coef": 0.3}
    made = trainer(tmp_path, model=model, whiten_advantages=False, temperature=TEMPERATURE, vf_coef=0.0, **options)
    rollout = first_rollout(made)
    logps_BTV = dense(model, rollout, TEMPERATURE)
    logps, entropy = chosen(logps_BTV, rollout), -(logps_BTV.exp() * logps_BTV).sum(-1)
    torch.testing.assert_close(rollout.old_logps, logps.detach() * rollout.mask, rtol=1e-4, atol=1e-5)
    advantages = made._shape(rollout).advantages
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = masked_mean(-advantages * logps - 0.3 * entropy, rollout.mask)  # the KL is 0, and so is its gradient
    gradient = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))
    before = weights(model)
    made.train()
    step = {name: delta for name, delta in moved(before, weights(model)).items() if gradient.get(name) is not None}
    assert any("lm_head" in name for name in step)
    assert_step_is_minus_gradient(step, {name: g for name, g in gradient.items() if g is not None})


@pytest.mark.parametrize("kind", ["DoRA", "LoRA on embeddings", "prompt tuning", "p-tuning", "prefix tuning"])
def test_scores_of_a_policy_with_an_adapter(tmp_path: Path, kind: str) -> None:
    """Virtual tokens before the text are not scored; the reference is the policy as it came."""
    model = adapted(kind)
    made = trainer(tmp_path, model=model, kl_estimator="exact", kl_placement="both", max_steps=2)
    rollout = first_rollout(made)
    with torch.no_grad():
        logps = chosen(dense(model, rollout), rollout) * rollout.mask
    for scored in (rollout.old_logps, rollout.ref_logps):
        torch.testing.assert_close(scored, logps, rtol=1e-4, atol=1e-5)
    made.train()
    kl = [row["kl/exact"] for row in made.state.log_history if "kl/exact" in row]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[1] > 5e-7


def test_fsdp2_leaves_float32_as_it_is() -> None:
    """accelerate has it round what a model gives, log-probs included, to the precision of the layers."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    keep_float32_outputs(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def test_scores_are_true_in_bfloat16() -> None:
    """Logits of 20, a KL of 1e-3 nats: float32 results of bf16 products, where rounded logits have 0.06 of noise."""
    policy = tiny_model().bfloat16()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight.mul_(12.0)
        policy.lm_head.weight.add_(0.02 * torch.randn(policy.lm_head.weight.shape, generator=torch.Generator()))
    scored, true = [], []
    for model in (policy, reference):
        hidden: list[Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, args, kept=hidden: kept.append(args[0]))
        with torch.no_grad():
            scored.append(asked(ScoredHead(model, 1.0)).scores(lambda model=model: model(IDS)).logps[MASK])
        handle.remove()
        logits = hidden[0][:, 1:-1].double() @ model.lm_head.weight.double().t()
        true.append(logits.log_softmax(-1).gather(-1, IDS[:, 2:, None]).squeeze(-1)[MASK])
        assert logits.abs().max() > 10
    assert scored[0].dtype == torch.float32
    torch.testing.assert_close(scored[0] - scored[1], (true[0] - true[1]).float(), rtol=1e-3, atol=2e-5)


# What it costs -------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products over the vocabulary, and the largest tensor of logits."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.vocab, self.count, self.largest = vocab, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm") and any(self.vocab in t.shape for t in tensors):
            self.count += 1
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == self.vocab and is_fresh(out, args):
            self.largest = max(self.largest, out.numel() // self.vocab)
        return out


def is_fresh(out: Tensor, args: tuple) -> bool:
    """Whether memory was taken for it: a view, such as a transposed weight, has that of an argument."""
    return all(
        out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)
    )


def products(run: Any) -> int:
    with Products() as mode:
        run()
    return mode.count


def micro_batch(made: Any, rollout: Any) -> None:
    """Scores, loss and gradients of all answers of a rollout."""
    made._loss(made.model, made._shape(rollout), torch.arange(len(ANSWERS))).loss.backward()


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("changes", "adapter", "rollout_count", "update_count"),
    [
        ({"kl_coef": 0.0, "kl_monitor": []}, False, 1, 4),
        ({"kl_estimator": "k3", "kl_placement": "loss"}, False, 2, 4),
        ({"kl_estimator": "k3", "kl_placement": "loss"}, True, 2, 2),
        (EXACT_LOSS, False, 3, 6),
        (EXACT_LOSS, True, 3, 4),
    ],
    ids=["no KL", "k3", "k3, frozen head", "exact", "exact, frozen head"],
)
def test_products_over_the_vocabulary(
    tmp_path: Path, changes: dict, adapter: bool, rollout_count: int, update_count: int
) -> None:
    """A frozen head: a projection, and hidden's gradient of it in forward; of the reference the same for an exact KL.

    A trained one is projected again in backward, because no logits are kept. The entropy costs nothing.
    """
    given = {"peft_config": LORA} if adapter else {"ref_model": tiny_model(1)}
    made = trainer(tmp_path, **given, **changes)
    found: list[Any] = []
    assert products(lambda: found.append(first_rollout(made))) == rollout_count
    assert products(lambda: micro_batch(made, found[0])) == update_count


def test_products_of_stock_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference once each, on the whole batch; an update projects once and has two gradients."""
    from test_ppo_parity import stock_step  # skips the test where TRL has no PPO

    assert products(lambda: stock_step(tmp_path, monkeypatch, num_ppo_epochs=1)) == 2 + 3


@pytest.mark.parametrize("changes", [{}, {"entropy_coef": 0.1}, EXACT_LOSS], ids=["k1", "entropy", "exact"])
def test_no_logits_of_more_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    """In rollout and update, forward and backward; the answers have 28 tokens, 48 with padding."""
    made = trainer(tmp_path, ref_model=tiny_model(1), **changes)
    monkeypatch.setattr(scored_head, "token_scores", partial(token_scores, chunk_size=4))
    with Products() as mode:
        micro_batch(made, first_rollout(made))
    assert mode.count > 20
    assert mode.largest == 4


def of_width(width: int) -> int:
    """Rows of all tensors alive that have this width, weights aside."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.dim() > 1 and thing.size(-1) == width and not thing.is_sparse:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // (width * thing.itemsize)
    return sum(found.values())


@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
def test_the_references_hidden_states_are_held_once(tmp_path: Path, tools: bool) -> None:
    """Those of tokens that count, while a rollout's updates last and no longer; told apart by their width, 24."""
    width, held, samplings = 24, [], []
    config = copy.deepcopy(tiny_model().config)
    config.hidden_size = width
    reference = type(tiny_model())(config)

    def answers(prompts: list, made: Any) -> dict[str, list]:
        samplings.append(of_width(width))
        return with_tool_output(prompts, made)

    made = trainer(tmp_path, ref_model=reference, rollout_func=answers, max_steps=2, num_ppo_epochs=2, **EXACT_LOSS)
    made.args.local_rollout_forward_batch_size = 3
    update = made._update
    made._update = lambda *args: (held.append(of_width(width)), update(*args))[1]  # type: ignore[method-assign]
    made.train()
    assert held == [sum(map(len, ANSWERS))] * 2
    assert samplings == [0, 0]


def test_no_hidden_states_are_held_where_no_update_reads_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, ref_model=tiny_model(1), kl_monitor=["k1", "exact"])
    assert first_rollout(made).ref_hidden is None
    made = trainer(tmp_path, ref_model=tiny_model(1), eval_dataset=None, **EXACT_LOSS)
    assert first_rollout(made).ref_hidden is not None
    made.model.eval()
    assert first_rollout(made).ref_hidden is None  # an evaluation learns nothing
