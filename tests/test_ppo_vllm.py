"""PPO with answers of vLLM's: which weights it has, what it is asked, and what its log-probs correct.

The engine is TRL's, around an imitation of vLLM; `tests/engine/` has a real one.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as generation
from peft import LoraConfig
from support import fake_vllm
from support.fake_vllm import FakeLLM
from support.ppo_tools import classifier, first_rollout, given_answers, settings, trainer
from support.tiny import save_tiny, tiny_dataset, tiny_model
from test_ppo import chosen, dense
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from trl_klx.trainers.ppo import trainer as ppo_trainer
from trl_klx.trainers.ppo.rollout import Rollout, padded
from trl_klx.trainers.shared.engine import policy_ratio

pytestmark = pytest.mark.trl


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_tiny(tmp_path / "model")


def with_vllm(folder: str, *, model: Any = None, **changes: Any) -> Any:
    given = {"given": False, "use_vllm": True, **changes}
    return trainer(Path(folder).parent / "out", model=folder if model is None else model, **given)


# The engine's weights, and what it is asked


class Watch(TrainerCallback):
    """How far the engine's weights are from the policy's whenever it samples."""

    def __init__(self) -> None:
        self.apart: list[float] = []

    def around(self, made: Any) -> None:
        stock = made.engine.generation.generate

        def generate(**asked: Any) -> Any:
            own = dict(FakeLLM.made.model.named_parameters())
            policy = merged(made.policy)
            self.apart.append(max(float((own[name] - weight).abs().max()) for name, weight in policy.items()))
            return stock(**asked)

        made.engine.generation.generate = generate


def merged(policy: Any) -> dict[str, Tensor]:
    """The weights of a policy with its adapter."""
    if not hasattr(policy, "merge_adapter"):
        return {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    policy.merge_adapter()
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): w.detach().clone()
        for name, w in policy.named_parameters()
        if "lora_" not in name
    }
    policy.unmerge_adapter()
    return named


@pytest.mark.parametrize(
    "peft_config", [None, LoraConfig(target_modules=["q_proj", "v_proj"], r=4)], ids=["whole", "lora"]
)
def test_the_engine_samples_with_the_weights_of_the_policy(folder: str, peft_config: Any) -> None:
    """In every rollout and in every evaluation, and no weights are sent twice."""
    evaluated = {"eval_dataset": tiny_dataset(12), "per_device_eval_batch_size": 4, "eval_on_start": True}
    steps = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "num_ppo_epochs": 2, "learning_rate": 0.5}
    made = with_vllm(folder, peft_config=peft_config, **evaluated, **steps)
    start = merged(made.policy)
    watch = Watch()
    watch.around(made)
    made.train()
    assert len(watch.apart) == 3 + 4 * 3
    assert max(watch.apart) < 1e-6
    assert FakeLLM.made.syncs == 4
    assert max(float((weight - start[name]).abs().max()) for name, weight in merged(made.policy).items()) > 1e-3
    for entry in made.state.log_history[:-1]:
        prefix = "eval_" if "eval_runtime" in entry else ""
        assert abs(entry[f"{prefix}kl/sampler"]) < 1e-6
        assert entry[f"{prefix}kl/weight_mean"] == pytest.approx(1.0, abs=1e-4)
        assert entry[f"{prefix}kl/ess"] == pytest.approx(1.0, abs=1e-4)
        assert entry[f"{prefix}kl/ratio_cut"] == 0


def test_the_engine_gets_the_weights_of_another_run(folder: str) -> None:
    """Which begins at the same step."""
    made = with_vllm(folder, max_steps=1, learning_rate=0.5)
    watch = Watch()
    watch.around(made)
    made.train()
    made.train()
    assert len(watch.apart) == 2 and max(watch.apart) < 1e-6


def test_the_engine_gets_the_best_weights(folder: str) -> None:
    """They are loaded when training is over, without a step of their own."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "save_strategy": "steps"}
    steps = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5}
    made = with_vllm(folder, eval_dataset=tiny_dataset(8), **best, **steps)
    made.train()
    watch = Watch()
    watch.around(made)
    made.evaluate()
    assert watch.apart[0] < 1e-6


