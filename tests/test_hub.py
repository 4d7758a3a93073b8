"""Pushing, end to end against a local server: what arrives can be downloaded and loaded; failures are one sentence."""

import json
import re
import shlex
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, PeftModel
from support.hub_server import OWNER, TOKEN, Hub
from support.processes import end_ranks
from support.tiny import save_tiny, tiny_model
from support.tiny_dpo import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_klx.cli import commands as cli
from trl_klx.hub import push
from trl_klx.hub.push import HubError
from trl_klx.run import dpo, grpo, ppo, train
from trl_klx.run.recipe.parse import parse
from trl_klx.trainers.checkpoints import pushes as hub_hooks
from trl_klx.trainers.dpo.config import KLXDPOConfig
from trl_klx.trainers.grpo.config import KLXGRPOConfig
from trl_klx.trainers.grpo.trainer import KLXGRPOTrainer
from trl_klx.trainers.ppo.config import KLXPPOConfig

pytestmark = [pytest.mark.hub, pytest.mark.pictures]

MAINS = {"grpo": grpo.main, "dpo": dpo.main, "ppo": ppo.main}
CONFIGS: dict[str, type] = {"grpo": KLXGRPOConfig, "dpo": KLXDPOConfig, "ppo": KLXPPOConfig}
REWARD = {
    "reward_funcs": ["support.tiny.digit_reward"],
    "eval_strategy": "steps",
    "eval_steps": 2,
    "kl_estimator": "exact",
}
FIELDS = {
    "grpo": {**REWARD, "beta": 0.1, "num_generations": 2, "max_completion_length": 6, "kl_placement": "both"},
    "ppo": {**REWARD, "kl_coef": 0.1, "response_length": 6, "kl_placement": "both", "stop_token": None},
    "dpo": {"kl_coef": 0.1, "kl_probe_steps": 2, "kl_probe_max_new_tokens": 6, "dataset_name": "pairs"},
}
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret_place")
    save_tiny(folder / "tiny-base")
    rows = {
        "prompts": [{"prompt": f"{i}+{i}=", "answer": "2"} for i in range(8)],
        "pairs": [{"prompt": f"{i}+{i}=", "chosen": "2", "rejected": "ab"} for i in range(8)],
    }
    for name, content in rows.items():
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with Hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets at import
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server has no such storage
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push._api.cache_clear()
        # After a cut, huggingface_hub tries five times, 24 seconds in all.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server
    push._api.cache_clear()


def recipe(inputs: Path, run: Path, algorithm: str, **changes: object) -> list[str]:
    fields = {
        "model_name_or_path": str(inputs / "tiny-base"),
        "dataset_name": "prompts",
        "output_dir": str(run),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
        "push_to_hub": True,
        **FIELDS[algorithm],
        **changes,
    }
    fields["dataset_name"] = str(inputs / fields["dataset_name"])
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return ["--config", str(path)]


def quick_start(card: ModelCard) -> str:
    """The Python block that the card gives."""
    return card.text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("algorithm", MAINS)
