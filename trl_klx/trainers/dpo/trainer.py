"""DPO with a chosen KL: `KLXDPOTrainer`.

TRL computes DPO's loss; the exact KL at the data's prefixes is added to it. The policy's own KL is measured by a probe
(`probe.py`). Shape legend: B pairs (chosen first, then rejected: 2B rows), L tokens, H hidden.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer

from ...config.names import trainer_with_old_names
from ..checks.inputs import check_inputs, check_kept, check_lengths
from ..checks.rows import PAIRS
from ..checks.start import check_start, config_for
from ..checks.vocabulary import check_pairs, check_vocabularies, known_tokens, token_count
from ..exact.forward import ExactKLForward, exact_kl_between
from ..exact.tokens import AnswerTokens
from ..reference.adapters import as_reference, trainable_as_before
from ..reference.build import reference_is_a_copy
from ..reference.moving import MovingReference
from ..reference.resumed import ReferenceKeeper, print_of
from ..reference.shards import is_flattened
from ..seams import check_reference_head, check_trl_version, check_virtual_tokens, swapped
from ..session.applied import KL_IN_LOSS, KL_ON_DATA, the_only
from ..session.coefficient import KLCoefficient
from ..shared.lifecycle import Lifecycle
from ..shared.step_guard import KL, POLICY, REFERENCE
from .config import KLXDPOConfig
from .pairs import CountingCollator, PairStatistics, pair_prompts
from .probe import KLProbe, ProbeSteps, distinct_prompts

check_trl_version()


@trainer_with_old_names(KLXDPOConfig)
class KLXDPOTrainer(Lifecycle, DPOTrainer):
    r"""`DPOTrainer` with an exact KL in the loss, a probe of the policy's own KL and controllers: see `KLXDPOConfig`.

        loss = DPO's loss + kl_coef * mean over completion tokens of KL(policy(.|s_t) || reference(.|s_t))

    The mean is over the completion tokens of chosen and rejected answers of one micro-batch on all processes, in nats
    per token; gradient accumulation averages micro-batches with equal weight, as it does with DPO's own mean over
    pairs. s_t are the data's prefixes, so this is a teacher-forced, partial KL
    (`kl/data_exact`), not the KL of the policy's own answers, which `kl_probe_steps` measures (`kl/sequence`).

    A probe comes before the first optimizer step and then every `kl_probe_steps`, and once per evaluation (its numbers
    are logged as `eval_kl/...`; evaluating one named split alone does not probe). A controller sees each probe of
    training once, and the value it sets is used from the next optimizer step on; schedules move at every step.

    `log_ratio/chosen`, `log_ratio/rejected` and `log_ratio/margin` are log(policy / reference) of whole answers in
    nats (under `ld_alpha` with TRL's weights): TRL's `rewards/*` without beta, and no KL.

    Takes `DPOTrainer`'s arguments, with a `KLXDPOConfig` as `args`. Where the policy is given in memory rather than by
    path, the reference is a copy of it as given (TRL would reload it from disk, and under ZeRO-3 still does).

    Raises:
        TypeError: `args` is not a `KLXDPOConfig`.
        ValueError: the exact KL cannot be computed for this model or this kind of sharding, or a probe is wanted and
            there are no prompts for it.
    """

    _tag_names = ["trl", "dpo", "trl_klx"]
    _name = "KLX-DPO"
    args: KLXDPOConfig
    model: PreTrainedModel
    beta = KLCoefficient(may_be_zero=False)
    kl_coef = KLCoefficient()

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: KLXDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        args = config_for(KLXDPOConfig, args, model, "DPO")
        if args.kl_probe_steps is not None and not eval_dataset:
            raise ValueError(
                f"kl_probe_steps={args.kl_probe_steps} samples answers to the prompts of eval_dataset and there is "
                "none: pass an eval_dataset, or remove kl_probe_steps."
            )
        check_inputs(PAIRS, args, train_dataset, eval_dataset)
        check_start(args, model, processing_class, ref_model=ref_model, **kwargs)
        check_reference_head(ref_model)
        check_virtual_tokens(model, kwargs.get("peft_config"))
        # Precomputed log-probs need no second model; an adapter is copied for them nevertheless.
        wanted = ref_model is None and not (args.precompute_ref_log_probs and isinstance(model, PreTrainedModel))
        models = model, kwargs.get("peft_config")
        with reference_is_a_copy(args, *models, wanted=wanted, trl_module=dpo_trainer):
            known, self._vocabulary = known_tokens(model, args, processing_class)
            data = data_collator, train_dataset, eval_dataset, known
            super().__init__(model, ref_model, args, *data, *positional, **kwargs)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)  # DeepSpeed's engine has a config of its own
            check_vocabularies(self.model, reference, "reference", tokens=token_count(self._tokenizer))
        check_kept(train_dataset, self.train_dataset, args.max_length)
        check_lengths(PAIRS, args, train_dataset, eval_dataset, self._tokenizer, self.model.config)
        self.kl_coef = args.kl_coef
        is_used_up = args.precompute_ref_log_probs and self.ref_model is None
        given = print_of(self.model, self.accelerator) if is_used_up else None
        self._pairs = PairStatistics(self.accelerator, is_watched=args.kl_health)
        wanted_kl = ({KL_ON_DATA} if args.kl_on_data else set()) | ({KL_IN_LOSS} if args.kl_in_loss else set())
        moving = MovingReference(self) if args.sync_ref_model else None
        keeper = ReferenceKeeper(self, is_an_argument=True, given=given, moving=moving)
        self._hold_parts(keeper, wanted=wanted_kl, more=[self._pairs])
        self.kl_term = args.kl_term()
        self._exact: ExactKLForward | None = None
        if args.kl_needs_exact:
            self._exact = exact_kl_between(self, self.model, temperature=1.0, direction=self.kl_term.direction)
            if not self._dispatches_batches:
                self.data_collator = CountingCollator(self.data_collator)
        self._probe = self._make_probe() if args.kl_probe_steps is not None else None
        if args.kl_probe_steps is not None:
            self.add_callback(ProbeSteps(lambda: self._run_probe("train"), args.kl_probe_steps))
        self._watch_health(self.model, gain="log_ratio/margin", entropy="probe/entropy", tokenizer=self._tokenizer)

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        return check_pairs(super()._prepare_dataset(*args, **kwargs), self._vocabulary)

    @property
    def _dispatches_batches(self) -> bool:
        """Whether one process collates for all: accelerate cuts and joins tensors alone."""
        evals = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        streams = any(isinstance(dataset, IterableDataset) for dataset in (self.train_dataset, *evals))
        dispatches = self.accelerator.dataloader_config.dispatch_batches
        return streams if dispatches is None else bool(dispatches)

    def _make_probe(self) -> KLProbe:
        if is_flattened(self.accelerator):
            raise ValueError(
                f"kl_probe_steps={self.args.kl_probe_steps} samples from the policy, whose weights fsdp_version=1 "
                "flattens: use fsdp_version 2, DDP or DeepSpeed, or remove it."
            )
        if self._is_vision_dataset:
            raise ValueError(
                f"kl_probe_steps={self.args.kl_probe_steps} samples answers to text prompts and the data has images: "
                "remove it."
            )
        datasets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        prompts = distinct_prompts(datasets, self.args.kl_probe_prompts)
        if not prompts:
            raise ValueError(
                f"kl_probe_steps={self.args.kl_probe_steps} samples answers to the prompts of eval_dataset and none is "
                f"shorter than max_length={self.args.max_length}: raise max_length, or remove kl_probe_steps."
            )
        return KLProbe(
            prompts,
            self._tokenizer,
            max_new_tokens=self.args.kl_probe_max_new_tokens,
            batch_size=self.args.per_device_eval_batch_size,
            seed=self.args.seed,
            estimators=self.kl.names,
            exact=self._exact,
            accelerator=self.accelerator,
        )

    def _checkpoint_state(self) -> dict[str, Any]:
        return {**super()._checkpoint_state(), "num_tokens": int(self._total_train_tokens)}

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """TRL's count of tokens, which it does not keep."""
        self._total_train_tokens = int(state.get("num_tokens", 0))

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        with self._pairs.watching() as per_pair, trainable_as_before(self.model):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        metrics = self.metrics.means[self.mode]
        if not metrics.get("rewards/chosen"):  # it is not TRL's loss: `AppliedKLCheck` reports it where a KL was wanted
            return loss
        means = metrics["rewards/chosen"][-1], metrics["rewards/rejected"][-1]
        if self.model.training and self.args.kl_health and all(map(math.isfinite, means)):
            chosen, rejected = (rewards.double() / self.beta for rewards in per_pair[:2])
            self._pairs.add(chosen, rejected, inputs["completion_mask"].sum(-1))
        # TRL's rewards are beta times the log-ratios, gathered from all processes, and beta is never 0.
        for name, reward in (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins")):
            metrics[f"log_ratio/{name}"].append(metrics[f"rewards/{reward}"][-1] / self.beta)
        if self.model.training:
            self._watch(metrics)
        return loss

    def _watch(self, metrics: dict[str, list[float]]) -> None:
        """See in TRL's own metrics of the micro-batch whether policy or reference is not finite."""
        for answer in ("chosen", "rejected"):
            logps, log_ratio = metrics[f"logps/{answer}"][-1], metrics[f"log_ratio/{answer}"][-1]
            self.guard.watch(POLICY, logps)
            if math.isfinite(logps):
                self.guard.watch(REFERENCE, log_ratio)

    def _compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool) -> Any:
        if not self.args.kl_on_data or self._exact is None:
            if self.precompute_ref_logps or self.ref_model is not None:
                return super()._compute_loss(model, inputs, return_outputs)
            # TRL below 1.16 sees no adapter in a policy that is wrapped, for example compiled, and calls a reference
            # of None.
            with swapped(self, precompute_ref_logps=True):
                return super()._compute_loss(model, self._with_reference_logps(inputs), return_outputs)
        inputs, mask = dict(inputs), inputs["completion_mask"][:, 1:]
        counts = inputs.pop(CountingCollator.FIELD, None)
        tokens = AnswerTokens.of(mask) if counts is None else AnswerTokens(mask.bool(), counts, counts)
        with self._exact.hidden_states(tokens) as ref_hidden:
            inputs = self._with_reference_logps(inputs)
        exact = self._exact.exact_kl(model, tokens, ref_hidden, with_grad=self.args.kl_in_loss)
        with exact as exact_kl, swapped(self, precompute_ref_logps=True):
            result = super()._compute_loss(model, inputs, return_outputs)
        kl_loss = self._kl_loss(the_only(exact_kl, self), tokens.mask, pair_prompts(inputs))
        if not self.args.kl_in_loss:
            return result
        return (result[0] + kl_loss, result[1]) if return_outputs else result + kl_loss

    @property
    def _reference_model(self) -> nn.Module:
        return self.model if self.ref_model is None else self.ref_model

    def _with_reference_logps(self, inputs: dict) -> dict:
        """The inputs as TRL reads them where it is not to run the reference itself (`precompute_ref_logps`)."""
        chosen, rejected = self.compute_ref_log_probs(self._reference_model, inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _kl_loss(self, exact_kl: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
        """`kl_coef` times the mean of the (2B, L-1) exact KL over the tokens of all processes; logs both,
        the KL with a standard error that counts `prompts`, (2B,), as independent."""
        # The exact KL reads no log-probs: it takes no importance weight.
        per_token = self.kl_term.loss(exact_kl, exact_kl, mask, exact=exact_kl)
        tokens = self.accelerator.reduce(mask.sum(), reduction="sum").clamp(min=1) / self.accelerator.num_processes
        loss = self.kl_coef * per_token.sum() / tokens
        self.kl.measure_data(self.mode, exact_kl, mask, prompts)
        if self.model.training:
            self.guard.watch(KL, exact_kl, mask)
        if self.args.kl_in_loss:
            self.kl.reached.add(KL_IN_LOSS)
            self.metrics.defer(self.mode, "kl/loss", loss)
        return loss

    def _end_step(self) -> None:
        if self.args.kl_coef_name != "beta" and self.beta != self.args.beta:  # set from outside
            self.metrics.add("train", "beta", self.beta)
        super()._end_step()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As transformers'; the probe comes before, once for all splits together. One split by its name has none."""
        if self._probe is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._run_probe("eval")
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(datasets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self._evaluating():
            found = self._measured(metric_key_prefix)
            self.log(found)
        of_splits: dict[str, float] = {}
        for name, dataset in datasets.items():
            split = name if eval_dataset is None else dataset
            of_splits |= super().evaluate(split, ignore_keys, f"{metric_key_prefix}_{name}")
        return of_splits | found

    def _run_probe(self, mode: str) -> None:
        """Sample with the policy as it is now, measure the KL there, and leave everything else as it was."""
        if self._probe is None:
            return
        policy = self.accelerator.unwrap_model(self.model)
        as_ref = nullcontext if self.ref_model is not None else lambda: as_reference(policy)
        with self._evaluating():
            with unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=True
            ) as unwrapped:
                batches = self._probe.sample(unwrapped, self.state.global_step)
            self.answers.add(mode, *self._probe.texts(batches[0]))
            for batch in batches:
                values = self._probe.values(self.model, self._reference_model, as_ref, batch, self.reference)
                self.kl.measure(mode, values, batch.target_mask, batch.prompts)
            for name, value in self._probe.answer_metrics().items():
                self.metrics.add(mode, name, value)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout and without gradient checkpointing, which generation cannot use."""
        training = self.model.training
        self.model.eval()
        try:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):  # type: ignore[arg-type]
                yield
        finally:
            self.model.train(training)
