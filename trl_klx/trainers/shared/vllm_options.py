"""Options of sampling with vLLM: those of TRL's `GRPOConfig`, under its names, for a trainer that has none of TRL's."""

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.base_config import _BaseConfig

VLLM_CHOICES: dict[str, tuple[str, ...]] = {
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("auto", "vllm", "transformers", "terratorch"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class VLLMArguments(_BaseConfig):
    """How answers are sampled by vLLM, and what corrects them. Names and defaults are those of TRL's GRPO.

    TRL's `vllm_structured_outputs_regex` is not among them, because it samples from another distribution than the one
    that is scored, nor is `vllm_importance_sampling_cap`, an old name of `vllm_importance_sampling_clip_max`.
    """

    use_vllm: bool = _option(False, "Sample answers with vLLM in place of transformers' generate.")
    vllm_mode: str = _option(
        "colocate", "Where vLLM runs: colocate (in the training processes, on their GPUs) or server (trl vllm-serve)."
    )
    vllm_model_impl: str = _option(
        "vllm", "Whose code of the model vLLM runs: vllm, transformers, terratorch, or auto (vLLM's where it has one)."
    )
    vllm_enable_sleep_mode: bool = _option(
        False, "Colocated: free the engine's weights and cache during the updates, at the cost of loading them again."
    )
    vllm_server_base_url: str | None = _option(
        None, "Address of the server, such as http://localhost:8000, in place of vllm_server_host and vllm_server_port."
    )
    vllm_server_host: str = _option("0.0.0.0", "Host of the server.")
    vllm_server_port: int = _option(8000, "Port of the server.")
    vllm_server_timeout: float = _option(240.0, "Seconds to wait for the server to be up.")
    vllm_group_port: int = _option(51216, "Port by which new weights go to the server.")
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Colocated: part of each GPU's memory that is the engine's, weights and cache together."
    )
    vllm_max_model_length: int | None = _option(
        None, "Most tokens of prompt and answer that the engine makes room for. Default: what the model reads."
    )
    vllm_tensor_parallel_size: int = _option(1, "Colocated: GPUs that share an engine; must divide the processes.")
    vllm_importance_sampling_correction: bool = _option(
        True,
        "Multiply the policy's loss by the ratio of policy to engine, because the engine's rounding and weights are "
        "not the trainer's. (The KL in the loss has its own weight, kl_importance_sampling.)",
    )
    vllm_importance_sampling_mode: str = _option(
        "sequence_mask",
        "Which ratio, and what its bounds do: of each token or of the whole answer (sequence), set to the bound "
        "(truncate) or to 0 (mask) beyond it: token_truncate, token_mask, sequence_truncate or sequence_mask.",
    )
    vllm_importance_sampling_clip_max: float | None = _option(3.0, "Upper bound of this ratio; null: none.")
    vllm_importance_sampling_clip_min: float | None = _option(None, "Lower bound of this ratio; null: none.")

    def check_vllm(self) -> None:
        """Refuse bounds that TRL's GRPO refuses. Raises ValueError with one sentence."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}."
            )
        mode = self.vllm_importance_sampling_mode
        if self.vllm_importance_sampling_correction and mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r} needs a bound to truncate at: set "
                f"vllm_importance_sampling_clip_max, or use {mode.removesuffix('truncate')}mask, which needs none."
            )
