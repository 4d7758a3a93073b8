"""What all three trainers do around TRL's code: `Lifecycle` hooks `transformers.Trainer` and tells the parts of a run.

A step, in this order:

    training_step   forward and backward of each micro-batch; after the last one the parts end the step: beta moves by
                    the KL that was measured, and the budget may ask for a checkpoint, or for the end (`_end_step`)
    _get_grad_norm  the guard drops gradients that are not finite; then transformers' loop lets the optimizer step
    callbacks       `AppliedKLCheck`, health and over-optimisation alarms, and those of the user
    log             what was measured since the last log
    evaluate        likewise, of the evaluation
    _save_checkpoint  weights, optimizer, TRL's files; then those of the parts, and last the state file
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ...hub.push import HubError
from ...hub.settings import Settings
from ..checkpoints.own_folders import discard
from ..checkpoints.pushes import Pushes, agreed_repo, not_pushed
from ..checkpoints.whole import Checkpoints, read_state, rotate, unreadable
from ..checks.begins import start_warnings
from ..checks.noise import settle_noise
from ..checks.trainable import check_trainable
from ..errors import CheckpointError
from ..parts import Part
from ..reference.adapters import precisions_as_before
from ..reference.resumed import ReferenceKeeper
from ..report.answers import SampledAnswers
from ..report.report import RunReport
from ..rewarding.gold import GoldWatch
from ..seams import keep_float32_outputs, settle_packed_weights
from ..session.applied import AppliedKLCheck, wanted_kl
from ..session.metrics import Metrics
from ..session.session import KLSession
from .health import health_callback
from .step_guard import LOSS, StepGuard
from .step_limit import StepLimit

logger = get_logger(__name__)


class Lifecycle(Trainer):
    """The hooks of `transformers.Trainer`, for all our trainers. Its place is before TRL's trainer class.

    The trainer calls `_hold_parts` once TRL has set it up, and its loss reads beta from a `KLCoefficient`.

    Attributes:
        kl: beta, its controller, the KL that is measured, and the budget.
        metrics: all other numbers, until the next log.
        guard: skips steps that are not finite.
        step_limit: lowers the learning rate where steps go too far.
        gold: follows a gold reward; None without one.
        answers: shows a few of the answers that it is given.
        parts: all that watch the run, in the order in which each moment reaches them.
        recipe: the resolved recipe, where one made the trainer.
        given_args: the config as the user gave it, where `args` is a changed copy.
    """

    args: Any
    model: Any
    ref_model: Any
    kl: KLSession
    metrics: Metrics
    guard: StepGuard
    step_limit: StepLimit
    gold: GoldWatch | None = None
    answers: SampledAnswers
    parts: Sequence[Part] = ()
    recipe: Settings | None = None
    given_args: Any = None
    reward_func_names: list[str] = []
    left_out = False  # whether the step takes no update, because the policy is too far from its sampler
    hub_model_id: Any
    _metrics: Any = None  # TRL's own, where its trainer has some
    _trl_sends_answers = False  # whether TRL's trainer itself has log_completions

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.kl_needs_exact:
            keep_float32_outputs(self.accelerator)

    def _hold_parts(
        self,
        reference: ReferenceKeeper,
        kl_groups: tuple[str, ...] = (),
        gold_reward_func: Any = None,
        *,
        wanted: set[str] | None = None,
        more: Sequence[Part] = (),
    ) -> None:
        """Make the parts of the run.

        Args:
            reference: keeps the reference.
            kl_groups: the groups of `kl_group_column`.
            gold_reward_func: the gold reward, or None.
            wanted: which parts of the KL every step has to compute; None: see `wanted_kl`.
            more: parts of this trainer alone.
        """
        settle_packed_weights(self._saved_model)
        self.metrics = Metrics(self.accelerator, self._metrics)
        self.guard, self.kl = StepGuard(self, self.reward_func_names), KLSession(self.args, self.accelerator, kl_groups)
        self.checkpoints, self.pushes, self.reference = Checkpoints(self), Pushes(self), reference
        self.step_limit = StepLimit(self)
        self.gold = None if gold_reward_func is None else GoldWatch(self, gold_reward_func)
        more = [self.step_limit, *([] if self.gold is None else [self.gold]), *more]
        self.answers = SampledAnswers(self, sends_tables=not self._trl_sends_answers)
        report = [self.answers, *([RunReport(self)] if self.args.kl_report else [])]
        self.parts = (self.checkpoints, self.kl, self.guard, self.reference, self.pushes, *more, *report)
        if reference.moving is not None:
            self.add_callback(reference.moving)
        self.add_callback(AppliedKLCheck(self, wanted_kl(self.args) if wanted is None else wanted))

    def _watch_health(self, policy: nn.Module, **sources: Any) -> None:
        """Add the health alarms, once the trainer is set up; see `health_callback`."""
        if self.args.kl_health:
            # The first of the callbacks, so that those that write metrics get its own.
            self.callback_handler.callbacks.insert(0, health_callback(self, self.args, policy, **sources))

    @property
    def overoptimisation(self) -> Any:
        """The monitor of the gold reward; None without one."""
        return None if self.gold is None else self.gold.monitor

    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _saved_model(self) -> Any:
        """The model that `save_model` writes."""
        return self.accelerator.unwrap_model(self.model)

    # A run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and `resume_from_checkpoint` may be "last"; true means the same, the last complete one.

        Raises:
            CheckpointError: there is no such checkpoint, or it is not whole or not readable.
            FolderError: another run holds output_dir, or it cannot be written to.
            RunError: a checkpoint could not be written, or too many steps in a row were not finite.
        """
        self.kl.check_args(self.args if self.given_args is None else self.given_args)
        check_trainable(self._saved_model, self.optimizer)
        settle_noise(self._saved_model, self.args)
        with self.checkpoints.own_folder():
            checkpoint = self.checkpoints.agreed(resume_from_checkpoint)
            for part in self.parts:
                part.begin()
            for sentence in start_warnings(self, self._saved_model, resumes=checkpoint is not None):
                logger.warning(sentence)
            result = super().train(checkpoint, *args, **kwargs)
            # The last step's, which no step looks at.
            self.guard.check_weights(f"after step {self.state.global_step}")
            for part in self.parts:
                part.end()
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks for the end of a run after each step only: resumed there, it would take one more.
        if self.state.global_step >= self.state.max_steps or any(part.is_over() for part in self.parts):
            logger.warning(f"The run had ended at step {self.state.global_step}: nothing is left to train.")
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self.checkpoints.rotating_nothing():
            return super()._finalize_training(*args, **kwargs)

    # A step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kl.start(self.state.max_steps)
        loss = super().training_step(*args, **kwargs)
        self.guard.watch(LOSS, loss)
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        if not self.model.training:
            return result
        if isinstance(result, tuple):
            return self.guard.for_deepspeed(result[0]), *result[1:]
        return self.guard.for_deepspeed(result)

    def _end_step(self) -> None:
        """Move beta by the KL that the step measured, and do what the budget asks for."""
        for part in self.parts:
            for name, value in part.end_step().items():
                self.metrics.add("train", name, value)
        self.metrics.drop_non_finite("train")
        budget = self.kl.budget
        for folder in budget.take_superseded():
            if self.args.should_save:
                discard(folder, Path(self.args.output_dir))
        self.control.should_save |= budget.wants_checkpoint
        self.control.should_training_stop |= budget.ends_run

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Of the step that is about to be taken; None where it is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        return norm if self.guard.takes_step(model, norm) else None

    # Logs and evaluations

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        evaluation = None
        if self.mode == "eval":  # of several datasets, each has a prefix of its own
            prefixes = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
            evaluation = prefixes[0] if prefixes else "eval"
        logs.update(self._measured(evaluation))
        super().log(logs, *args, **kwargs)

    def _measured(self, evaluation: str | None) -> dict[str, float]:
        """All that was measured since the last log, under the prefix of the evaluation; None: in training."""
        mode = self.mode
        self.metrics.settle(mode)
        trl_logs = self.metrics.trl_logs and evaluation in (None, "eval")  # other prefixes TRL does not know
        if mode == "train" or not trl_logs:
            self.metrics.drop_non_finite(mode)
        found = self.metrics.take_ratios(mode) if trl_logs else self.metrics.take(mode)
        for part in self.parts:
            found |= part.log(mode, found, evaluation)
        if mode == "train" and self.args.kl_health:
            found |= self._health_metrics()
        return found if evaluation is None else {f"{evaluation}_{name}": value for name, value in found.items()}

    def _health_metrics(self) -> dict[str, float]:
        """What health alarms need and nothing else logs, since the last call. Called on every process."""
        return {}

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Only `eval_on_start` skips the scheduler. In a resumed run its answers would be others, and those of the
        # checkpoint's policy; but a curve of the gold reward that has no beginning begins there.
        knows_start = self.gold is None or bool(self.gold.monitor.evaluations)
        if skip_scheduler and self.state.global_step > 0 and knows_start:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.check_weights()  # the last good checkpoint must stay the last
        run, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with self.checkpoints.writing(folder):
            with self.checkpoints.rotating_nothing():
                super()._save_checkpoint(model, trial)
            self._complete(folder)
            every = self.state.save_steps if self.args.save_strategy == SaveStrategy.STEPS else 0
            for part in self.parts:
                part.wrote(folder, regular=every > 0 and step % every == 0)
            if self.args.should_save:
                keep = {folder}.union(*(part.keeps() for part in self.parts))
                rotate(run, self.args.save_total_limit, keep)

    def _complete(self, folder: Path) -> None:
        for part in self.parts:
            part.saving(folder)
        self.checkpoints.complete(folder, self._checkpoint_state())

    def _checkpoint_state(self) -> dict[str, Any]:
        """What the state file holds."""
        state: dict[str, Any] = {}
        for part in self.parts:
            state |= part.state()
        return state

    def _load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Take what the trainer itself keeps in the state file, as `Part.load`."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with precisions_as_before(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.kl.start(self.state.max_steps)
            self._continue_from(Path(checkpoint))

    def _continue_from(self, checkpoint: Path) -> None:
        """Take what the state file of a checkpoint holds."""
        state = read_state(checkpoint)
        try:
            for part in self.parts:
                part.load(state, checkpoint, self.checkpoints.run_of(checkpoint))
            self._load_checkpoint_state(state)
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise unreadable(checkpoint, str(error)) from error
        self.kl.budget.judge()

    # Pushes

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find it there; see `agreed_repo`."""
        self.hub_model_id = agreed_repo(self.args, token, private, is_main=self.is_world_process_zero())

    def create_model_card(  # type: ignore[override]  # transformers' has other arguments than TRL's
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the card into output_dir; `model_name` is its title, or else the name of the repository or folder."""
        model_name = model_name or Path(self.hub_model_id or Path(self.args.output_dir).absolute()).name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)  # type: ignore[call-arg]
        if self.is_world_process_zero():
            self.pushes.write_card(model_name, dataset_name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model and tokenizer, write the card, and upload them with recipe, metrics and pictures in one commit.

        Call on every process. Arguments and result are those of `transformers.Trainer.push_to_hub`.

        Raises:
            HubError: it could not be pushed; the model is saved, and the message has the command that pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # first, so that it is there whatever happens
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            if not self.is_world_process_zero():
                return None
            self.create_model_card(**kwargs)
            message, revision = commit_message or "End of training", revision or self.args.hub_revision
            return self.pushes.push(message, blocking=blocking, token=token, revision=revision)
        except HubError as error:
            folder, repo = Path(self.args.output_dir), self.hub_model_id or self.args.hub_model_id
            raise not_pushed(folder, repo, self.args, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._complete(Path(checkpoint_folder))  # what goes to the Hub is whole, too
        self.pushes.push_checkpoint(Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        self.pushes.finish()
