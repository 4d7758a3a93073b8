"""What a model card says, for several configurations; and `trl-klx card`, which writes it from files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from support.tiny import digit_reward, save_tiny, tiny_dataset
from support.tiny_dpo import preferences
from trl import DPOTrainer, GRPOTrainer

from trl_klx.cli import commands as cli
from trl_klx.hub.card import may_be_on_the_hub, write_card
from trl_klx.hub.papers import PAPERS
from trl_klx.hub.settings import plain_settings, public_settings
from trl_klx.kl.gradients import EXPLANATION
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.dpo.trainer import KLXDPOTrainer
from trl_klx.trainers.grpo.config import KLXGRPOConfig
from trl_klx.trainers.grpo.trainer import KLXGRPOTrainer
from trl_klx.trainers.ppo.config import KLXPPOConfig
from trl_klx.trainers.ppo.trainer import KLXPPOTrainer
from trl_klx.trainers.seams import TRL_HAS_PPO

QUICK = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_checkpointing": False,
}
EVALUATION = {
    "step": 4,
    "eval_reward": 0.75,
    "eval_rewards/exact_match/mean": 0.75,
    "eval_kl": 0.0811,
    "eval_kl/k3": 0.0777,
    "eval_kl/k3_se": 0.0066,
    "eval_kl/exact": 0.0811,
    "eval_kl/exact_se": 0.0033,
    "eval_kl/sequence": 0.4433,
    "eval_kl/sequence_se": 0.0188,
    "eval_kl/sequences": 128,
}
START = {"step": 0, **{name: 0.25 if "reward" in name else 0.0 for name in EVALUATION if name != "step"}}
TRAINING = {
    "step": 5,
    "kl": 0.5,
    "kl/k3": 0.5,
    "kl/sequence": 2.5,
    "kl/sequence_se": 0.5,
    "kl/sequences": 8,
    "kl/coef": 1.1234,
}


def card(
    folder: Path,
    config: type = KLXGRPOConfig,
    history: list[dict] | None = None,
    *,
    adapter: bool = False,
    **fields: Any,
) -> str:
    """The text of the card of a run with these fields, whose metrics file has these entries."""
    names = ("model_name_or_path", "dataset_name", "reward_funcs", "use_peft", "reference")
    recipe = {name: fields.pop(name) for name in names if name in fields}
    known = {name: fields.pop(name) for name in ("base_model", "datasets", "tags") if name in fields}
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(known)}---\n\n# An earlier card\n")
    if history is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    settings = {**plain_settings(config(str(folder), **{**QUICK, **fields})), **recipe}
    write_card(folder, settings, is_adapter=adapter)
    text = (folder / "README.md").read_text()
    for rest in ("{{", "{%", "None", "Undefined", "nan"):
        outside_yaml = text.split("<details>")[0] + text.split("</details>")[1].split("## Citations")[0]
        assert rest not in outside_yaml, rest
    return text


def row(text: str, label: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return found.removeprefix(f"| {label} |").removesuffix("|").strip()


def test_a_steered_run(tmp_path: Path) -> None:
    fields = {"kl_estimator": "exact", "kl_placement": "both", "beta": 0.5, "kl_controller": "pid", "kl_target": 0.4}
    text = card(
        tmp_path / "run",
        history=[START, EVALUATION, TRAINING],
        kl_target_unit="sequence",
        kl_budget=3.0,
        reward_funcs=["trl_klx.rewards.exact_match"],
        model_name_or_path="runs/starter/model",
        dataset_name="/home/somebody/data",
        **fields,
    )
    assert row(text, "Estimator") == "exact, the sum over the whole vocabulary, reverse"
    assert row(text, "Placement") == "in both, loss and reward"
    assert row(text, "Credit") == "return_to_go"
    assert row(text, "Importance weight").startswith("token: none is applied")
    assert row(text, "Coefficient") == "beta 0.5 at the start, 1.12 at the end"
    assert row(text, "Controller") == "pid"
    assert row(text, "Target") == "0.4 nats per sequence, read by exact"
    assert row(text, "Budget") == "3.0 nats per sequence; beyond it: stop"
    assert row(text, "Reference model") == "the model that training started from"
    assert EXPLANATION["KLseq"] in text
    # The last evaluation, not the later training batch.
    assert "on 128 answers that the policy sampled to held-out prompts, logged at step 4 of 5" in text
    assert row(text, "exact") == "0.0811 ± 0.0033 | 0.443 ± 0.019"
    assert row(text, "k3") == "0.0777 ± 0.0066 |"
    assert row(text, "exact_match, held-out prompts") == "0.250 | 0.750"
    assert row(text, "KL to the reference, nats per sequence, held-out prompts") == "0 ± 0 | 0.443 ± 0.019"
    assert text.index("## Results") < text.index("## Quick start")  # what a reader came for is first
    assert "\n| | " not in text  # no table begins with an empty row
    assert "Rewards: `trl_klx.rewards.exact_match`." in text
    assert "`model`, a local model that is not on the Hub, trained on `data`, a local dataset" in text
    assert "/home/somebody" not in text
    assert "kl_target: 0.4\n" in text  # the recipe
    assert "trl-klx grpo --config resolved_recipe.yaml" in text


def test_at_beta_0_nothing_is_claimed(tmp_path: Path) -> None:
    text = card(tmp_path / "run", history=[{"step": 1, "reward": 0.5, "rewards/exact_match/mean": 0.5}], beta=0.0)
    assert row(text, "Coefficient") == "beta 0"
    assert "no KL reached the policy" in text
    assert "The run left no measurement of its KL: at this coefficient the reference is not even loaded." in text
    assert not any(explanation in text for explanation in EXPLANATION.values())
    assert not any(tag.startswith("kl-") for tag in ModelCard(text).data.tags)


def test_without_metrics_pictures_and_versions(tmp_path: Path) -> None:
    text = card(tmp_path / "run", beta=0.1)
    assert "The run left no measurement of its KL." in text
    assert "## Results" not in text
    assert "![" not in text
    assert "Not recorded." in text
    assert row(text, "Importance weight") == "token"
    assert row(text, "Credit") == "none: no KL in the reward"
    assert row(text, "Target") == "none"


def test_forward_kl(tmp_path: Path) -> None:
    history = [
        {"step": 1, "kl": 0.2, "kl/exact_forward": 0.2, "kl/exact_forward_se": 0.02, "kl/k3": 0.1, "kl/sequence": 0.7}
    ]
    text = card(tmp_path / "run", history=history, beta=0.1, kl_estimator="exact", kl_direction="forward")
    assert row(text, "Estimator").endswith(", forward")
    assert EXPLANATION["F"] in text
    assert EXPLANATION["P"] not in text
    assert row(text, "exact, forward: KL(reference \\|\\| policy)") == "0.2 ± 0.02 |"
    assert row(text, "k3") == "0.1 | 0.7"  # kl/sequence is of the reverse KL


def test_groups(tmp_path: Path) -> None:
    groups = {
        "kl_groups/math/easy/token": 0.125,
        "kl_groups/math/easy/sequence": 0.5,
        "kl_groups/math/easy/sequence_se": 0.25,
    }
    text = card(
        tmp_path / "run",
        history=[{**TRAINING, **groups}],
        beta=0.1,
        kl_controller="adaptive",
        kl_target=0.1,
        kl_group_column="task",
        kl_group_targets={"math/easy": 0.2},
    )
    assert row(text, "Target") == "0.1 nats per token; math/easy: 0.2 nats per token, read by k3"
    assert row(text, "k3, of group math/easy") == "0.125 | 0.5 ± 0.25"
    assert "8 answers that the policy sampled to training prompts" in text


def test_a_bounded_weight_and_a_biased_choice(tmp_path: Path) -> None:
    left_out = {"kl_is_answer_cap": 1.5, "kl_is_veto": 0.1}
    bounds = {"kl_is_cap": 2.0, "kl_value_cap": 5.0, **left_out}
    text = card(tmp_path / "run", beta=0.1, kl_importance_sampling="prefix", **bounds)
    assert row(text, "Importance weight") == "prefix, truncate a token's above 2"
    reason = "with a geometric mean of the tokens' weights above 1.5 or below 1/1.5"
    assert row(text, "Answers left out of the KL") == f"{reason}, or with a token whose weight is below 0.1"
    assert row(text, "Bound on a token's KL loss") == "5 nats"
    with pytest.warns(UserWarning, match="zero expected gradient"):
        text = card(tmp_path / "run", beta=0.1, kl_estimator="k1", kl_importance_sampling="none", allow_biased_kl=True)
    assert EXPLANATION["0"] in text


def test_dpo(tmp_path: Path) -> None:
    probe = {"kl": 0.0, "kl/exact": 0.01, "kl/sequence": 0.25, "kl/sequence_se": 0.05, "kl/data_exact": 0.125}
    fields = {"kl_coef": 0.2, "beta": 0.3, "kl_probe_steps": 2}
    text = card(tmp_path / "run", KLXDPOConfig, [{"step": 3, **probe}, {"step": 4}], **fields)
    assert row(text, "Coefficient") == "kl_coef 0.2"
    assert "at the prefixes of the training data, which the policy did not sample" in text
    assert "DPO's own loss holds the policy by its beta of 0.3" in text
    assert "to held-out prompts (the probe), logged at step 3 of 4" in text
    assert row(text, "exact") == "0.01 | 0.25 ± 0.05"
    assert row(text, "exact, at the prefixes of the training data (teacher-forced)") == "0.125 |"
    plain = card(tmp_path / "plain", KLXDPOConfig, beta=0.3)
    assert "DPO's own loss holds the policy by its beta of 0.3, and no KL was added to it." in plain
    steered = {"kl_controls": "beta", "kl_controller": "linear", "kl_coef_end": 0.1}
    text = card(tmp_path / "steered", KLXDPOConfig, [{"step": 1, "kl/coef": 0.1}], beta=0.3, **steered)
    assert row(text, "Coefficient") == "beta 0.3 at the start, 0.1 at the end"
    assert row(text, "Controller") == "linear, of DPO's beta"


def test_what_the_hub_knows_is_linked_and_what_it_does_not_is_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    text = card(
        tmp_path / "run",
        beta=0.1,
        base_model="Qwen/Qwen2.5-0.5B",
        datasets=["trl-lib/tldr"],
        tags=["mine", "trackio:https://x.hf.space", "base_model:adapter:/home/me"],
        model_name_or_path="Qwen/Qwen2.5-0.5B",
    )
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.base_model_relation) == (
        "Qwen/Qwen2.5-0.5B",
        ["trl-lib/tldr"],
        "finetune",
    )
    assert {"mine", "trackio:https://x.hf.space"} <= set(data.tags)
    assert not any("base_model" in tag for tag in data.tags)
    assert "a fine-tuned version of [Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in text
    assert "trained on the [trl-lib/tldr](https://huggingface.co/datasets/trl-lib/tldr) dataset" in text
    for name in (str(tmp_path / "base"), "./base", "~/base", "runs/starter/model"):
        text = card(tmp_path / "run", beta=0.1, base_model=name, datasets=[name], model_name_or_path=name)
        data = ModelCard(text).data
        assert (data.base_model, data.get("datasets")) == (None, None), name


def test_a_mixture_is_named(tmp_path: Path) -> None:
    text = _of_mixture(tmp_path, [{"path": "/home/me/a.jsonl"}, {"path": "/home/me/b"}])
    assert "trained on `a.jsonl`, `b`, local datasets." in text
    assert "/home/me" not in text
    assert "path: ./a.jsonl" in text
    on_the_hub = "[trl-lib/tldr](https://huggingface.co/datasets/trl-lib/tldr)"
    text = _of_mixture(tmp_path, [{"path": "/home/me/a.jsonl"}, {"path": "trl-lib/tldr"}], datasets=["trl-lib/tldr"])
    assert f"trained on the {on_the_hub} dataset and local ones." in text


def _of_mixture(folder: Path, mixture: list[dict], datasets: list[str] | None = None) -> str:
    """The card of a run whose settings name a mixture; `datasets` are those of the card that stands already."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\ndatasets: {json.dumps(datasets or [])}\n---\n")
    settings = plain_settings(KLXGRPOConfig(str(folder), beta=0.1, use_cpu=True, bf16=False))
    return write_card(folder, {**settings, "datasets": mixture}, is_adapter=False).read_text()


