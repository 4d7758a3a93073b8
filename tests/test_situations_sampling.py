"""What users of GRPO ran into: samples that are not the policy's, answers past their end, KLs of another's tokens."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from support.fault_tools import make
from support.tiny import drift, tiny_dataset, tiny_model
from torch import Tensor
from transformers import GenerationConfig, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper
from trl.trainer import grpo_trainer

from trl_klx import KLXGRPOConfig
from trl_klx.kl import exact_kl, importance_weights, kl_estimate
from trl_klx.kl.sampling import KL, enumerated_policy, reading, sampler_logits
from trl_klx.kl.variance import DISTANCES, World, sampler_behind, world
from trl_klx.monitor.health.readings import Reading
from trl_klx.monitor.health.setup import wrong_weights
from trl_klx.trainers.checks import packages
from trl_klx.trainers.grpo.batch import hidden_mask

pytestmark = pytest.mark.trl

END, TURN, PAD = 1, 7, 0  # the tokenizer's end token, and one more of a chat model's


def grpo(folder: Path, **options: Any) -> Any:
    return make("grpo", folder, **{"kl_estimator": "k3", "kl_placement": "loss", "kl_controller": "fixed"} | options)


def plain(folder: Path, **options: Any) -> Any:
    return grpo(folder, kl_target=None, **options)


def rollout(made: Any, prompts: int = 2) -> dict[str, Tensor]:
    """One generation batch, as training (or, in eval mode, an evaluation) makes it."""
    made.current_gradient_accumulation_steps = 1
    rows = [row for row in tiny_dataset(prompts).to_list() for _ in range(made.num_generations)]
    return made._generate_and_score_completions(rows)


def answers_of(inputs: dict[str, Tensor]) -> list[list[int]]:
    rows = zip(inputs["completion_ids"].tolist(), inputs["completion_mask"].tolist(), strict=True)
    return [[token for token, counts in zip(*row, strict=True) if counts] for row in rows]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The distributions that `generate` draws from, (B, V) a step."""
    seen: list[Tensor] = []
    stock = torch.multinomial

    def multinomial(probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(probs.detach().clone())
        return stock(probs, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return seen


def scored(model: torch.nn.Module, inputs: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(B, C, V) the policy's log-probs along the answers, by a plain forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, inputs["prompt_ids"].size(1) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def assert_samples_are_the_policys(made: Any, inputs: dict, sampled: list[Tensor], temperature: float = 1.0) -> None:
    policy = scored(made.model, inputs, temperature).exp()
    drawn = torch.stack(sampled, dim=1)[:, : policy.size(1)]
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(drawn[mask], policy[mask], rtol=1e-3, atol=1e-5)


# The model's own generation config

LEAKS: dict[str, dict[str, Any]] = {
    "suppressed tokens": {"suppress_tokens": [3, 4, 5, 6], "begin_suppress_tokens": [END]},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "a smallest length": {"min_new_tokens": 6},
    "a cut": {"typical_p": 0.5, "epsilon_cutoff": 0.05, "eta_cutoff": 0.05},
    "banned words": {"bad_words_ids": [[8], [9]]},
    "a bias": {"sequence_bias": [[[10], -5.0]], "exponential_decay_length_penalty": (1, 2.0)},
    "a forced end": {"forced_eos_token_id": END},
    "a search": {"num_beams": 3},
    "another form": {"return_dict_in_generate": True},
}


@pytest.mark.situation("GRPO: the model's generation_config changes what is sampled", "right")
@pytest.mark.parametrize("own", LEAKS.values(), ids=LEAKS)
def test_samples_are_the_policys_whatever_its_generation_config(
    tmp_path: Path, own: dict, sampled: list[Tensor]
) -> None:
    model = tiny_model()
    model.generation_config = kept = GenerationConfig(**{"eos_token_id": END, "pad_token_id": PAD, **own})
    made = plain(tmp_path, model=model, max_completion_length=8)
    assert_samples_are_the_policys(made, rollout(made), sampled)
    assert made.model.generation_config is kept  # what is saved is the user's


@pytest.mark.situation("GRPO with an adapter: the model's generation_config changes what is sampled", "right")
def test_samples_of_an_adapter_are_the_policys(tmp_path: Path, sampled: list[Tensor]) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(no_repeat_ngram_size=1, eos_token_id=END, pad_token_id=PAD)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    made = plain(tmp_path, model=get_peft_model(model, lora))
    assert_samples_are_the_policys(made, rollout(made), sampled)


@pytest.mark.situation("GRPO evaluates a model whose generation_config changes what is sampled", "right")
def test_samples_of_an_evaluation_are_the_policys(tmp_path: Path, sampled: list[Tensor]) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(suppress_tokens=[3, 4, 5, 6], eos_token_id=END, pad_token_id=PAD)
    made = plain(tmp_path, model=model, temperature=0.7)
    made.model.eval()
    assert_samples_are_the_policys(made, rollout(made), sampled, temperature=0.7)


@pytest.mark.situation("GRPO: top_k is vLLM's -1, or null, which transformers reads as its default of 50", "right")
@pytest.mark.parametrize("given", [{"top_k": -1}, {"generation_kwargs": {"top_k": None}}], ids=str)
def test_no_top_k_is_no_top_k(tmp_path: Path, given: dict, sampled: list[Tensor]) -> None:
    made = plain(tmp_path, model=tiny_model(vocab=80), **given)
    assert_samples_are_the_policys(made, rollout(made), sampled)


@pytest.mark.situation("GRPO: the model's generation_config suppresses what the KL is about", "right")
def test_the_sampled_kl_is_the_exact_one(tmp_path: Path) -> None:
    """k1 of many answers, against the exact KL in the same states."""
    model = tiny_model()
    model.generation_config = GenerationConfig(
        suppress_tokens=[*range(3, 13)], typical_p=0.5, eos_token_id=END, pad_token_id=PAD
    )
    made = plain(tmp_path, model=model, kl_monitor=["k1", "exact"])
    drift(made.model, size=0.2)
    inputs = rollout(made, prompts=100)
    with torch.no_grad():
        made._compute_loss(made.model, inputs)
    made.kl.end_step()
    found = made.kl.metrics("train")
    assert found["kl/exact"] > 0.1
    assert abs(found["kl/k1"] - found["kl/exact"]) < 4 * found["kl/k1_se"]


# Where answers end


def chat_model(*ends: int) -> Any:
    """Gives its second end token often."""
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=PAD)
    return model


@pytest.mark.situation("GRPO: generation_config has several end tokens", "right")
@pytest.mark.parametrize(
    ("model_ends", "options"),
    [
        ((TURN, END), {}),
        ((TURN,), {}),
        ((END,), {"generation_kwargs": {"eos_token_id": [TURN]}}),
    ],
    ids=["both", "the other alone", "by generation_kwargs"],
)
def test_an_answer_ends_at_any_end_token(tmp_path: Path, model_ends: tuple, options: dict) -> None:
    made = plain(tmp_path, model=chat_model(*model_ends), max_completion_length=24, **options)
    inputs = rollout(made, prompts=8)
    answers = answers_of(inputs)
    assert all(not {END, TURN} & set(ids[:-1]) for ids in answers)
    assert {ids[-1] for ids in answers} >= {END, TURN}
    metrics = made._metrics["train"]
    ended = [len(ids) for ids in answers if ids[-1] in (END, TURN, PAD)]  # TRL: who pads last has ended
    assert metrics["completions/clipped_ratio"] == [pytest.approx(1 - len(ended) / len(answers))]
    assert metrics["completions/mean_terminated_length"] == [pytest.approx(sum(ended) / len(ended))]
    assert metrics["completions/max_terminated_length"] == [max(ended)]


@pytest.mark.situation("GRPO: continuous batching, and generation_config has several end tokens", "right")
def test_an_answer_of_a_continuous_batch_ends_at_any_end_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' batches take half a minute to start here; what they are asked for, and what is made of it."""
    made = plain(tmp_path, model=chat_model(TURN, END), use_transformers_continuous_batching=True)
    asked: list[GenerationConfig] = []

    def generate_batch(prompts: list, generation_config: GenerationConfig, **_: Any) -> dict:
        asked.append(generation_config)
        return {row: SimpleNamespace(generated_tokens=[5, 6, TURN, 8]) for row in range(len(prompts))}

    monkeypatch.setattr(type(made.model), "generate_batch", staticmethod(generate_batch))
    assert answers_of(rollout(made)) == [[5, 6, TURN]] * 8
    assert asked[0].eos_token_id == [END, TURN]
    assert made._metrics["train"]["completions/clipped_ratio"] == [0.0]


@pytest.mark.situation("GRPO: mask_truncated_completions where generation_config has several end tokens", "right")
def test_an_answer_with_another_end_is_not_cut_off(tmp_path: Path) -> None:
    options = {"max_completion_length": 8, "mask_truncated_completions": True}
    made = plain(tmp_path, model=chat_model(END, TURN), **options)
    inputs = rollout(made, prompts=8)
    counts = inputs["completion_mask"].bool().any(1)
    ids = inputs["completion_ids"].tolist()
    # A padding token that the policy sampled last is an end to TRL, too.
    assert counts.tolist() == [bool({END, TURN} & set(row)) or row[-1] == PAD for row in ids]
    assert 0 < counts.sum() < len(counts)
    lengths = inputs["completion_mask"].sum(1).tolist()
    assert {row[n - 1] for row, n in zip(ids, lengths, strict=True) if n} >= {END, TURN}
    assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()
    assert made.mask_truncated_completions


# vLLM: TRL's engine, replaced by the model itself


class Engine:
    """Stands for TRL's `VLLMGeneration`: answers of uneven length with the log-probs that they were sampled by."""

    def __init__(self, model: Any, generation_kwargs: dict | None = None, **settings: Any) -> None:
        self.model, self.generation_kwargs, self.settings = model, generation_kwargs or {}, settings
        self.logps: Tensor | None = None

    def sync_weights(self) -> None: ...

    def generate(self, prompts: list, **_: Any) -> tuple:
        answers = [[5, 6, 9], [5, 8, TURN], [4, TURN, 6], [9, END, 3]] * (len(prompts) // 4)
        return prompts, answers, [[[-0.5]] * len(ids) for ids in answers], None


def install(engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the engine's place, as if vLLM were there."""
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", engine)
    monkeypatch.setattr(packages, "_VLLM", packages._VLLM._replace(modules=("torch",)))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    install(Engine, monkeypatch)


@pytest.mark.usefixtures("engine")
@pytest.mark.situation("GRPO with vLLM: a model in memory has several end tokens", "right")
def test_the_engine_is_told_all_end_tokens(tmp_path: Path) -> None:
    given = {"stop_token_ids": [9], "min_tokens": 0}
    made = plain(tmp_path, model=chat_model(TURN, END), use_vllm=True, generation_kwargs=given)
    assert made.vllm_generation.generation_kwargs == {"stop_token_ids": [END, TURN, 9], "min_tokens": 0}
    assert given == {"stop_token_ids": [9], "min_tokens": 0}
    inputs = rollout(made)
    assert answers_of(inputs)[:4] == [[5, 6, 9], [5, 8, TURN], [4, TURN], [9]]
    assert made._metrics["train"]["completions/clipped_ratio"] == [0.0]
    assert (inputs["sampling_per_token_logps"] != 0).sum() == inputs["completion_mask"].sum()


# What the user asks of the sampler


@pytest.mark.situation("GRPO: generation_kwargs that make no samples", "refused")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"do_sample": False}, "takes the likeliest answer"),
        ({"num_beams": 4}, "searches for likely answers"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "searches for likely answers"),
        ({"num_return_sequences": 2}, "num_generations sets how many"),
        ({"return_dict_in_generate": True}, "TRL does not read"),
        ({"stop_strings": ["\n"]}, "eos_token_id takes ids"),
        ({"temperature": 0}, "is not a temperature to sample at"),
        ({"temperature": "hot"}, "is not a temperature to sample at"),
        ({"topk": 5}, "did you mean 'top_k'"),
        ('{"do_sample": false}', "takes the likeliest answer"),
    ],
    ids=str,
)
def test_what_is_no_sampling_is_refused(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, generation_kwargs=given)


