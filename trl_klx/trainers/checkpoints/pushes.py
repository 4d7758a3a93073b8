"""The hooks of `transformers.Trainer` that write the model card and push: whole, without secrets, and never hanging."""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from transformers.trainer_utils import HubStrategy, SaveStrategy
from trl.trainer.utils import get_config_model_id

from ...hub.card import write_card
from ...hub.push import HubError, create_repo, push_checkpoint, push_command, push_folder
from ...hub.settings import Settings, plain_settings, write_settings
from .whole import WholeCheckpoints

logger = logging.getLogger(__name__)


class HubPushes(WholeCheckpoints):
    """The card and the pushes of a run, in place of transformers' and TRL's.

    transformers uploads all that lies in output_dir, `training_args.bin` with the token in it included; here
    `hub.push` says what leaves the machine. Mix in before the trainer class.
    """

    args: Any
    hub_model_id: Any
    reward_func_names: list[str] = []
    recipe: Settings | None = None  # the resolved recipe, where one made the trainer
    given_args: Any = None  # the config as the user gave it, where `args` is a changed copy
    ref_model: Any
    _pushes: list[tuple[Path, Future]] = []  # checkpoints that were uploaded in the background

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find it there. Call on every process; they all learn its name or raise.

        Raises:
            HubError: no token, a refused one, a name that is not allowed, or no way to the Hub.
        """
        agreed: list[str | None] = [None, None]
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            try:
                agreed[0] = create_repo(
                    name,
                    token=self.args.hub_token if token is None else token,
                    private=self.args.hub_private_repo if private is None else private,
                )
            except HubError as error:
                agreed[1] = str(error)
        broadcast_object_list(agreed)
        if agreed[1] is not None:
            raise HubError(agreed[1])
        self.hub_model_id = agreed[0]

    def create_model_card(  # type: ignore[override]  # transformers' has other arguments than TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card into output_dir: TRL's, and what the run says about its KL.

        Args:
            model_name: its title; None: the name of the repository, or of output_dir.
            dataset_name: the training data, where it is on the Hub.
            tags: further tags.
        """
        folder = Path(self.args.output_dir)
        model_name = model_name or Path(self.hub_model_id or folder.absolute()).name
        # What TRL's card knows of trackers, tags and the base model is read from it.
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)  # type: ignore[call-arg]
        if not self.is_world_process_zero():
            return
        settings = self.recipe
        if settings is None:
            settings = self._settings_in_python(dataset_name)
            write_settings(folder, settings)
        write_card(
            folder,
            settings,
            model_name=model_name,
            repo_id=self.hub_model_id,
            is_adapter=is_peft_model(self._saved_model),
        )

    def _settings_in_python(self, dataset_name: str | None) -> Settings:
        """What a recipe would say, of a trainer that was made without one."""
        settings = plain_settings(self.args if self.given_args is None else self.given_args)
        settings |= {"model_name_or_path": get_config_model_id(self._saved_model.config) or None}
        settings |= {"dataset_name": dataset_name, "reward_funcs": self.reward_func_names or None}
        settings["use_peft"] = is_peft_model(self._saved_model)
        ref_model = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        reference = None if ref_model is None else get_config_model_id(ref_model.config)
        if reference and reference != settings["model_name_or_path"]:
            settings["reference"] = reference
        return settings

    @property
    def _saved_model(self) -> Any:
        """The model that `save_model` writes."""
        return self.accelerator.unwrap_model(self.model)

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
        folder, revision = Path(self.args.output_dir), revision or self.args.hub_revision
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            if not self.is_world_process_zero():
                return None
            self.create_model_card(**kwargs)
            self._finish_current_push()
            return push_folder(
                folder,
                str(self.hub_model_id),
                message=commit_message or "End of training",
                token=self.args.hub_token if token is None else token,
                revision=revision,
                background=not blocking,
            )
        except HubError as error:
            raise not_pushed(folder, self.hub_model_id or self.args.hub_model_id, self.args, error) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, as `hub_strategy` says."""
        self._complete(Path(checkpoint_folder))  # what goes to the Hub is whole, too
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and any(not job.done() for _, job in self._pushes):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        place = f"step {self.state.global_step}"
        if args.save_strategy != SaveStrategy.STEPS:
            place = f"epoch {int(self.state.epoch or 0)}"
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        job = push_checkpoint(
            checkpoint,
            Path(args.output_dir),
            str(self.hub_model_id),
            message=f"Training in progress, {place}",
            token=args.hub_token,
            revision=args.hub_revision,
            whole_into=whole.get(args.hub_strategy),
        )
        self._pushes = [*self._pushes, (checkpoint, job)]

    def _kept_checkpoints(self) -> set[Path]:
        """Rotation must not delete what is being uploaded."""
        return super()._kept_checkpoints() | {folder for folder, job in self._pushes if not job.done()}

    def _finish_current_push(self) -> None:
        """Wait for the pushes in the background. A failed one is no reason to lose the run, but one to say so."""
        for folder, job in self._pushes:
            error = job.exception()  # waits
            if error is not None:
                logger.warning("%s was not pushed to %s (%s); training went on", folder, self.hub_model_id, error)
        self._pushes = []


def not_pushed(folder: Path, repo_id: str | None, args: Any, error: HubError) -> HubError:
    """The failure of a push after training: what went wrong, that the model is there, and how to push it later."""
    name = repo_id or folder.absolute().name
    command = push_command(folder, name, private=args.hub_private_repo, revision=args.hub_revision)
    return HubError(f"{name} was not pushed ({error}); the model is in {folder}, push it later with `{command}`.")
