"""Pushing to the Hub: what of a run is uploaded, and one sentence for whatever goes wrong.

transformers' own push uploads everything in output_dir. Here each push is one commit of what is meant to leave.
What is left out, and why: `training_args.bin` (a pickle with the token and this machine's paths, which nothing that
loads the model reads), checkpoints (`hub_strategy` pushes those), sampled completions, and TensorBoard's event files
(they hold all arguments). Files that name local paths are rewritten on their way.
"""

import json
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from ..wording import first_line
from .card import ADAPTER_CONFIG, CARD_FILE
from .settings import RECIPE_FILE, as_yaml, public_settings, without_path
from .versions import version_of

NO_TOKEN = "no token is found: run `hf auth login`, or set HF_TOKEN"
_STAYS = ["_*", "checkpoint-*", "completions/*", "wandb/*", *("training_args.bin", "*/training_args.bin")]
_STAYS += ["run.lock", "*.partial", "*events.out.tfevents.*", *DEFAULT_IGNORE_PATTERNS]
# Of a checkpoint, what makes a model that loads; the rest is for resuming.
_MODEL = ["*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
_FOR_RESUMING = ["trainer_state.json", "kl_state.json", "*/*"]
# The files of a run that record how it was made.
_RECORD = [CARD_FILE, RECIPE_FILE, "versions.json", "*.jsonl", "*.csv", "*.png"]


class HubError(RuntimeError):
    """The Hub could not be used. The message is a clause with the reason, and fits into brackets."""


def push_command(folder: Path | str, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """The command that pushes what a run left on disk."""
    command = f"trl-klx card --run {shlex.quote(str(folder))} --push_to {repo_id}"
    command += " --private" if private else ""
    return command + (f" --revision {shlex.quote(revision)}" if revision else "")


def create_repo(name: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make a model repository, or find it there; returns its full id, `owner/name`.

    Raises:
        HubError: no token, a refused one, a name that is not allowed, or no way to the Hub.
    """
    if token is None and get_token() is None:
        raise HubError(NO_TOKEN)
    return _named(lambda: _api().create_repo(name, token=token, private=private, exist_ok=True).repo_id, name)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    background: bool = False,
) -> Any:
    """Upload a run's folder as one commit: all of it arrives, or nothing. Returns the commit, or a Future of it.

    Raises:
        HubError: the upload failed; with `background`, from the Future's `result`.
    """
    where = {"token": token, "revision": revision}
    return _run(lambda: _commit(repo_id, _additions(folder), message, **where), repo_id, background)


def push_checkpoint(
    checkpoint: Path,
    run: Path,
    repo_id: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    whole_into: str | None = None,
) -> Future:
    """Upload a checkpoint's model with the run's record, in the background; returns a Future.

    `whole_into` names a folder of the repository that takes the whole checkpoint too, so that it can be resumed from.
    """
    where = {"token": token, "revision": revision}
    record = _additions(run, allow=_RECORD, in_memory=True)  # read now: the run keeps writing them

    def upload() -> list[Any]:
        model = _additions(checkpoint, allow=_MODEL, ignore=_FOR_RESUMING)
        commits = [_commit(repo_id, [*model, *record], message, **where)]
        if whole_into is not None:
            whole = _additions(checkpoint, into=f"{whole_into}/", ignore=[CARD_FILE])
            commits.append(_commit(repo_id, whole, f"{message}, checkpoint", **where))
        return commits

    return _run(upload, repo_id, background=True)


@cache
def _api() -> HfApi:
    """One for all: it runs its background jobs one after the other."""
    return HfApi(library_name="trl_klx", library_version=version_of("trl_klx"))


def _run(job: Callable[[], Any], repo_id: str, background: bool) -> Any:
    return _api().run_as_future(_named, job, repo_id) if background else _named(job, repo_id)


def _commit(repo_id: str, additions: list[CommitOperationAdd], message: str, **where: Any) -> Any:
    return _api().create_commit(repo_id, additions, commit_message=message, **where)


def _additions(
    folder: Path, *, into: str = "", allow: list[str] | None = None, ignore: Iterable[str] = (), in_memory: bool = False
) -> list[CommitOperationAdd]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = filter_repo_objects(names, allow_patterns=allow, ignore_patterns=[*_STAYS, *ignore])
    return [CommitOperationAdd(f"{into}{name}", _content(folder / name, in_memory)) for name in chosen]


def _content(path: Path, in_memory: bool) -> str | bytes:
    """A file as it leaves the machine: its path, or its bytes."""
    if path.name == RECIPE_FILE:
        return as_yaml(public_settings(yaml.safe_load(path.read_text()))).encode()
    if path.name == ADAPTER_CONFIG:
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = _portable_base(config.get("base_model_name_or_path"))
        return json.dumps(config, indent=2, sort_keys=True).encode()
    return path.read_bytes() if in_memory else str(path)


def _portable_base(base: str | None) -> str | None:
    """A local base model as `./<folder>`, which no loader takes for a model of the Hub; a Hub id as it is."""
    if base is not None and Path(base).exists():
        return f"./{Path(base).name}"
    return base if base is None else without_path(base)


def _named(job: Callable[[], Any], repo_id: str) -> Any:
    """Run a job, with one sentence for its failure: the network's libraries raise a different class for each."""
    try:
        return job()
    except Exception as error:
        raise HubError(_reason(error, repo_id)) from error


def _reason(error: Exception, repo_id: str) -> str:
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid name for a repository: {first_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f": {error.server_message.strip()}" if error.server_message else ""
        if status == 401:
            return "the Hub refused the token (401): run `hf auth login` again, or set HF_TOKEN"
        if status == 403:
            return f"the token may not write to {repo_id} (403{said}): use one with write access, or another owner"
        return f"the Hub answered {status}{said}"
    return f"the exchange with {_api().endpoint} failed, {type(error).__name__}: {first_line(error)}"
