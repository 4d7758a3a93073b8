"""A run's model card and its pushes: whole, without secrets, and never hanging.

transformers uploads all that lies in output_dir, `training_args.bin` with the token in it included; here `hub.push`
decides what leaves the machine.
"""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers.trainer_utils import HubStrategy, SaveStrategy
from trl.trainer.utils import get_config_model_id

from ...hub.card import write_card
from ...hub.push import HubError, create_repo, push_checkpoint, push_command, push_folder
from ...hub.settings import Settings, plain_settings, write_settings
from ..parts import Part
from .whole import as_main_does

logger = logging.getLogger(__name__)


def agreed_repo(args: Any, token: str | None, private: bool | None, *, is_main: bool) -> str:
    """Make the repository of a run, or find it there. Call on every process; they all learn its name or raise.

    Raises:
        HubError: no token, a refused one, a name that is not allowed, or no way to the Hub.
    """

    def create() -> str:
        return create_repo(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
        )

    return as_main_does(is_main, create, HubError)


class Pushes(Part):
    """Pushes what a run has saved, and remembers which checkpoints are being uploaded."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._running: list[tuple[Path, Future]] = []  # in the background

    def keeps(self) -> set[Path]:
        return {folder for folder, job in self._running if not job.done()}

    def write_card(self, model_name: str, dataset_name: str | list[str] | None) -> None:
        """Write the card into output_dir, in place of TRL's, of which it reads trackers, tags and base model."""
        trainer = self._trainer
        folder, settings = Path(trainer.args.output_dir), self.write_settings(dataset_name)
        is_adapter = is_peft_model(trainer._saved_model)
        write_card(folder, settings, model_name=model_name, repo_id=trainer.hub_model_id, is_adapter=is_adapter)

    def write_settings(self, dataset_name: str | list[str] | None = None) -> Settings:
        """Write the settings of the run into output_dir: those of its recipe, or of the trainer as it was made."""
        settings = self._trainer.recipe or self._settings_in_python(dataset_name)
        write_settings(Path(self._trainer.args.output_dir), settings)
        return settings

    def _settings_in_python(self, dataset_name: str | list[str] | None) -> Settings:
        """What a recipe would contain, for a trainer that was made without one."""
        trainer = self._trainer
        settings = plain_settings(trainer.args if trainer.given_args is None else trainer.given_args)
        settings |= {"model_name_or_path": get_config_model_id(trainer._saved_model.config) or None}
        settings |= {"dataset_name": dataset_name, "reward_funcs": trainer.reward_func_names or None}
        settings["use_peft"] = is_peft_model(trainer._saved_model)
        ref_model = None if trainer.ref_model is None else trainer.accelerator.unwrap_model(trainer.ref_model)
        reference = None if ref_model is None else get_config_model_id(ref_model.config)
        if reference and reference != settings["model_name_or_path"]:
            settings["reference"] = reference
        return settings

    def push(self, message: str, *, blocking: bool, token: str | None, revision: str | None) -> Any:
        """Upload what output_dir holds of the run, in one commit, after the checkpoints that are on their way."""
        args = self._trainer.args
        self.finish()
        return push_folder(
            Path(args.output_dir),
            str(self._trainer.hub_model_id),
            message=message,
            token=args.hub_token if token is None else token,
            revision=revision,
            background=not blocking,
        )

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` asks."""
        trainer, args = self._trainer, self._trainer.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.keeps():
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        place = f"step {trainer.state.global_step}"
        if args.save_strategy != SaveStrategy.STEPS:
            place = f"epoch {int(trainer.state.epoch or 0)}"
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        job = push_checkpoint(
            checkpoint,
            Path(args.output_dir),
            str(trainer.hub_model_id),
            message=f"Training in progress, {place}",
            token=args.hub_token,
            revision=args.hub_revision,
            whole_into=whole.get(args.hub_strategy),
        )
        self._running.append((checkpoint, job))

    def finish(self) -> None:
        """Wait for the pushes in the background. A failed one does not end the run, but is reported."""
        for folder, job in self._running:
            error = job.exception()  # waits
            if error is not None:
                repo = self._trainer.hub_model_id
                logger.warning("%s was not pushed to %s (%s); training continued", folder, repo, error)
        self._running = []


def not_pushed(folder: Path, repo_id: str | None, args: Any, error: HubError) -> HubError:
    """The failure of a push after training: what went wrong, that the model is there, and how to push it later."""
    name = repo_id or folder.absolute().name
    command = push_command(folder, name, private=args.hub_private_repo, revision=args.hub_revision)
    return HubError(f"{name} was not pushed ({error}); the model is in {folder}, push it later with `{command}`.")
