"""Answers from vLLM in `generate`'s place, through TRL's `VLLMGeneration`, with the weights of the policy."""

import math
from typing import TYPE_CHECKING, Any

from trl.generation.vllm_generation import VLLMGeneration

from ..parts import Part
from ..shared.generation import until_stop
from .config import as_dict

if TYPE_CHECKING:
    from .loop import PPOLoop


class Engine(Part):
    """TRL's vLLM, set up as GRPO sets it up: in the training processes or on a server, whole or as its GPUs share it.

    It samples at `temperature` from the whole distribution. TRL sends the weights, gathered under ZeRO-3 and FSDP2 and
    with an adapter merged for the time, before the first answers of every step.

    Args:
        trainer: whose policy answers.
        policy: that policy, as it was before it was wrapped.
        prompts: of a rollout on this process; answers to all of them are sampled at once.

    Raises:
        ValueError: an engine of its own cannot find the policy's files, or FSDP1 has flattened the policy's weights.
    """

    def __init__(self, trainer: "PPOLoop", policy: Any, prompts: int) -> None:
        args = trainer.args
        self._trainer = trainer
        self._stop_tokens = trainer.stop_tokens
        if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "use_vllm=true: FSDP1 flattens the policy's weights together with the value model's, and they cannot "
                "be sent: set fsdp_version: 2 in the accelerate file."
            )
        if args.vllm_mode == "colocate" and not policy.name_or_path:
            raise ValueError(
                "use_vllm=true: the policy in memory does not name a path, from which vLLM loads its own copy: save it "
                "with save_pretrained, and pass the path."
            )
        self.begin()
        self.generation: Any = VLLMGeneration(
            model=policy,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            group_port=args.vllm_group_port,
            server_timeout=args.vllm_server_timeout,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=prompts * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=bool((as_dict(args.model_init_kwargs) or {}).get("trust_remote_code")),
            temperature=args.temperature,
            max_completion_length=args.response_length,
            # The engine knows the end tokens of a model's folder: neither the tokenizer's nor those of a stop_token_id.
            generation_kwargs={"ignore_eos": True, "stop_token_ids": self._stop_tokens},
        )

    def begin(self) -> None:
        """Also to be called where the policy gets other weights without a step."""
        self._sent_at: int | None = None  # the step whose weights the engine has

    def update(self) -> None:
        """Send the policy's weights, where they are not those that the engine has. Call on every process."""
        step = self._trainer.state.global_step
        if self._sent_at != step:
            self.generation.sync_weights()
            self._sent_at = step

    def sample(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """An answer to each prompt up to its end, and the log-probs by which its tokens were sampled, in nats.

        NaN stands for a token to which the engine gives none. Call on every process.
        """
        self.update()
        _, sampled, logps, _ = self.generation.generate(prompts=prompt_ids, images=None, num_generations=1)
        answers = [until_stop(list(ids), self._stop_tokens) for ids in sampled]
        rows = [
            [math.nan if own[0] is None else own[0] for own in row[: len(ids)]]
            for row, ids in zip(logps, answers, strict=True)
        ]
        return answers, rows
