"""Whether the Hub can be reached: its client tries each missing file for minutes, and a dry run asks once."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import constants

from ..recipe.arguments import Recipe

_SECONDS = 5.0


def on_the_hub(recipe: Recipe) -> list[str]:
    """The names in a recipe that are no local path."""
    run, args, model = recipe
    paths = [run.dataset_name, model.model_name_or_path]
    paths += [getattr(args, option, None) for option in ("reward_model_path", "value_model_path")]
    return [path for path in paths if path and not path.startswith((".", "/", "runs/")) and not Path(path).exists()]


def hub_answers() -> bool:
    """Whether the Hub's endpoint answers at all, with whatever."""
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def from_the_cache_only() -> Iterator[None]:
    """While active, the Hub's client looks at what it has cached, as with HF_HUB_OFFLINE."""
    kept = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept
