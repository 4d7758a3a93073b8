"""vLLM as far as TRL's `VLLMGeneration` asks for it: a plain model that is loaded, gets weights by name, and samples.

All between it and the trainer is TRL's own: which weights are sent and when, what is asked for, what is read.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as generation
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from trl_klx.trainers.checks import packages


class FakeLLM:
    """An engine in float32.

    Attributes:
        made: of all engines, the latest.
        arguments: what it was made with.
        loads: how often each weight has come.
        asked: the prompts and the settings of every call.
        unscored: the place of an answer's token to which it gives no log-prob; None: it gives all.
        given: answers to prompts, which it scores in place of sampling; None: it samples.
    """

    made: "FakeLLM"

    def __init__(self, model: str, **arguments: Any) -> None:
        FakeLLM.made, self.arguments = self, {"model": model, **arguments}
        self.model = _loaded(model)
        self.loads: dict[str, int] = {}
        self.asked: list[tuple[list, SimpleNamespace]] = []
        self.unscored: int | None = None
        self.given: Callable[[list[list[int]]], list[list[int]]] | None = None
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )
        if os.environ["WORLD_SIZE"] == "1":  # TRL sets them for vLLM: the next trainer is alone, too
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                del os.environ[name]

    @torch.no_grad()
    def load(self, named: list[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in named:
            own[name].copy_(weight)
            self.loads[name] = self.loads.get(name, 0) + 1

    @property
    def syncs(self) -> int:
        """How often all of its weights have come."""
        (count,) = {self.loads.get(name, 0) for name, _ in self.model.named_parameters()}
        return count

    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompts: list[dict], sampling_params: SimpleNamespace, use_tqdm: bool) -> list:
        self.asked.append((prompts, sampling_params))
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        given = [None] * len(ids) if self.given is None else self.given(ids)
        return [self._answer(prompt, own, sampling_params) for prompt, own in zip(ids, given, strict=True)]

    @torch.no_grad()
    def _answer(self, prompt: list[int], given: list[int] | None, settings: SimpleNamespace) -> SimpleNamespace:
        assert settings.ignore_eos
        ids, logps = list(prompt), []
        most = settings.max_tokens if given is None else len(given)
        while len(logps) < most and not (logps and ids[-1] in settings.stop_token_ids):
            scores = (self.model(torch.tensor([ids])).logits[0, -1] / settings.temperature).log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1)) if given is None else given[len(logps)]
            logp = math.nan if len(logps) == self.unscored else float(scores[token])
            ids.append(token)
            logps.append({token: SimpleNamespace(logprob=logp, rank=1)})
        answer = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=logps)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


def _loaded(folder: str) -> PreTrainedModel:
    """Whole on every process: what transformers loads under ZeRO-3 is sharded."""
    config = AutoConfig.from_pretrained(folder)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were there."""
    monkeypatch.setattr(packages, "_VLLM", packages._VLLM._replace(modules=("torch",)))
    monkeypatch.setattr(generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", SimpleNamespace, raising=False)