@pytest.mark.parametrize(
    ("stop", "ends"), [({}, [1]), ({"stop_token": None, "stop_token_id": 7}, [7]), ({"stop_token": None}, [])], ids=str
)
def test_what_the_engine_is_asked(folder: str, stop: dict, ends: list[int]) -> None:
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "temperature": 0.7}
    memory = {"vllm_gpu_memory_utilization": 0.4, "vllm_max_model_length": 48}
    made = with_vllm(folder, **stop, **sizes, **memory)
    rollout = first_rollout(made)
    arguments = FakeLLM.made.arguments
    assert arguments["model"] == folder
    assert (arguments["gpu_memory_utilization"], arguments["max_model_len"], arguments["max_num_seqs"]) == (0.4, 48, 12)
    prompts, asked = FakeLLM.made.asked[0]
    assert len(prompts) == 12
    assert (asked.temperature, asked.max_tokens, asked.n, asked.top_p, asked.top_k) == (0.7, 6, 1, 1.0, 0)
    assert (asked.ignore_eos, asked.stop_token_ids) == (True, ends)
    assert len(FakeLLM.made.asked) == 1  # all of the rollout at once
    assert rollout.engine_logps is not None
    torch.testing.assert_close(rollout.sampler_logps, rollout.old_logps, atol=1e-4, rtol=1e-4)
    answers = rollout.input_ids[:, -rollout.length :]
    for ids, counts in zip(answers.tolist(), rollout.mask.tolist(), strict=True):
        own = ids[: sum(counts)]
        assert own[-1] in ends or len(own) == 6
        assert not set(own[:-1]) & set(ends)