def test_what_a_recipe_pushes_can_be_downloaded_and_loaded(
    algorithm: str, inputs: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / f"my {algorithm}" / "run"
    run.parent.mkdir()
    argv = recipe(inputs, run, algorithm, hub_private_repo=True)
    assert MAINS[algorithm](argv) == 0
    repository = hub.repositories[f"{OWNER}/run"]
    assert repository.private
    assert repository.messages == ["End of training"]  # one push, not one for each thing that saves
    there = Path(snapshot_download(f"{OWNER}/run", cache_dir=tmp_path / "cache"))
    assert {"model.safetensors", "tokenizer.json", "README.md", "resolved_recipe.yaml", "versions.json"} <= set(
        repository.files
    )
    assert {"metrics.jsonl", "kl_control.png"} <= set(repository.files)
    assert "training_args.bin" not in repository.files
    # The same model and tokenizer.
    local, loaded = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (run, there))
    assert set(local) == set(loaded)
    assert all(torch.equal(local[name], loaded[name]) for name in local)
    assert (
        AutoTokenizer.from_pretrained(there)("1+1=").input_ids == AutoTokenizer.from_pretrained(run)("1+1=").input_ids
    )
    # Nothing says where it was made, or with which token.
    for name, content in repository.files.items():
        for secret in (str(inputs), str(tmp_path), TOKEN):
            assert secret.encode() not in content, (name, secret)
    # The recipe is one, and the same but for the paths.
    pushed, first = (
        parse(CONFIGS[algorithm], given).whole() for given in (["--config", str(there / "resolved_recipe.yaml")], argv)
    )
    assert pushed.model.model_name_or_path == "./tiny-base"
    for name in ("kl_estimator", "kl_placement", "learning_rate", "max_steps", "hub_private_repo"):
        assert getattr(pushed.args, name) == getattr(first.args, name), name
    # The card's metadata is read by the Hub, and its quick start runs.
    card = ModelCard.load(there / "README.md")
    assert {"trl", "trl_klx", algorithm, "kl-exact", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert card.data.get("datasets") is None
    assert f'"{OWNER}/run"' in quick_start(card)
    exec(quick_start(card).replace(f"{OWNER}/run", str(there)), {})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", MAINS)
def test_an_adapter_is_pushed_without_its_base(algorithm: str, inputs: Path, hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "adapter"
    assert MAINS[algorithm](recipe(inputs, run, algorithm, hub_model_id=f"{OWNER}/mine", **LORA)) == 0
    there = Path(snapshot_download(f"{OWNER}/mine", cache_dir=tmp_path / "cache"))
    for name, content in hub.repositories[f"{OWNER}/mine"].files.items():
        assert str(inputs).encode() not in content, name
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "./tiny-base"
    base = AutoModelForCausalLM.from_pretrained(inputs / "tiny-base")
    loaded = PeftModel.from_pretrained(base, there).state_dict()
    local = AutoPeftModelForCausalLM.from_pretrained(run).state_dict()
    assert all(torch.equal(local[name], loaded[name]) for name in local)
    assert any("lora_B" in name and local[name].any() for name in local)  # it was trained
    card = ModelCard.load(there / "README.md")
    assert card.data.library_name == "peft"
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    code = quick_start(card).replace("path/to/tiny-base", str(inputs / "tiny-base"))
    exec(code.replace(f"{OWNER}/mine", str(there)), {})


def test_saves_are_pushed_and_can_be_resumed_from(inputs: Path, hub: Hub, tmp_path: Path) -> None:
    """hub_strategy: every save pushes the model; "checkpoint" the whole checkpoint too."""
    run = tmp_path / "run"
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "hub_always_push": True}
    assert grpo.main(recipe(inputs, run, "grpo", hub_strategy="checkpoint", **saving)) == 0
    repository = hub.repositories[f"{OWNER}/run"]
    progress = [f"Training in progress, step {step}{part}" for step in (1, 2) for part in ("", ", checkpoint")]
    assert repository.messages == [*progress, "End of training"]
    first = repository.commits[2]
    assert {"model.safetensors", "tokenizer.json", "README.md", "resolved_recipe.yaml"} <= set(first)
    assert not {"optimizer.pt", "trainer_state.json", "kl_state.json", "training_args.bin"} & set(first)
    assert "last-checkpoint/training_args.bin" not in repository.files
    there = Path(snapshot_download(f"{OWNER}/run", cache_dir=tmp_path / "cache"))
    again = recipe(inputs, tmp_path / "again", "grpo", push_to_hub=False, max_steps=3)
    assert grpo.main([*again, "--resume_from_checkpoint", str(there / "last-checkpoint")]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 3


def refuse_token(hub: Hub) -> None:
    hub.token = "another"


def forbid(hub: Hub) -> None:
    hub.writable = "somebody"


def cut_upload(hub: Hub) -> None:
    hub.cut = "/upload/"


def cut_commit(hub: Hub) -> None:
    hub.cut = "/commit/"


def cut_everything(hub: Hub) -> None:
    hub.cut = "/"


FAILURES = {
    "refused token": (refuse_token, "the Hub refused the token (401)"),
    "no right to write": (forbid, f"the token may not write to {OWNER}/run (403"),
    "cut upload": (cut_upload, "the exchange with"),
    "cut commit": (cut_commit, "the exchange with"),
    "no network": (cut_everything, "the exchange with"),
}


@pytest.mark.parametrize("failure", ["refused token", "cut upload", "cut commit"])
def test_a_failed_push_leaves_the_model_and_says_how_to_push_later(
    failure: str,
    inputs: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The Hub fails after training began: status 1, one sentence; the command that it prints pushes the same model."""
    fail, reason = FAILURES[failure]
    begin = KLXGRPOTrainer.train

    def train(self, *args, **kwargs):
        fail(hub)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(KLXGRPOTrainer, "train", train)
    run = tmp_path / "a run"
    argv = recipe(inputs, run, "grpo", hub_model_id=f"{OWNER}/run", hub_private_repo=True, max_steps=1)
    assert grpo.main(argv) == 1
    (said,) = re.findall(r"error: .*", capfd.readouterr().err)  # not at a line's start: a progress bar broke off
    assert reason in said
    assert f"the model is in {run}" in said
    assert hub.repositories[f"{OWNER}/run"].files == {}  # all or nothing
    AutoModelForCausalLM.from_pretrained(run)
    (later,) = re.findall(r"`(trl-klx [^`]+)`", said)
    assert "--private" in later
    hub.token, hub.writable, hub.cut = TOKEN, OWNER, ""
    assert cli.main(shlex.split(later)[1:]) == 0
    assert f"pushed: {hub.url}/{OWNER}/run/commit/" in capfd.readouterr().out
    pushed = hub.repositories[f"{OWNER}/run"].files
    assert pushed["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert {"README.md", "resolved_recipe.yaml", "tokenizer.json"} <= set(pushed)


@pytest.mark.parametrize("algorithm", MAINS)
def test_a_run_that_could_not_be_pushed_is_refused_before_a_model_is_loaded(
    algorithm: str,
    inputs: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "build_trainer", lambda *_: pytest.fail("a model was loaded"))
    argv = recipe(inputs, tmp_path / "run", algorithm, hub_model_id=f"{OWNER}/run")

    def refused(*more: str) -> str:
        assert MAINS[algorithm]([*argv, *more]) == 2
        (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "`trl-klx card --run" in said
        return said

    for name in ("refused token", "no right to write", "no network"):
        fail, reason = FAILURES[name]
        fail(hub)
        assert reason in refused(), name
        hub.token, hub.writable, hub.cut = TOKEN, OWNER, ""
    assert "is not a valid name for a repository" in refused("--hub_model_id", f"{OWNER}/a b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE is set" in refused()
    monkeypatch.undo()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert "no token is found: run `hf auth login`, or set HF_TOKEN" in refused()


def test_a_trainer_in_python_pushes_by_itself(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(save_tiny(tmp_path / "base"), tmp_path / "run", max_steps=1)
    trainer.train()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HubError, match=r"run was not pushed .no token is found.* push it later with `trl-klx card --run"
    ):
        trainer.push_to_hub()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    commit = trainer.push_to_hub("Mine", token=TOKEN, private=True, tags=["extra"])
    repository = hub.repositories[f"{OWNER}/run"]
    assert commit.commit_url == f"{hub.url}/{OWNER}/run/commit/{repository.sha}"
    assert (repository.private, repository.messages) == (True, ["Mine"])
    assert {"model.safetensors", "tokenizer.json", "README.md", "resolved_recipe.yaml"} <= set(repository.files)
    assert "extra" in ModelCard(repository.files["README.md"].decode()).data.tags
    assert str(tmp_path).encode() not in b"".join(repository.files.values())
    later = trainer.push_to_hub("Later", blocking=False, token=TOKEN)
    assert later.result(timeout=30).commit_message == "Later"


class AtTheEnd(TrainerCallback):
    """Acts once training has ended, before the trainer waits for its pushes."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._act()


def test_a_background_push_is_let_finish_and_its_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that is being uploaded is not rotated away, and the next save does not wait for it."""
    job: Future = Future()
    began: list[Path] = []

    def push_checkpoint(checkpoint: Path, *_: object, **__: object) -> Future:
        began.append(checkpoint)
        return job

    monkeypatch.setattr(hub_hooks, "push_checkpoint", push_checkpoint)
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tiny_model(), tmp_path / "run", max_steps=2, **saves)
    trainer.args.push_to_hub = True
    trainer.add_callback(AtTheEnd(lambda: Timer(0.2, job.set_exception, [HubError("gone")]).start()))
    trainer.train()
    first, second = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2))
    assert began == [first]
    assert first.is_dir() and second.is_dir()
    assert f"{first} was not pushed to None (gone); training continued" in caplog.text


def push_to(url: str, argv: list[str]) -> int:
    """A run of GRPO in this process, which is none of pytest's."""
    huggingface_hub.constants.ENDPOINT = url  # what HF_ENDPOINT sets at import
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    return grpo.main(argv)


@pytest.mark.processes
def test_two_processes_push_once_and_a_refusal_lets_both_end(inputs: Path, hub: Hub, tmp_path: Path) -> None:
    """The Hub takes the repository and refuses the commit."""
    hub.read_only = True
    run = tmp_path / "run"
    argv = recipe(inputs, run, "grpo", max_steps=1, per_device_train_batch_size=2)
    statuses, errors = end_ranks(tmp_path, 2, push_to, hub.url, argv, ACCELERATE_USE_CPU="true", HF_TOKEN=TOKEN)
    assert statuses == [1, 0], errors  # the first pushes; the other ends too
    (said,) = set(re.findall(r"error: .*", errors))
    assert "me/run was not pushed (the token may not write to me/run (403: This token may only read)" in said
    assert len([path for _, path in hub.requests if "/commit/" in path]) == 1
    for name in ("model.safetensors", "README.md", "kl_control.png"):
        assert (run / name).is_file(), name
