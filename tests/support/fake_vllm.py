"""vLLM as far as TRL's `VLLMGeneration` asks for it: a plain model that is loaded, gets weights by name, and samples.

All between it and the trainer is TRL's own: which weights are sent and when, what is asked for, what is read.
"""

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.generation.vllm_generation as generation
from torch import Tensor
from transformers import AutoModelForCausalLM

from trl_klx.trainers.checks import packages


class FakeLLM:
    """An engine in float32.

    Attributes:
        made: of all engines, the latest.
        arguments: what it was made with.
        loads: how often each weight has come.
        asked: the prompts and the settings of every call.
        unscored: the place of an answer's token to which it gives no log-prob; None: it gives all.
    """

    made: "FakeLLM"

    def __init__(self, model: str, **arguments: Any) -> None:
        FakeLLM.made, self.arguments = self, {"model": model, **arguments}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.loads: dict[str, int] = {}
        self.asked: list[tuple[list, SimpleNamespace]] = []
        self.unscored: int | None = None
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them for vLLM: the next trainer is alone, too
            os.environ.pop(name, None)

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
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, prompt: list[int], settings: SimpleNamespace) -> SimpleNamespace:
        assert settings.ignore_eos
        ids, logps = list(prompt), []
        while len(logps) < settings.max_tokens and not (logps and ids[-1] in settings.stop_token_ids):
            scores = (self.model(torch.tensor([ids])).logits[0, -1] / settings.temperature).log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1))
            logp = math.nan if len(logps) == self.unscored else float(scores[token])
            ids.append(token)
            logps.append({token: SimpleNamespace(logprob=logp, rank=1)})
        answer = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=logps)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were there."""
    monkeypatch.setattr(packages, "_VLLM", packages._VLLM._replace(modules=("torch",)))
    monkeypatch.setattr(generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", SimpleNamespace, raising=False)
