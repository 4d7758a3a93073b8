"""The models of a run, and what a process would hold in its device's memory: counted where it can be, else estimated.

Counted exactly for one process and DDP: weights, gradients and the optimizer's state. DeepSpeed and FSDP share these
out by the formulas of the ZeRO paper (Rajbhandari et al., 2020, section 3). Activations, logits and caches are
estimates: they depend on kernels and on how long prompts and answers really are (docs/explain.md: two comparisons).
"""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ...kl.chunked.checks import default_chunk_size
from ..recipe.algorithm import Algorithm, Shape
from ..recipe.arguments import Recipe
from ..sources.named_models import REWARDS, NamedModels, Weights, classifier_on_meta
from .layout import Layout

EXACT, FORMULA, ESTIMATE = "exact", "formula", "estimate"
ALWAYS, TRAINING, GENERATION = "always", "training", "generation"
_GIB = 2**30
CONTEXT = "context, kernels, fragmentation"
_OVERHEAD = 2 * _GIB  # of the device, its kernels and communication
_VLLM_CACHE = 2 * _GIB  # the least that vLLM needs beside its weights
_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters


class Models(NamedTuple):
    """The models of a run. `policy` includes an adapter, `base` does not; None where there is no such model."""

    config: PreTrainedConfig  # of the policy: hidden size, layers, vocabulary
    policy: Weights
    base: Weights
    reference: Weights | None
    value: Weights | None
    reward: Weights | None
    adapts_head: bool  # whether the adapter sits on the output head

    @property
    def trained(self) -> Weights:
        """What the optimizer sees, and what is loaded with it."""
        if self.value is None:
            return self.policy
        return Weights(*map(sum, zip(self.policy, self.value, strict=True)))


def count_models(algorithm: Algorithm, recipe: Recipe, named: NamedModels) -> Models:
    """Count the models of a run, from those that its recipe names."""
    policy, value = named.policy, named.classifiers.get("value_model_path")
    if policy.bits and algorithm.halves_adapters:
        trained = 2 * policy.trainable
        policy = policy._replace(bytes=policy.bytes - policy.trainable_bytes + trained, trainable_bytes=trained)
    if value is None and algorithm.has_value_model:
        value = Weights.of(classifier_on_meta(named.config, named.dtype))
    frozen = named.base._replace(trainable=0, trainable_bytes=0, trainable_tensors=0)
    reference = frozen if algorithm.loads_reference(recipe.args) and not recipe.model.use_peft else None
    reward = next((named.classifiers[option] for option in REWARDS if option in named.classifiers), None)
    return Models(named.config, policy, named.base, reference, value, reward, named.adapts_head)


class Part(NamedTuple):
    """One thing in memory, how its size is known, and when it is there."""

    name: str
    bytes: int
    how: str
    when: str = ALWAYS


class Memory(NamedTuple):
    """All parts, and what vLLM takes of each device beside them, as a fraction of it and as bytes of weights in it."""

    parts: list[Part]
    vllm_share: float
    vllm_weights: int

    @property
    def peak(self) -> int:
        """Bytes at the more demanding of training and generation, without vLLM's share."""
        phases = [sum(p.bytes for p in self.parts if p.when in (ALWAYS, phase)) for phase in (TRAINING, GENERATION)]
        return max(phases)

    @property
    def device(self) -> int:
        """Bytes that a device must have for the peak beside vLLM's share, and for vLLM's weights within it."""
        if not self.vllm_share:
            return self.peak
        return round(max(self.peak / (1 - self.vllm_share), (self.vllm_weights + _VLLM_CACHE) / self.vllm_share))


def estimate(algorithm: Algorithm, recipe: Recipe, models: Models, layout: Layout) -> Memory:
    """The memory of one process."""
    args = recipe.args
    shape = algorithm.shape(args)
    parts = [*training_state(models.trained, args, layout), *_other_models(models, layout, args)]
    parts += _training_buffers(args, models, shape)
    if shape.generated:
        parts += _generation(args, models, shape, layout)
    if layout.shards_parameters:
        live = 2 * min(models.trained.parameters, _LIVE_PARAMETERS)
        parts.append(Part("layers gathered for use", live, ESTIMATE))
    parts.append(Part(CONTEXT, _OVERHEAD, ESTIMATE))
    colocated = getattr(args, "use_vllm", False) and args.vllm_mode == "colocate"
    share = args.vllm_gpu_memory_utilization if colocated else 0.0
    base = models.base.bytes if models.base.bits else 2 * models.base.parameters
    weights = base // args.vllm_tensor_parallel_size if share else 0
    return Memory([part for part in parts if part.bytes], share, weights)


