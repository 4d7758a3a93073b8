"""The model card of a run: TRL's form, and a section on its KL. Written from `card.md.j2`.

TRL writes its card first, and this one takes from it what only TRL knows: tracker badges, tags, and which base model is
on the Hub. The rest comes from the run's files, so that `trl-klx card` writes the same card without a model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from ..monitor.health.alarms import HEALTH_FILE
from ..monitor.history import HISTORY_FILE, read_history
from .facts import RecordedKL, alarm_lines, gradient_text, kl_rows, measured_kl, read_versions, recorded_kl, results
from .papers import PAPERS
from .settings import VERSIONS_FILE, Settings, as_yaml, public_settings, without_path

CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
_TEMPLATE = Path(__file__).parent / "card.md.j2"
# As TRL's and transformers' cards name the packages.
_FRAMEWORKS = {
    "trl_klx": "trl_klx",
    "trl": "TRL",
    "transformers": "Transformers",
    "torch": "Pytorch",
    "datasets": "Datasets",
    "tokenizers": "Tokenizers",
    "accelerate": "Accelerate",
    "peft": "PEFT",
    "python": "Python",
}
# What the pictures of a run show.
_ALT_TEXTS = {
    "kl_control": "KL to the reference over the steps, its target, and the coefficient that held it",
    "reward_vs_kl": "Reward, or margin in DPO, over the square root of the KL, in training and held out",
    "overoptimisation": "Proxy and gold reward over the square root of the KL, held out",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Known:
    """What a card that stands already knows and no file of the run does: what is on the Hub, tags, trackers' badges."""

    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    badges: tuple[str, ...] = ()
    model_name: str | None = None


def known_from(folder: Path) -> Known:
    """Read the card in a folder: TRL's, when a trainer has just written it, or an earlier one of ours."""
    path = folder / CARD_FILE
    if not path.is_file():
        return Known()
    card = ModelCard.load(path, ignore_metadata_errors=True)
    data = card.data.to_dict()
    base = data.get("base_model")
    return Known(
        base_model=base if isinstance(base, str) and may_be_on_the_hub(base) else None,
        datasets=tuple(filter(may_be_on_the_hub, _as_list(data.get("datasets")))),
        tags=tuple(tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")),
        badges=tuple(line.strip() for line in card.text.splitlines() if line.startswith("[<img ")),
        model_name=data.get("model_name"),
    )


def may_be_on_the_hub(name: str) -> bool:
    """Whether a name can be a Hub id, and is not a folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def write_card(
    folder: Path, settings: Settings, *, model_name: str | None = None, repo_id: str | None = None, is_adapter: bool
) -> Path:
    """Write the card of a run into its folder, in place of the one that is there; returns its path.

    Args:
        folder: the run's output_dir; its metrics file, versions, health file and pictures are read.
        settings: of the run, as `resolved_recipe.yaml` has them.
        model_name: the title; the name of the folder where None and no card stands there.
        repo_id: where the model is on the Hub, if anywhere.
        is_adapter: whether the run trained a PEFT adapter.
    """
    known, kl = known_from(folder), recorded_kl(settings)
    name = model_name or known.model_name or folder.resolve().name
    data = ModelCardData(
        base_model=known.base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if known.base_model else None,
        datasets=list(known.datasets) or None,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=_tags(kl, known.tags, is_adapter),
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text()).render(
        card_data=data.to_yaml(),
        model_name=name,
        model_id=repo_id or settings.get("hub_model_id") or name,
        is_adapter=is_adapter,
        is_chat=_is_chat(folder),
        **_facts(folder, settings, kl, known),
    )
    path = folder / CARD_FILE
    ModelCard(text).save(path)
    return path


def _tags(kl: RecordedKL, known: tuple[str, ...], is_adapter: bool) -> list[str]:
    own = ["generated_from_trainer", "trl", kl.algorithm, "trl_klx", *(["peft"] if is_adapter else [])]
    own += [f"kl-{kl.kl_estimator}"] if kl.kl_is_penalised else []
    return list(dict.fromkeys([*own, *(tag for tag in known if not tag.startswith("kl-"))]))


def _facts(folder: Path, settings: Settings, kl: RecordedKL, known: Known) -> dict[str, Any]:
    history = read_history(folder / HISTORY_FILE)
    base = settings.get("model_name_or_path")
    data = _as_list(settings.get("dataset_name")) or [entry.get("path") for entry in settings.get("datasets") or []]
    versions = read_versions(folder / VERSIONS_FILE)
    options = ("reward_model_name_or_path", "reward_funcs", "reward_model_path")
    rewards = [name for option in options for name in _as_list(settings.get(option) or None)]
    return {
        "algorithm": kl.algorithm,
        "paper": PAPERS[kl.algorithm],
        "base_model": known.base_model,
        "base_text": _model_text(base, known.base_model),
        "base_folder": Path(base).name if base else "the base model",
        "data_text": _data_text(data, known.datasets),
        "reward_names": [f"`{without_path(name)}`" for name in rewards],
        "badges": known.badges,
        "kl": kl,
        "kl_rows": kl_rows(kl, history, _reference(settings)),
        "gradient": gradient_text(kl),
        "measured": measured_kl(kl, history),
        "results": results(history),
        "alarms": alarm_lines(read_history(folder / HEALTH_FILE)),
        "watched": kl.kl_health,
        "pictures": [(path.name, _ALT_TEXTS.get(path.stem, path.stem)) for path in sorted(folder.glob("*.png"))],
        "recipe": as_yaml(public_settings(settings)).rstrip(),
        "from_recipe": bool(data),
        "versions": {_FRAMEWORKS[name]: versions[name] for name in _FRAMEWORKS if name in versions},
    }


def _model_text(name: str | None, on_the_hub: str | None) -> str:
    if on_the_hub is not None:
        return f"[{on_the_hub}](https://huggingface.co/{on_the_hub})"
    return f"`{Path(name).name}`, a local model that is not on the Hub" if name else "a model given in memory"


def _data_text(names: list[str], on_the_hub: tuple[str, ...]) -> str:
    if on_the_hub:
        links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in on_the_hub]
        local = len(names) > len(on_the_hub)
        return f"the {', '.join(links)} dataset{'s' * (len(links) > 1)}{' and local ones' * local}"
    local_ones = ", ".join(f"`{Path(name).name}`" for name in names)
    kind = "local datasets" if len(names) > 1 else "a local dataset"
    return f"{local_ones}, {kind}" if names else "a dataset given in memory"


def _reference(settings: Settings) -> str:
    """What the KL is measured against."""
    given = settings.get("reference")
    text = f"`{Path(given).name}`" if given else "the model that training started from"
    if not given and settings.get("use_peft"):
        text += ", which is the base without the adapter"
    if settings.get("sync_ref_model"):
        share, steps = settings.get("ref_model_mixup_alpha"), settings.get("ref_model_sync_steps")
        text += f", moved by {share} of the way to the policy every {steps} steps"
    return text


def _is_chat(folder: Path) -> bool:
    """Whether the tokenizer has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text()
