"""Threads for tiny models; and `pytest --situations`, the table of what users ran into and how the package answers.

A test marked `situation("what a user does", "right")` is a row of that table. The answers: it is right, it is refused
in one sentence, or it works and the user is warned.
"""

import pytest
import torch

# The models here are so small that threads cost more than they bring.
torch.set_num_threads(1)

ANSWERS = ("right", "refused", "warned")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--situations", action="store_true", help="print the table of situations, and run nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--situations"):
        config.option.collectonly = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--situations"):
        return
    rows: dict[tuple[str, str], int] = {}
    for item in items:
        for mark in item.iter_markers("situation"):
            text, answer = mark.args
            if answer not in ANSWERS:
                raise pytest.UsageError(f"{item.nodeid}: the answer {answer!r} is none of {', '.join(ANSWERS)}.")
            rows[text, answer] = rows.get((text, answer), 0) + 1
    print("| what a user does | answer | cases |\n|---|---|---|")
    for (text, answer), cases in rows.items():
        print(f"| {text} | {answer} | {cases} |")
    items.clear()