@pytest.mark.situation("GRPO with vLLM: generation_kwargs that TRL or GRPO cannot use", "refused")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 2}, "num_generations sets how many"),
        ({"seed": 1}, "the same random numbers"),
        ({"logprobs": 5}, "the likeliest token's log-prob"),
        ({"temperature": 0.0}, "is not a temperature to sample at"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_be_asked(tmp_path: Path, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KLXGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, use_vllm=True, generation_kwargs=given)


ASKED: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"generation_kwargs": {"temperature": 0.5}},
    {"generation_kwargs": {"top_k": 3, "use_cache": True}},
    {"generation_kwargs": {"suppress_tokens": [4, 5], "min_new_tokens": 3}},
]


@pytest.mark.situation("GRPO: the recipe samples from another distribution than is scored (top_k, top_p ...)", "warned")
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_another_distribution_is_told_with_its_size(
    tmp_path: Path, asked: dict, sampled: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with what the sampler's own log-probs say, which are taken for the weights."""
    made = plain(tmp_path, **asked)
    inputs = rollout(made)
    drawn = torch.stack(sampled, dim=1)[:, : inputs["completion_ids"].size(1)]
    ids, mask = inputs["completion_ids"].unsqueeze(-1), inputs["completion_mask"].bool()
    sampler_logps = drawn.gather(-1, ids).squeeze(-1).log()
    torch.testing.assert_close(inputs["sampling_per_token_logps"][mask], sampler_logps[mask], rtol=1e-4, atol=1e-5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made._compute_loss(made.model, inputs)
    (said,) = [text for text in caplog.messages if "sampled from another distribution" in text]
    logps = scored(made.model, inputs).gather(-1, ids).squeeze(-1)
    size = kl_estimate(sampler_logps, logps, "k3")[mask].mean()
    assert f"{float(size):.2g} nats per token away" in said
    assert f"average {float((logps - sampler_logps).exp()[mask].mean()):.3f}" in said
    name, value = next(iter(asked.items()))
    assert f"{name}=" in said and "use_cache" not in said
    assert str(next(iter(value.values())) if isinstance(value, dict) else value) in said


@pytest.mark.situation("GRPO: continuous batching, and top_p cuts what is sampled", "warned")
def test_another_distribution_is_told_where_nothing_measures_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain(tmp_path, use_transformers_continuous_batching=True, top_p=0.7)
    (said,) = [text for text in caplog.messages if "sampled from another distribution" in text]
    assert "top_p=0.7" in said and "nothing corrects" in said


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_p": None, "temperature": 0.5},
        {"temperature": 0.5, "generation_kwargs": {"temperature": 0.5, "top_k": 0, "use_cache": True}},
        {"top_k": 3, "beta": 0.0},  # no KL
    ],
    ids=str,
)
def test_what_changes_nothing_is_not_told(tmp_path: Path, asked: dict, caplog: pytest.LogCaptureFixture) -> None:
    made = plain(tmp_path, **asked)
    with caplog.at_level(logging.WARNING):
        inputs = rollout(made)
        made._compute_loss(made.model, inputs)
    assert "sampling_per_token_logps" not in inputs
    assert "another distribution" not in caplog.text


