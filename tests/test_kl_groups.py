"""Groups of prompts with betas of their own: each is what it would be alone, and the loss is linear in them."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from support.tiny import Arguments, drift, tiny_dataset
from test_grpo import make_trainer, rollout, save_tiny
from torch import Tensor

from trl_klx.trainers.session.groups import group_names
from trl_klx.trainers.session.session import KLSession

pytestmark = pytest.mark.trl

# Two prompts, two answers each; the first prompt is of group a, the second of group b.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
PROMPTS, GROUPS = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
K3 = torch.tensor([[0.1, 0.3, 9.0], [0.2, 9.0, 9.0], [0.5, 0.1, 0.0], [0.2, 0.2, 9.0]])
PID = {"kl_controller": "pid", "kl_monitor": ["k3"]}
OWN = {"kl_group_column": "answer", "kl_group_targets": {"0": 0.001, "1": 10.0}, "kl_target": 0.05}  # of tiny_dataset


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def control(groups: tuple[str, ...], **options: object) -> KLSession:
    kl = KLSession(Arguments(**{**PID, **options}), Accelerator(cpu=True), groups)
    kl.start(10)
    return kl


def grouped(**options: object) -> KLSession:
    return control(("a", "b"), kl_group_column="task", kl_group_targets={"a": 0.02, "b": 5.0}, **options)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_each_group_is_what_it_would_be_alone(unit: str) -> None:
    kl, logged = grouped(kl_target_unit=unit), {}
    alone = [control((), kl_target=target, kl_target_unit=unit) for target in (0.02, 5.0)]
    for _ in range(3):
        kl.measure("train", {"k3": K3}, MASK, PROMPTS, GROUPS)
        logged = kl.end_step()
        for place, own in enumerate(alone):
            rows = place == GROUPS
            own.measure("train", {"k3": K3[rows]}, MASK[rows], PROMPTS[rows])
            own.end_step()
    assert [float(beta) for beta in kl.coef_of(torch.tensor([0, 1]))] == pytest.approx([own.coef for own in alone])
    assert alone[0].coef > 0.1 > alone[1].coef
    assert kl.coef == pytest.approx((alone[0].coef + alone[1].coef) / 2)
    assert (logged["kl_groups/a/target"], logged["kl_groups/b/target"]) == (0.02, 5.0)
    assert "kl/target" not in logged
    metrics = kl.metrics("train")
    for name, own in zip("ab", alone, strict=True):
        expected = own.metrics("train")
        assert metrics[f"kl_groups/{name}/sequence"] == pytest.approx(expected["kl/sequence"])
        assert metrics[f"kl_groups/{name}/token"] == pytest.approx(expected["kl"])


def test_the_whole_is_what_it_is_without_groups() -> None:
    kl, plain = grouped(), control((), kl_target=1.0)
    for each, groups in ((kl, GROUPS), (plain, None)):
        each.measure("train", {"k3": K3}, MASK, PROMPTS, groups)
        each.end_step()
    whole = plain.metrics("train")
    assert {name: value for name, value in kl.metrics("train").items() if name in whole} == whole


def test_a_group_without_answers_waits() -> None:
    kl = grouped()
    kl.measure("train", {"k3": K3[:2]}, MASK[:2], PROMPTS[:2], GROUPS[:2])
    kl.end_step()
    assert (kl.controllers["a"].readings, kl.controllers["b"].readings) == (1, 0)
    assert "kl_groups/b/token" not in kl.metrics("train")


def test_with_a_fixed_beta_groups_are_only_logged() -> None:
    kl = control(("a", "b"), kl_group_column="task", kl_controller="fixed", beta=0.3)
    kl.measure("train", {"k3": K3}, MASK, PROMPTS, GROUPS)
    assert kl.end_step()["kl_groups/b/coef"] == 0.3
    assert kl.coef_of(GROUPS) == 0.3
    assert kl.metrics("train")["kl_groups/a/sequence"] == pytest.approx(0.3)


def two_groups(first: str, second: str) -> Dataset:
    return Dataset.from_dict({"prompt": ["1+1=", "2+2="], "task": [first, second]})


@pytest.mark.parametrize(
    ("options", "dataset", "words"),
    [
        ({"kl_group_column": "domain"}, two_groups("a", "b"), "kl_group_column='domain' is not a column"),
        ({"kl_group_column": "task"}, two_groups("a", None), "is empty in a row"),  # type: ignore[arg-type]
        (
            {"kl_group_column": "task", "kl_group_targets": {"a": 1.0, "c": 2.0}, **PID, "kl_target": 1.0},
            two_groups("a", "b"),
            "kl_group_targets names 'c'",
        ),
        ({"kl_group_column": "task", "kl_group_targets": {"a": 1.0}, **PID}, two_groups("a", "b"), "no target for 'b'"),
        ({"kl_group_column": "task"}, two_groups("a", "b").to_iterable_dataset(), "in a streamed dataset"),
    ],
)
def test_groups_and_datasets_that_do_not_fit(options: dict, dataset: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        group_names(Arguments(**options), dataset)


def test_group_names_come_from_all_splits_in_one_order() -> None:
    splits = {"easy": two_groups("c", "a"), "hard": two_groups("b", "a")}
    assert group_names(Arguments(kl_group_column="task"), two_groups("d", "a"), splits, None) == ("a", "b", "c", "d")
    stream = two_groups("a", "b").to_iterable_dataset()
    named = Arguments(kl_group_column="task", kl_group_targets={"b": 1.0, "a": 1.0}, **PID)
    assert group_names(named, stream) == ("a", "b")


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "k1", "kl_placement": "reward"}], ids=["loss", "reward"])
def test_loss_is_linear_in_the_betas_of_the_groups(model_path: str, tmp_path: Path, options: dict) -> None:
    """What moves between two betas is the KL of the group whose beta it is."""
    trainer = make_trainer(model_path, tmp_path, **options, **OWN, kl_controller="pid")
    drift(trainer.model)
    inputs = rollout(trainer)  # a prompt of group 0 and one of group 1
    assert inputs["kl_groups"].tolist() == [0] * 4 + [1] * 4

    def gradient(betas: dict[str, float]) -> Tensor:
        trainer.kl._coefs |= betas
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, dict(inputs)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    low, high = gradient({"0": 0.1, "1": 0.1}), gradient({"0": 0.7, "1": 0.7})
    first, second = gradient({"0": 0.7, "1": 0.1}), gradient({"0": 0.1, "1": 0.7})
    torch.testing.assert_close(first + second, low + high, rtol=1e-4, atol=1e-7)
    assert (first - second).norm() > 0.1 * (high - low).norm()
    kept = inputs["completion_mask"].clone()
    inputs["completion_mask"] = kept * (inputs["kl_groups"] == 0).unsqueeze(1)  # with group 0 alone
    torch.testing.assert_close(gradient({"0": 0.1, "1": 0.7}), gradient({"0": 0.1, "1": 0.1}))
    trainer.kl._coefs |= {"0": 0.1, "1": 0.1}
    del inputs["kl_groups"]
    torch.testing.assert_close(gradient({}), gradient({}))


def test_training_holds_each_group_by_its_own_beta_and_resumes(model_path: str, tmp_path: Path) -> None:
    targets = {"0": 0.001, "2": 10.0}
    options = {**OWN, "kl_group_targets": targets, "kl_controller": "pid", "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model_path, tmp_path / "whole", **options)
    whole.train()
    betas = whole.kl._coefs
    assert sorted(betas) == ["0", "1", "2", "3", "4"]
    assert betas["0"] > 0.2 > betas["2"]  # above and below their targets, from one start
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    half = make_trainer(model_path, tmp_path / "half", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert half.kl._coefs == betas
    assert half.kl.state()["groups"] == whole.kl.state()["groups"]
    last = whole.state.log_history[-2]
    assert last["kl_groups/0/target"] == 0.001
    assert whole.evaluate()["eval_kl_groups/0/sequence"] > 0


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "exact", "kl_placement": "both"}], ids=["reward", "both"])
def test_ppo_charges_each_group_by_its_own_beta(tmp_path: Path, options: dict) -> None:
    from support.ppo_tools import first_rollout, tiny_model, trainer

    made = trainer(tmp_path, ref_model=tiny_model(1), kl_controller="pid", whiten_advantages=False, **options, **OWN)
    experience = first_rollout(made)
    assert experience.groups.tolist() == [i % 5 for i in range(8)]

    def shaped(betas: list[float]) -> Tensor:
        made.kl._coefs = dict(zip("01234", betas, strict=True))
        return made._shape(experience).advantages

    low, high, mixed = shaped([0.1] * 5), shaped([0.7] * 5), shaped([0.7, 0.1, 0.1, 0.1, 0.1])
    own = experience.groups == 0
    torch.testing.assert_close(mixed[own], high[own])
    torch.testing.assert_close(mixed[~own], low[~own])
    assert (high - low).abs().max() > 0.01
    shapes = made._shape(experience)

    def loss(beta: float, rows: list[int]) -> float:
        made.kl._coefs = dict(zip("01234", [beta, 0.1, 0.1, 0.1, 0.1], strict=True))
        return float(made._loss(made.model, shapes, torch.tensor(rows)).loss.detach())

    differs = loss(0.7, [0, 5]) - loss(0.1, [0, 5])  # both of group 0
    assert loss(0.7, [1, 2, 3]) == loss(0.1, [1, 2, 3])
    assert abs(differs) > 0.1 if options else differs == 0.0  # a KL in the reward alone is not in the loss
    made.train()
    assert made.kl._coefs["0"] != made.kl._coefs["1"]
    assert "kl_groups/2/sequence" in made.state.log_history[0]


def test_a_row_of_an_unknown_group_is_named(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, kl_group_column="answer")
    row = {**tiny_dataset(1)[0], "answer": "new"}
    with pytest.raises(ValueError, match="a row has answer='new'"):
        trainer.kl.group_numbers([row])