def test_a_server(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and prompts go to it by TRL's client; a log-prob that it has not got is null."""
    clients = []

    class Client:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.names, self.asked = settings, [], []
            clients.append(self)

        def init_communicator(self, device: Any) -> None: ...

        def update_named_params(self, metadata: list, named: Any) -> None:
            self.names.append([name for name, _ in named])

        def reset_prefix_cache(self) -> None: ...

        def get_server_info(self) -> dict:
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def generate(self, prompts: list, **asked: Any) -> dict:
            self.asked.append(asked)
            answers = [[5, 6, 1] if row % 2 else [5, 1] for row in range(len(prompts))]
            logps = [[[-1.5], *[[None]] * (len(ids) - 1)] for ids in answers]
            return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": logps}

    monkeypatch.setattr(generation, "VLLMClient", Client)
    where = {"vllm_server_base_url": "http://there:1", "vllm_group_port": 4000, "vllm_server_timeout": 5.0}
    made = with_vllm(folder, vllm_mode="server", max_steps=2, **where)
    rollout = first_rollout(made)
    made.train()
    (client,) = clients
    assert client.settings == {"base_url": "http://there:1", "group_port": 4000, "connection_timeout": 5.0}
    assert client.names == [[name for name, _ in made.policy.named_parameters()]] * 3  # the rollout above, two steps
    assert client.asked[0]["generation_kwargs"] == {"ignore_eos": True, "stop_token_ids": [1]}
    assert (client.asked[0]["n"], client.asked[0]["max_tokens"]) == (1, 6)
    assert (rollout.sampler_logps[:, 0] == -1.5).all()
    torch.testing.assert_close(rollout.sampler_logps[:, 1:], rollout.old_logps[:, 1:], rtol=0, atol=0)


def test_a_rollout_function_finds_the_engine_up_to_date(folder: str) -> None:
    """Its answers are not the engine's, as far as the trainer knows."""

    def asks(prompts: list, made: Any) -> dict[str, list]:
        given = given_answers(prompts, made)
        _, _, logps, _ = made.vllm_generation.generate(prompts=given["prompt_ids"], images=None, num_generations=1)
        assert len(logps) == len(prompts)
        return {**given, "logprobs": [[-1.0] * len(ids) for ids in given["completion_ids"]]}

    made = with_vllm(folder, rollout_func=asks, max_steps=2)
    watch = Watch()
    watch.around(made)
    assert first_rollout(made).engine_logps is None
    made.train()
    assert max(watch.apart) < 1e-6
    assert "kl/sampler" not in made.state.log_history[0]


# What its log-probs correct

LENGTH, VOCAB, END = 2, 23, 1
ANSWERS_OF_2 = [(END,), *((a, b) for a, b in itertools.product(range(VOCAB), repeat=2) if a != END)]
PURE = {"whiten_advantages": False, "vf_coef": 0.0, "lam": 1.0, "gamma": 1.0, "kl_coef": 0.3, "response_length": LENGTH}
NO_BOUND = {"vllm_importance_sampling_clip_max": None}


def reward_of(completion_ids: list, **_: Any) -> list[float]:
    return [math.sin(3 * ids[0] + len(ids)) for ids in completion_ids]


class Enumerated:
    """All answers to one prompt as a rollout of an engine that has other weights than the policy."""

    def __init__(self, tmp_path: Path, *, mode: str = "train", **options: Any) -> None:
        models = [tiny_model(seed).double() for seed in (0, 1, 2)]
        self.policy, self.reference, self.engine = models
        with torch.no_grad():  # near enough that all of its answers are the policy's, too
            for own, weight in zip(self.engine.parameters(), self.policy.parameters(), strict=True):
                own.copy_(weight + 0.15 * (own - weight))
        # The trainer never samples here, and its policy has no path: the engine is made by hand.
        self.made = trainer(
            tmp_path, model=self.policy, ref_model=self.reference, reward_funcs=reward_of, **PURE, **options
        )
        rows = [{"prompt": "1+2=", "answer": "3"}] * len(ANSWERS_OF_2)
        prompt = self.made.processing_class(text="1+2=")["input_ids"]
        ids, mask = padded([list(a) for a in ANSWERS_OF_2], 0, "right", "cpu")
        self.mask = mask.bool()
        self.input_ids = torch.cat([torch.tensor([prompt] * len(rows)), ids], dim=1)
        logps = self.of(self.engine).detach()
        self.probs = (logps * mask).sum(1).exp()
        assert float(self.probs.sum()) == pytest.approx(1.0, abs=1e-9)
        self.engine_logps = [[float(v) for v in row[: len(a)]] for row, a in zip(logps, ANSWERS_OF_2, strict=True)]
        sampled = [list(answer) for answer in ANSWERS_OF_2], self.engine_logps
        self.made.sampler._rollout_func, self.made.sampler._sampled = None, lambda _: sampled
        self.made.model.train(mode == "train")
        with torch.no_grad():
            self.rollout: Rollout = self.made.sampler.rollout(rows)
        self.made.metrics.settle(mode)

    def all_of(self, model: PreTrainedModel) -> Tensor:
        return dense(model, self)

    @property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.input_ids)

    @property
    def length(self) -> int:
        return LENGTH

    def of(self, model: PreTrainedModel) -> Tensor:
        """(B, T) log-probs of the answers."""
        return chosen(self.all_of(model), self) * self.mask

    def found(self, rollout: Rollout | None = None) -> Tensor:
        """Expected gradient of the trainer's first update over answers that the engine gives."""
        experience = self.made._shape(self.rollout if rollout is None else rollout)
        if experience.kl_baseline is not None:  # others of all answers there are would tell which this one is
            experience = replace(experience, kl_baseline=experience.kl_baseline.mean(0) * self.mask)
        # The loss is a sum over the tokens of all answers: each counts by its answer's probability.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_trainer, "masked_sum", lambda values, mask: (self.probs[:, None] * values * mask).sum())
            loss = self.made._loss(self.made.model, experience, torch.arange(len(ANSWERS_OF_2))).loss
        return gradient(loss, self.policy)

    def wanted(self, placement: str, weights: str = "sequence", *, has_reward: bool = True) -> Tensor:
        """Gradient of E[reward] - kl_coef KL, negated; with `weights` "token" that of the KL in the engine's states."""
        policy, ref = self.all_of(self.policy), self.all_of(self.reference)
        logps, coef = chosen(policy, self) * self.mask, PURE["kl_coef"]
        probs = logps.sum(1).exp()
        reward = torch.tensor(reward_of(ANSWERS_OF_2), dtype=torch.double)
        of_states = self.probs if weights == "token" else probs if placement != "loss" else probs.detach()
        kl = ((policy.exp() * (policy - ref)).sum(-1) * self.mask).sum(1)
        return gradient(coef * (of_states * kl).sum() - has_reward * (probs * reward).sum(), self.policy)


