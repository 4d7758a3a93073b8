"""Bends of code that is not ours: what `swapped` leaves behind."""

import ast
import inspect
import re
import sys
import types
from pathlib import Path

import pytest

import trl_klx
from trl_klx.trainers.seams import OVERRIDDEN, READ, SWAPPED, TRL_HAS_PPO, swapped
from trl_klx.trainers.session.coefficient import KLCoefficient


class Holder:
    of_class = "class"

    def __init__(self) -> None:
        self.own = "own"

    def method(self) -> str:
        return "method"


def test_own_attributes_come_back_and_others_go() -> None:
    holder = Holder()
    with swapped(holder, own=1, of_class=2, new=3, method=lambda: "shadow"):
        assert (holder.own, holder.of_class, holder.new, holder.method()) == (1, 2, 3, "shadow")  # type: ignore[attr-defined]
    assert vars(holder) == {"own": "own"}
    assert (holder.of_class, holder.method()) == ("class", "method")


def test_nested_and_after_an_error() -> None:
    holder = Holder()
    with swapped(holder, own=1, new=1):
        with pytest.raises(KeyError), swapped(holder, own=2, new=2):
            raise KeyError
        assert (holder.own, holder.new) == (1, 1)  # type: ignore[attr-defined]
    assert vars(holder) == {"own": "own"}


def test_an_attribute_that_was_deleted_meanwhile_stays_away() -> None:
    holder = Holder()
    with swapped(holder, new=1):
        del holder.new  # type: ignore[attr-defined]
    assert vars(holder) == {"own": "own"}


def test_classes_and_modules() -> None:
    class Child(Holder): ...

    with swapped(Child, of_class=property(lambda self: 5)):
        assert Child().of_class == 5
    assert "of_class" not in vars(Child)
    module = types.ModuleType("module")
    module.function = len  # type: ignore[attr-defined]
    with swapped(module, function=max):
        assert module.function is max  # type: ignore[attr-defined]
    assert module.function is len  # type: ignore[attr-defined]


def test_a_coefficient_is_another_for_as_long_as_trl_looks() -> None:
    class Trainer:
        beta = KLCoefficient()
        kl = types.SimpleNamespace(coef=0.25)
        args = types.SimpleNamespace(kl_coef_name="beta")

        def __init__(self) -> None:
            self.kl = Trainer.kl

    trainer = Trainer()
    with swapped(trainer, beta=0.0):
        assert trainer.beta == 0.0
    assert trainer.beta == 0.25


def overridden(trainer: type) -> set[str]:
    """The methods of classes that are not ours which ours override."""
    ours = [cls for cls in trainer.__mro__ if cls.__module__.startswith("trl_klx.")]
    foreign = [cls for cls in trainer.__mro__ if cls not in ours and cls is not object]
    names = {name for cls in ours for name, value in vars(cls).items() if callable(value)}
    return {name for name in names if not name.startswith("__") and any(name in vars(cls) for cls in foreign)}


TRAINERS = ["KLXGRPOTrainer", "KLXDPOTrainer", "KLXPPOTrainer"]


def test_what_is_read_is_there() -> None:
    classes = {cls for name in TRAINERS for cls in getattr(trl_klx, name).__mro__}
    foreign = {cls.__module__ for cls in classes if cls.__module__.split(".")[0] in ("trl", "transformers")}
    sources = [inspect.getsource(sys.modules[module]) for module in foreign]
    for name in READ:
        assert any(re.search(rf"self\.{name}\b|def {name}\(", source) for source in sources), name


def test_every_override_is_listed() -> None:
    found = set().union(*(overridden(getattr(trl_klx, name)) for name in TRAINERS))
    assert found - set(OVERRIDDEN) == set()
    assert set(OVERRIDDEN) - found == (set() if TRL_HAS_PPO else {"generate_completions"})  # of TRL's PPO trainer alone


def test_every_swap_of_foreign_code_is_listed() -> None:
    found = set()
    for file in Path(trl_klx.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "swapped":
                found |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
    ours = {"_tape", "_notes", "_call"}
    assert found - ours - set(SWAPPED) == set()
