"""Bends of code that is not ours: what `swapped` leaves behind."""

import types

import pytest

from trl_klx.trainers.seams import swapped
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
