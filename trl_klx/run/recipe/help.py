"""What `--help` prints for a training command and what a shell completes: hundreds of fields, in groups."""

import argparse
import dataclasses

from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from ...config.options import KLArguments
from .arguments import RunArguments

_KL, _LAST = "KL (trl_klx)", "training (transformers)"
# As they are printed; the fields of TRL's algorithm come before the last.
_ORDER = ("positional arguments", "options", _KL, "data, rewards and run", "model", _LAST)


def help_parser(program: str, config: type) -> argparse.ArgumentParser:
    """A parser for people and shells to read, with the fields of a recipe in groups; parsing is not its business.

    Args:
        program: what the usage text calls the command.
        config: the algorithm's config class.
    """
    fields: tuple = (RunArguments, config, ModelConfig)
    parser = TrlParser(
        fields,
        prog=program,
        usage=f"{program} --config RECIPE.yaml [--accelerate_config NAME] [--field value ...]",
        description="Every field of a recipe can be given on the command line, which wins. trl-klx "
        "recipes lists recipes to start from, and trl-klx explain shows which gradient one has.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe: a flat YAML file")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for action in list(parser._optionals._group_actions):
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        title = _group_of(action.dest, config)
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        if title:
            parser._optionals._group_actions.remove(action)
            groups[title]._group_actions.append(action)
    parser._action_groups.sort(key=lambda group: _ORDER.index(group.title) if group.title in _ORDER else 4.5)
    return parser


def _group_of(name: str, config: type) -> str | None:
    """The heading of a field; None for what is not a field."""
    for title, owner in (("data, rewards and run", RunArguments), ("model", ModelConfig), (_LAST, TrainingArguments)):
        if name in {field.name for field in dataclasses.fields(owner)}:
            return title
    if name in {field.name for field in dataclasses.fields(KLArguments)}:  # TRL has some of them, without an adapter
        return _KL
    algorithm = config.__bases__[-1]  # the algorithm's own options: TRL's config, and in PPO `PPOArguments`
    if name in {field.name for field in dataclasses.fields(algorithm)}:
        title = algorithm.__name__.removesuffix("Config").removesuffix("Arguments")
        return f"{title} (TRL)" if algorithm.__module__.startswith("trl.") else title
    if name in {field.name for field in dataclasses.fields(config)}:
        return _KL
    return None