def gradient(loss: Tensor, model: PreTrainedModel) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in found]).double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"kl_estimator": "k1", "kl_placement": "reward"}, ("reward",)),
        ({"kl_estimator": "exact", "kl_placement": "both", "kl_importance_sampling": "prefix"}, ("both",)),
        ({"kl_estimator": "k3", "kl_placement": "both", "kl_importance_sampling": "sequence"}, ("both",)),
        ({"kl_estimator": "k1", "kl_placement": "reward", "kl_importance_sampling": "prefix"}, ("reward",)),
        ({"kl_estimator": "k3", "kl_placement": "loss", "kl_importance_sampling": "prefix"}, ("loss",)),
        ({"kl_estimator": "exact", "kl_placement": "loss", "kl_importance_sampling": "prefix"}, ("loss",)),
        ({"kl_estimator": "k3", "kl_placement": "loss"}, ("loss", "token")),
        ({"kl_estimator": "k2", "kl_placement": "loss"}, ("loss", "token")),
        ({"kl_estimator": "exact", "kl_placement": "loss"}, ("loss", "token")),
    ],
    ids=str,
)
def test_the_gradient_is_right_under_the_engine(tmp_path: Path, options: dict, target: tuple) -> None:
    """Reward and KL, over all answers: that of the policy's own distribution, with the engine's log-probs only."""
    world = Enumerated(tmp_path, **options, **NO_BOUND)
    wanted = world.wanted(*target)
    assert error(world.found(), wanted) < 1e-5
    # With the trainer's own scores in their place it is not.
    assert error(world.found(replace(world.rollout, engine_logps=world.rollout.old_logps)), wanted) > 0.05


def test_what_is_logged_of_an_engine(tmp_path: Path) -> None:
    """Estimates of the policy's own, by the token's ratio in the states of the engine."""
    world = Enumerated(tmp_path, mode="eval", kl_monitor=["k1", "k3"])
    policy, ref, engine = (world.of(model).detach() for model in (world.policy, world.reference, world.engine))
    mask, log = world.mask, world.made.kl.metrics("eval")
    ratios = (policy - engine).exp()
    apart = torch.expm1(policy - engine) - (policy - engine)
    tokens = float(mask.sum())
    assert log["kl/sampler"] == pytest.approx(float((apart * mask).sum()) / tokens, rel=1e-4)
    assert log["kl/weight_mean"] == pytest.approx(float((ratios * mask).sum()) / tokens, rel=1e-4)
    assert log["kl/k1"] == pytest.approx(float((ratios * (policy - ref) * mask).sum()) / tokens, rel=1e-4)
    cut = (((policy - engine) * mask).sum(1).exp() > 3.0).double().mean()
    pooled = world.made.metrics.take("eval")
    assert pooled["kl/ratio_cut"] == pytest.approx(float(cut), rel=1e-6)
    surprise = float((-ratios * policy * mask).sum(1).mean())
    assert pooled["objective/entropy"] == pytest.approx(surprise, rel=1e-4)
    assert 0 < pooled["kl/ess"] < 1