def test_a_folder_here_is_never_taken_for_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert may_be_on_the_hub("models/base")
    Path("models/base").mkdir(parents=True)
    assert not may_be_on_the_hub("models/base")


def test_an_adapter_says_what_it_belongs_to(tmp_path: Path) -> None:
    text = card(tmp_path / "run", beta=0.1, adapter=True, use_peft=True, model_name_or_path="/home/me/base")
    assert "an adapter for `base`, a local model" in text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/base")' in text
    assert row(text, "Reference model") == "the model that training started from, which is the base without the adapter"
    on_the_hub = {"base_model": "Qwen/Qwen2.5-0.5B", "model_name_or_path": "Qwen/Qwen2.5-0.5B"}
    text = card(tmp_path / "run", beta=0.1, adapter=True, use_peft=True, **on_the_hub)
    assert 'AutoPeftModelForCausalLM.from_pretrained("run")' in text
    assert ModelCard(text).data.library_name == "peft"


def test_alarms_pictures_badges_versions_and_a_moving_reference(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    events = [{"step": 2, "alarm": "runaway", "evidence": "x"}, {"step": 3, "alarm": "runaway", "ends": True}]
    (folder / "health.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "kl_control.png").write_bytes(b"")
    (folder / "versions.json").write_text(json.dumps({"trl": "1.12.0", "trl_klx": "0.1.0"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 64, "kl_budget": 4.0}
    origin = {"kl/origin": 3.0, "kl/origin_se": 0.5, "kl/origin_token": 0.25}
    text = card(folder, beta=0.1, history=[{"step": 1, "kl/k3": 0.1, "kl/sequence": 1.2, **origin}], **moving)
    assert "| k3, to the start of the run | 0.25 | 3 ± 0.5 |" in text
    assert row(text, "Budget") == "4.0 nats per sequence from the start; beyond it: stop"
    assert "Health alarms of the run: runaway at step 2." in text
    assert "![KL to the reference over the steps, its target, and the coefficient that held it](kl_control.png)" in text
    assert "- TRL: 1.12.0\n" in text
    assert "moved by 0.6 of the way to the policy every 64 steps" in row(text, "Reference model")
    assert '[{"role": "user", "content": question}]' in text
    badge = '[<img src="https://example.org/b.svg"/>](https://example.org/run)'
    (folder / "README.md").write_text(f"---\ntags: [trl]\n---\n\n{badge} \n")
    settings = plain_settings(KLXGRPOConfig(str(folder), **QUICK))
    write_card(folder, settings, is_adapter=False)
    assert f"\n{badge}\n" in (folder / "README.md").read_text()


def test_papers_are_those_of_trls_cards() -> None:
    trainers: dict[str, Any] = {"grpo": GRPOTrainer, "dpo": DPOTrainer}
    if TRL_HAS_PPO:
        from trl.experimental.ppo import PPOTrainer

        trainers["ppo"] = PPOTrainer
    for name, trainer in trainers.items():
        assert PAPERS[name]._asdict() == trainer._paper, name


def test_settings_hold_no_secret_and_no_path_of_this_machine(tmp_path: Path) -> None:
    args = KLXGRPOConfig(
        str(tmp_path),
        **QUICK,
        hub_token="hf_secret",
        model_init_kwargs={"token": "hf_secret", "cache_dir": Path("/mnt/cache")},
    )
    settings = plain_settings(args)
    public = public_settings({**settings, "hub_token": "hf_secret", "reward_funcs": ["a.b"], "dataset_name": "~/data"})
    text = yaml.safe_dump(settings) + yaml.safe_dump(public)
    assert "hf_secret" not in text
    assert settings["model_init_kwargs"] == {"cache_dir": "/mnt/cache"}  # plain, for YAML
    assert public["model_init_kwargs"]["cache_dir"] == "./cache"
    assert (public["dataset_name"], public["output_dir"], public["reward_funcs"]) == (
        "./data",
        f"./{tmp_path.name}",
        ["a.b"],
    )
    assert "/mnt" not in yaml.safe_dump(public)


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "ppo"])
def test_a_trainer_in_python_writes_the_same_card(algorithm: str, tmp_path: Path) -> None:
    """No recipe: the card and the settings come from the trainer; and `trl-klx card` writes the same from files."""
    path, folder = save_tiny(tmp_path / "base"), tmp_path / "run"
    if algorithm == "grpo":
        args = KLXGRPOConfig(str(folder), **QUICK, beta=0.1, num_generations=2, max_completion_length=4)
        trainer: Any = KLXGRPOTrainer(path, digit_reward, args, tiny_dataset())
    elif algorithm == "dpo":
        args = KLXDPOConfig(str(folder), **QUICK, kl_coef=0.1)
        trainer = KLXDPOTrainer(path, args=args, train_dataset=preferences())
    else:
        settings = {**QUICK, "gradient_accumulation_steps": 2, "response_length": 4}
        args = KLXPPOConfig(str(folder), **settings, kl_coef=0.1)
        trainer = KLXPPOTrainer(args, model=path, reward_funcs=digit_reward, train_dataset=tiny_dataset())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="Mine", dataset_name="org/data", tags="extra")
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.datasets == ["org/data"]
    assert {"trl", algorithm, "trl_klx", "extra"} <= set(data.tags)
    assert "# Model Card for Mine" in text
    assert "`base`, a local model that is not on the Hub" in text
    assert ("Rewards: `digit_reward`." in text) == (algorithm != "dpo")
    assert row(text, "Coefficient") == f"{'beta' if algorithm == 'grpo' else 'kl_coef'} 0.1"
    assert str(tmp_path) not in text
    recipe = yaml.safe_load((folder / "resolved_recipe.yaml").read_text())
    assert recipe["gradient_accumulation_steps"] == (2 if algorithm == "ppo" else args.gradient_accumulation_steps)
    (folder / "README.md").write_text(text.replace("0.1", "0.9"))  # spoilt
    assert cli.main(["card", "--run", str(folder)]) == 0
    assert (folder / "README.md").read_text() == text


BAD = [
    (["--run", "nowhere"], "--run nowhere is not a folder"),
    (["--run", "empty"], "there is no empty/resolved_recipe.yaml, which every run writes"),
    (["--run", "broken"], "broken/resolved_recipe.yaml is not valid YAML"),
    (["--run", "listed"], "must be a YAML mapping of field: value, and is a list"),
    (["--run", "foreign"], "no trainer of trl_klx wrote them"),
    (["--run", "fine", "--private"], "--private has no effect without --push_to"),
    (["--run", "fine", "--push_to", "me/x"], "fine holds no model"),
    (["--push_to", "me/x"], "the following arguments are required: --run"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_of_the_command(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"broken": "a: [", "listed": "- a\n", "foreign": "a: 1\n", "fine": "num_generations: 2\n"}
    for name, content in files.items():
        Path(name).mkdir()
        (Path(name) / "resolved_recipe.yaml").write_text(content)
    Path("empty").mkdir()
    assert cli.main(["card", *argv]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert message in said
