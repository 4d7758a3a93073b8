"""`trl-klx card`: write the model card of a run again, and push what the run left on disk."""

import argparse
import sys
from pathlib import Path

from ..cli.parser import CommandParser, UsageError
from .card import ADAPTER_CONFIG, write_card
from .push import NO_TOKEN, HubError, create_repo, push_command, push_folder
from .settings import read_settings


def command_parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program,
        description="Write the model card of a run again, from the files that it left: no model is loaded. With "
        "--push_to, upload model, tokenizer, card, recipe, metrics and pictures.",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the output_dir of a run")
    parser.add_argument("--name", help="title of the card (default: the one it has, else the folder's name)")
    parser.add_argument("--push_to", metavar="REPO_ID", help="repository on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="an existing branch to push to (default: main)")
    return parser


def main(argv: list[str] | None = None, program: str = "trl-klx card") -> int:
    """Write a run's card, and push. Returns the exit status: 0, 2 for bad input, or 1 where the Hub could not be used.

    The token is the one of `hf auth login`, or HF_TOKEN.
    """
    try:
        options = command_parser(program).parse_args(argv)
        return _write_and_push(options)
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _write_and_push(options: argparse.Namespace) -> int:
    run: Path = options.run
    if not run.is_dir():
        raise ValueError(f"--run {run} is not a folder: give the output_dir of a run.")
    settings = read_settings(run)
    is_adapter = (run / ADAPTER_CONFIG).is_file()
    if options.push_to is None:
        for name in ("private", "revision"):
            if getattr(options, name):
                raise ValueError(f"--{name} has no effect without --push_to: remove it, or name the repository.")
        print(f"card: {write_card(run, settings, model_name=options.name, is_adapter=is_adapter)}")
        return 0
    if not [*run.glob("*.safetensors"), *run.glob("*model*.bin")]:
        raise ValueError(f"{run} holds no model, which a run saves at its end: give the output_dir of a finished run.")
    try:
        repo_id = create_repo(options.push_to, private=options.private or None)
        write_card(run, settings, model_name=options.name, repo_id=repo_id, is_adapter=is_adapter)
        commit = push_folder(run, repo_id, message="Model and card", revision=options.revision)
    except HubError as error:
        again = push_command(run, options.push_to, private=options.private, revision=options.revision)
        print(f"error: nothing was pushed ({error}); {run} is as it was: try again with `{again}`.", file=sys.stderr)
        return 2 if str(error) == NO_TOKEN else 1
    print(f"pushed: {commit.commit_url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