NAN = math.nan
OLD = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
ENGINE = torch.tensor([[-1.0, 0.5, NAN], [-1.0, 1.0, 0.0]])  # the last token of the second is masked
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
TOKENS = torch.tensor([[1.0, -0.5, 0.0], [1.0, -1.0, 0.0]]).exp()
WHOLE = torch.tensor([[0.5], [0.0]]).exp().expand(2, 3)


@pytest.mark.parametrize(
    ("mode", "low", "high", "ratio"),
    [
        ("token_truncate", None, 2.0, TOKENS.clamp(max=2.0)),
        ("token_truncate", 0.5, None, TOKENS.clamp(min=0.5)),
        ("token_mask", 0.5, 2.0, torch.tensor([[0.0, TOKENS[0, 1], 1.0], [0.0, 0.0, 1.0]])),
        ("token_mask", None, None, TOKENS),
        ("sequence_truncate", None, 1.5, WHOLE.clamp(max=1.5)),
        ("sequence_mask", None, 1.5, torch.tensor([[0.0], [1.0]]).expand(2, 3)),
        ("sequence_mask", None, None, WHOLE),
        ("off", None, 1.5, torch.ones(2, 3)),
    ],
)
def test_the_ratio_of_policy_to_engine(
    tmp_path: Path, mode: str, low: float | None, high: float | None, ratio: Tensor
) -> None:
    """A token without a log-prob of the engine's counts as one that the policy sampled."""
    own = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    if mode == "off":
        own["vllm_importance_sampling_correction"] = False
    else:
        own["vllm_importance_sampling_mode"] = mode
    args = settings(tmp_path, **own)
    torch.testing.assert_close(policy_ratio(OLD, ENGINE, MASK, args), ratio)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off"])
def test_a_token_without_a_log_prob(folder: str, mode: str) -> None:
    """It has the trainer's, in every mode, and nothing is NaN."""
    own = {"vllm_importance_sampling_correction": False} if mode == "off" else {"vllm_importance_sampling_mode": mode}
    made = with_vllm(folder, kl_estimator="exact", kl_placement="both", kl_importance_sampling="prefix", **own)
    FakeLLM.made.unscored = 1
    rollout = first_rollout(made)
    missing = rollout.engine_logps.isnan() & rollout.mask
    assert missing.any() and not missing[:, 0].any()
    assert torch.equal(rollout.sampler_logps[missing], rollout.old_logps[missing])
    made.train()
    assert all(math.isfinite(v) for v in made.state.log_history[0].values() if isinstance(v, float))
    assert all(weight.isfinite().all() for weight in made.model.parameters())


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vllm_mode": "colocated"}, "vllm_mode"),
        ({"vllm_importance_sampling_mode": "token"}, "vllm_importance_sampling_mode"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "vllm_importance_sampling_clip_min=4.0 must be below"),
        (
            {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": None},
            "needs a bound .* use sequence_mask",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(tmp_path, use_vllm=True, **options)


def test_a_policy_in_memory_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not name a path, from which vLLM loads"):
        trainer(tmp_path, given=False, use_vllm=True, value_model=classifier())


def test_a_correction_that_leaves_the_kl_wrong_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="leaves a KL in the reward to whatever the engine sampled .* % off"):
        settings(tmp_path, use_vllm=True, vllm_importance_sampling_correction=False)


def test_names_and_defaults_are_those_of_grpo() -> None:
    from dataclasses import fields

    from trl import GRPOConfig

    from trl_klx import KLXPPOConfig

    theirs, ours = ({f.name: f for f in fields(c) if "vllm" in f.name} for c in (GRPOConfig, KLXPPOConfig))
    assert set(theirs) - set(ours) == {"vllm_structured_outputs_regex", "vllm_importance_sampling_cap"}
    assert set(ours) <= set(theirs)
    assert all(ours[name].default == theirs[name].default for name in ours)