@pytest.mark.situation("GRPO: generation_kwargs sets another temperature than the policy is scored at", "right")
def test_the_kl_of_another_temperature_is_corrected(tmp_path: Path) -> None:
    """k1 and k3 of many answers, against the exact KL in the same states."""
    made = plain(tmp_path, generation_kwargs={"temperature": 1.6}, kl_monitor=["k1", "k3", "exact"])
    drift(made.model)
    inputs = rollout(made, prompts=100)
    with torch.no_grad():
        made._compute_loss(made.model, inputs)
    made.kl.end_step()
    found = made.kl.metrics("train")
    for name in ("k1", "k3"):
        assert abs(found[f"kl/{name}"] - found["kl/exact"]) < 4 * found[f"kl/{name}_se"], name
    logps = scored(made.model, inputs)
    ids, mask = inputs["completion_ids"].unsqueeze(-1), inputs["completion_mask"].bool()
    ref = scored(made.ref_model, inputs)
    unweighted = (logps - ref).gather(-1, ids).squeeze(-1)[mask].mean()
    assert abs(float(unweighted) - found["kl/exact"]) > 4 * found["kl/k1_se"]  # it does matter


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"min_p": 0.3}, {"temperature": 0.5, "top_p": 0.8}], ids=str)
def test_the_enumerated_sampler_cuts_as_transformers_does(settings: dict) -> None:
    logits = enumerated_policy().policy
    cuts = {"temperature": TemperatureLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    wanted = logits
    for name, warper in cuts.items():
        wanted = warper(settings[name])(None, wanted) if name in settings else wanted
    assert wanted.isinf().any()
    torch.testing.assert_close(sampler_logits(logits, **settings), wanted)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_what_an_estimate_reads_on_the_policys_own_answers(estimator: Any) -> None:
    own = enumerated_policy().policy
    assert reading(estimator, own, is_weighted=True) == pytest.approx(KL, rel=1e-6)
    warm = sampler_logits(own, temperature=1.5)
    # The weight leaves the states, which stay the sampler's.
    assert reading("k1", warm, is_weighted=True) == pytest.approx(reading("k3", warm, is_weighted=True), rel=1e-6)
    assert abs(reading(estimator, warm, is_weighted=True) - KL) < abs(reading(estimator, warm, is_weighted=False) - KL)


# Answers of a policy that has moved since


def expected_readings(here: World, sampler: Tensor, estimator: str) -> tuple[float, float]:
    """Expectation over the sampler's answers of an estimate's sum, plain and weighted by the token."""
    logps, ref_logps, sampler_logps = here.logps(here.policy), here.logps(here.ref), here.logps(sampler)
    mask = torch.ones_like(here.actions, dtype=torch.bool)
    values = kl_estimate(logps, ref_logps, estimator)  # type: ignore[arg-type]
    weights = importance_weights(logps, sampler_logps, mask, level="token")
    probs = here.probs(sampler)[:, None]
    return float((probs * values).sum()), float((probs * weights * values).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_token_weights_make_a_sampled_estimate_the_exact_kl_of_its_states(estimator: str) -> None:
    """Enumerated over all answers: what an estimate reads off-policy, and what it reads with the token's weight."""
    here = world(DISTANCES[0.10])
    sampler = sampler_behind(here, 0.01)
    exact = exact_kl(here.policy[here.states], here.ref[here.states])
    of_states = float((here.probs(sampler)[:, None] * exact).sum())
    plain_reading, weighted_reading = expected_readings(here, sampler, estimator)
    assert weighted_reading == pytest.approx(of_states, rel=1e-12)
    assert abs(plain_reading / of_states - 1) > {"k1": 0.1, "k3": 0.01}[estimator]


@pytest.mark.situation("GRPO: kl_signal k1 where answers are used again (num_iterations, vLLM)", "right")
@pytest.mark.parametrize("source", ["old_per_token_logps", "sampling_per_token_logps"])
def test_a_sampled_kl_is_weighted_off_policy(tmp_path: Path, source: str) -> None:
    """By the policy's ratio to what sampled: log-probs of the rollout, or the inference engine's."""
    made = plain(tmp_path, kl_signal="k1", kl_monitor=["k1", "exact"])
    inputs = rollout(made, prompts=4)
    logps = scored(made.model, inputs).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    drift(made.model, size=0.03)
    moved = scored(made.model, inputs).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        made._compute_loss(made.model, {**inputs, source: logps})
    made.kl.end_step()
    found = made.kl.metrics("train")
    mask = inputs["completion_mask"].bool()
    ratio = moved - inputs["ref_per_token_logps"]
    assert found["kl/k1"] == pytest.approx(float(((moved - logps).exp() * ratio)[mask].mean()), rel=1e-3)
    assert found["kl/k1"] != pytest.approx(float(ratio[mask].mean()), rel=0.01)
    assert found["kl/weight_mean"] == pytest.approx(float((moved - logps).exp()[mask].mean()), rel=1e-4)


@pytest.mark.situation("GRPO: num_iterations above 1 with a controller that reads k1", "right")
def test_a_reused_answers_kl_is_the_policys(tmp_path: Path) -> None:
    """In a run: after the policy has moved, k1 agrees with the exact KL, and the weights average 1."""
    made = plain(
        tmp_path,
        num_iterations=2,
        steps_per_generation=2,
        kl_signal="k1",
        kl_monitor=["k1", "exact"],
        max_steps=12,
        logging_steps=12,
        learning_rate=3e-2,
        per_device_train_batch_size=32,
        beta=1e-3,
    )
    made.train()
    entry = made.state.log_history[0]
    assert entry["kl/exact"] > 0.05
    assert abs(entry["kl/k1"] - entry["kl/exact"]) < 5 * entry["kl/k1_se"]
    assert entry["kl/weight_mean_se"] > 0
    assert abs(entry["kl/weight_mean"] - 1) < 5 * entry["kl/weight_mean_se"]


# What a mask hides


@pytest.mark.situation("GRPO with vLLM and top_k 1: answers that are cut off drift behind the mask", "right")
def test_a_log_prob_of_zero_is_a_certain_token_where_there_are_no_tools() -> None:
    inputs = {
        "completion_ids": torch.tensor([[5, 6, 1, 0], [5, 9, 7, 8]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]),
        "sampling_per_token_logps": torch.zeros(2, 4),
    }
    assert hidden_mask(inputs, PAD).tolist() == [4 * [False], 4 * [True]]


@pytest.mark.situation("GRPO with tools: answers that are cut off drift behind the mask", "right")
@pytest.mark.parametrize("engine_logps", [None, torch.tensor([[-1.0, 0, -1, -1], [0, 0, 0, 0]])], ids=["none", "some"])
def test_the_tools_part_of_a_cut_answer_is_known(tmp_path: Path, engine_logps: Tensor | None) -> None:
    """TRL's mask of it is 0 all over; what it was before says which tokens the policy made."""
    made = plain(tmp_path, mask_truncated_completions=True)
    lists = [[3, 4, 9, END], [5, 6, 7, 8]]
    tools = [[1, 0, 1, 1], [1, 0, 1, 1]]

    def answers(prompts: list, trainer: Any) -> dict:
        logps = engine_logps.tolist() if engine_logps is not None else [[-1.0] * 4] * 2
        return {"prompt_ids": [[3]] * 2, "completion_ids": lists, "logprobs": logps, "env_mask": tools}

    made.rollout_func, made.num_generations = answers, 2
    rows = tiny_dataset(1).to_list() * 2
    made.current_gradient_accumulation_steps = 1
    inputs = made._generate_and_score_completions(rows)
    if engine_logps is None:
        del inputs["sampling_per_token_logps"]
    assert inputs["tool_mask"][1].sum() == 0
    hidden = hidden_mask(inputs, PAD)
    assert hidden.tolist() == [[False] * 4, [True, False, True, True]]


# Steps that are skipped under DeepSpeed; a run of it is in test_distributed.py


@pytest.mark.situation("GRPO under DeepSpeed: a step is skipped for what is not its loss", "right")
def test_deepspeed_gets_a_loss_that_it_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plain(tmp_path, reward=lambda completions, **_: [None] * len(completions))
    inputs = rollout(made)
    assert made.compute_loss(made.model, inputs).isfinite()  # other strategies drop the gradients of the step
    monkeypatch.setattr(type(made.accelerator), "distributed_type", DistributedType.DEEPSPEED)
    assert made.compute_loss(made.model, inputs).isnan()
    made.guard.begin()
    inputs["unscored"] = torch.tensor(False)
    assert made.compute_loss(made.model, inputs).isfinite()


# Weights that are none


def readings(*values: float) -> list[Reading]:
    return [Reading(step, value) for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("mean", "error", "ess", "found"),
    [
        ([0.9] * 10, 0.01, [0.8], "never produces what the policy might"),
        ([1.2] * 10, 0.02, [], "not those it sampled by"),
        ([0.9] * 9, 0.01, [0.8], None),  # too few
        ([0.98] * 10, 0.001, [0.8], None),  # rounding
        ([0.9] * 10, 0.08, [0.8], None),  # noise
        ([0.5] * 10, 0.01, [0.4], None),  # too few effective samples for a mean: another alarm's
        ([0.8, 1.2] * 5, 0.01, [], None),
        ([], 0.01, [], None),
    ],
)
def test_which_weights_are_wrong(mean: list, error: float, ess: list, found: str | None) -> None:
    finding = wrong_weights(readings(*mean), readings(*[error] * len(mean)), readings(*ess))
    assert (finding is None) == (found is None)
    if found is not None:
        assert found in finding.cause


def logged_alarms(made: Any) -> set[str]:
    entries = made.state.log_history
    return {name for entry in entries for name in entry if name.startswith("health/")}


@pytest.mark.situation("GRPO: top_p cuts what the policy might sample, and the run continues", "warned")
def test_weights_that_do_not_average_one_raise_the_alarm(tmp_path: Path) -> None:
    made = plain(tmp_path, top_p=0.7, max_steps=12, learning_rate=1e-3)
    made.train()
    assert "health/wrong_weights" in logged_alarms(made)
    assert made.state.log_history[-2]["kl/weight_mean"] < 0.9


class RawEngine(Engine):
    """Samples at the recipe's temperature, and reports log-probs at temperature 1."""

    @torch.no_grad()
    def generate(self, prompts: list, **_: Any) -> tuple:
        answers, logps = [], []
        for ids in prompts:
            tokens = torch.tensor([ids])
            rows: list[list[float]] = []
            for _step in range(4):
                logits = self.model(input_ids=tokens).logits[:, -1]
                token = torch.multinomial((logits / self.settings["temperature"]).softmax(-1), 1)
                rows.append([float(logits.log_softmax(-1).gather(1, token))])
                tokens = torch.cat([tokens, token], 1)
            answers.append(tokens[0, len(ids) :].tolist())
            logps.append(rows)
        return prompts, answers, logps, None


@pytest.mark.situation("GRPO with vLLM: the engine reports raw log-probs at a temperature", "warned")
def test_log_probs_that_were_not_sampled_by_raise_the_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(RawEngine, monkeypatch)
    made = plain(tmp_path, use_vllm=True, temperature=1.6, max_steps=12, learning_rate=1e-3)
    made.train()
    assert "health/wrong_weights" in logged_alarms(made)


@pytest.mark.parametrize("iterations", [1, 3])
def test_right_weights_raise_no_alarm(tmp_path: Path, iterations: int) -> None:
    """Few prompts, short answers, a policy that moves far from the one that sampled; and answers that it has learnt."""
    options = {"steps_per_generation": 4, "num_iterations": iterations, "learning_rate": 1e-2, "beta": 0.02}
    made = plain(tmp_path, max_steps=48, **options)
    made.train()
    assert "health/wrong_weights" not in logged_alarms(made)
    means = [entry["kl/weight_mean"] for entry in made.state.log_history if "kl/weight_mean" in entry]
    assert len(means) == 48 // iterations
    assert max(abs(mean - 1) for mean in means) > 0.01


@pytest.mark.situation("PPO: several epochs on one rollout, with the KL in the loss", "right")
def test_ppo_logs_the_mean_of_its_weights(tmp_path: Path) -> None:
    options = {"kl_estimator": "k3", "kl_placement": "loss", "kl_controller": "fixed", "kl_target": None}
    made = make("ppo", tmp_path, num_ppo_epochs=2, num_mini_batches=2, learning_rate=3e-3, max_steps=4, **options)
    made.train()
    entry = made.state.log_history[0]
    assert entry["kl/weight_mean_se"] > 0
    assert abs(entry["kl/weight_mean"] - 1) < 6 * entry["kl/weight_mean_se"]