def training_state(weights: Weights, args: Any, layout: Layout) -> list[Part]:
    """Weights, gradients and optimizer state of what is trained, and of what is loaded with it."""
    states = _states(args.optim)
    processes = layout.processes
    if layout.kind not in ("DEEPSPEED", "FSDP"):
        parts = [
            Part("weights", weights.bytes, EXACT),
            Part("gradients", weights.trainable_bytes, EXACT),
            Part("optimizer state", optimizer_bytes(weights, args.optim), EXACT if states is not None else ESTIMATE),
        ]
        if processes > 1:
            parts.append(Part("DDP's buckets", weights.trainable_bytes, ESTIMATE))
        return parts
    half = bool(args.bf16 or args.fp16) and layout.kind == "DEEPSPEED"
    width = 2 if half else 4
    held = weights.bytes if weights.bits else width * weights.parameters  # packed ones stay as they are
    held //= processes if layout.shards_parameters else 1
    gradients = width * weights.trainable // (processes if layout.shards_gradients else 1)
    master = 4 * weights.trainable if half else 0
    optimizer = master + 4 * (2 if states is None else states) * weights.trainable
    optimizer //= processes if layout.shards_optimizer else 1
    return [
        Part("weights", 0 if layout.offloads_parameters else held, FORMULA),
        Part("gradients", gradients, FORMULA),
        Part(
            "optimizer state and float32 weights" if half else "optimizer state",
            0 if layout.offloads_optimizer else optimizer,
            FORMULA,
        ),
    ]


def optimizer_bytes(weights: Weights, optim: Any) -> int:
    """Bytes of the optimizer's state on one process: AdamW keeps two numbers per weight and a step count per tensor."""
    name, states = _name(optim), _states(optim)
    if "8bit" in name:
        return 2 * weights.trainable
    if states == 0:
        return 0
    return 2 * weights.trainable_bytes + 4 * weights.trainable_tensors


def _states(optim: Any) -> int | None:
    """Numbers kept per weight, where it is known."""
    name = _name(optim)
    if name == "sgd":
        return 0
    return 2 if name in ("adamw_torch", "adamw_torch_fused") else None


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _other_models(models: Models, layout: Layout, args: Any) -> list[Part]:
    """The models that are only run, and the start's weights beside those of a reference that moves."""
    origin = models.reference if args.kl_has_origin else None
    frozen = [("reference", models.reference), ("the start, for kl/origin", origin), ("reward model", models.reward)]
    parts = []
    if args.sync_ref_model and models.reference is None:
        copies = 2 if args.kl_has_origin else 1
        parts.append(Part("the reference's adapter", copies * models.policy.trainable_bytes, ESTIMATE))
    for name, weights in frozen:
        if weights is None:
            continue
        size, how = weights.bytes, EXACT
        if layout.kind in ("DEEPSPEED", "FSDP"):
            width = 2 if args.bf16 and layout.kind == "DEEPSPEED" else 4
            size, how = width * weights.parameters, FORMULA
            size //= layout.processes if layout.shards_parameters else 1
        parts.append(Part(name, size, how))
    return parts


def _training_buffers(args: Any, models: Models, shape: Shape) -> list[Part]:
    config = models.config
    width = 2 if args.bf16 or args.fp16 else 4
    logits = shape.rows * shape.scored * config.vocab_size
    parts = []
    if not shape.fuses_head:
        # Float32 and its gradient; under autocast a half-precision copy of one of them.
        parts.append(Part("logits", logits * (10 if width == 2 else 8), ESTIMATE, TRAINING))
    if args.kl_needs_exact or shape.scores_in_chunks:
        gradient = 0 if shape.fuses_head else 4 * logits  # of the exact KL, held from forward to backward
        size = _chunks(models, shape, width, exact=args.kl_needs_exact) + gradient
        parts.append(Part("scores, in chunks" if shape.scores_in_chunks else "exact KL", size, ESTIMATE, TRAINING))
    if args.kl_needs_exact:
        hidden = shape.kept * shape.scored * config.hidden_size * width
        parts.append(Part("reference's hidden states", hidden, ESTIMATE, TRAINING))
    positions = shape.rows * shape.tokens
    of_token = (10 * config.hidden_size + 3 * config.intermediate_size) * width
    layer = positions * of_token
    if args.gradient_checkpointing:
        activations = layer + config.num_hidden_layers * positions * config.hidden_size * width
    else:
        activations = layer * config.num_hidden_layers
    if models.value is not None:  # in proportion to its size
        activations += activations * models.value.parameters // models.base.parameters
    activations = max(activations, shape.scored_at_once * shape.tokens * of_token)
    parts.append(Part("activations", activations, ESTIMATE, TRAINING))
    return parts


def _chunks(models: Models, shape: Shape, width: int, *, exact: bool) -> int:
    """Bytes of the logits that `trl_klx.kl.chunked` holds at once on a GPU, and of the gradient of a trained head."""
    config = models.config
    is_trained = shape.fuses_head and models.policy.trainable == models.policy.parameters
    tokens = min(default_chunk_size(config.vocab_size, "cuda", is_trained=is_trained), shape.rows * shape.scored)
    gradient = 4 * config.vocab_size * config.hidden_size if is_trained else 0
    return tokens * config.vocab_size * (4 * (1 + exact) + width) + gradient


def _generation(args: Any, models: Models, shape: Shape, layout: Layout) -> list[Part]:
    """What sampling needs where transformers does it: keys and values, and under ZeRO-3 the whole policy."""
    if getattr(args, "use_vllm", False):
        return []
    config = models.config
    width = 2 if args.bf16 or args.fp16 else 4
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * width * shape.generated * shape.tokens
    parts = [Part("keys and values", cache, ESTIMATE, GENERATION)]
    if layout.shards_parameters:
        parts.append(Part("policy gathered to sample", 2 * models.policy.parameters, ESTIMATE, GENERATION))
    return parts
