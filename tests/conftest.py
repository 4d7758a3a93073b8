"""The order of the tests; two processes' runs; and the table of situations.

`pytest --situations` prints what users ran into and how the package answers: a test that is marked
`situation("what a user does", "right")` is a row. The answers: it is right, it is refused in one sentence, or it works
and the user is warned.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support.device import DEVICE, made_here
from support.launching import Launched, Launches, Wanted
from support.quick import make_quick

from trl_klx.trainers.report import outcome

# test_triton.py, `make test-vllm`, `make test-wandb` and `make test-qlora` run them
collect_ignore = ["kernels", "engine", "trackers", "quantised"]
ANSWERS = ("right", "refused", "warned")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--situations", action="store_true", help="print the table of situations, and run nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--situations"):
        config.option.collectonly = True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--situations"):
        print_situations(items)
        items.clear()
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)  # the longest come first


def pytest_collection_finish() -> None:
    make_quick()


def print_situations(items: list[pytest.Item]) -> None:
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


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run draws pictures at its end, which takes as long as a tiny run: only those that look at them do."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(outcome, "plot_run", lambda *args, **kwargs: [])


@pytest.fixture(autouse=True, scope="session")
def values_are_compared() -> None:
    """On another device than the CPU, what a test expects may be on the CPU and what it finds on the device."""
    if DEVICE.type != "cpu":
        torch.testing.assert_close = partial(torch.testing.assert_close, check_device=False)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the tensors of a test are made: see support/device.py."""
    with made_here():
        yield DEVICE


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The runs on two processes that the selected tests want."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted: list[Wanted] = [own["launched"] for own in params if "launched" in own]
    return Launches(tmp_path_factory.mktemp("launches"), wanted)


@pytest.fixture
def launched(request: pytest.FixtureRequest, launches: Launches) -> Launched:
    """A run on two processes: see support/launching.py."""
    return launches.run(request.param)
