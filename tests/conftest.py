"""Fixtures that need a real server or the real model; a server is started once a session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from helpers import interpreted, needs  # noqa: F401 - interpreted, before others import triton
from helpers.oracle import Oracle
from helpers.triton import RunningServer
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.server import TritonServer
from tidewright.tokenization import Tokenizer

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in needs.MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    # Not only through our helpers: `tidewright bench` starts its own.
    TritonServer.start = needs.needs("server")(TritonServer.start)  # type: ignore[method-assign]
    gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: nobody need search it for garbage again and again
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extension modules would report at the exit what they think leaked


def pytest_itemcollected(item: pytest.Item) -> None:
    needs.add_marks(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    needs.begin(item)
    try:
        return (yield)
    finally:
        needs.begin(None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """For the small models of tests, and transformers' token by token: there threads wait longer than they compute."""
    if torch := sys.modules.get("torch"):  # it takes seconds to import, and a run of a few tests may do without
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """Kernels share their work out among threads."""
    import torch

    torch.set_num_threads(max(2, len(os.sched_getaffinity(0))))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The embedded model, prepared."""
    import torch

    from tidewright.launch.prepare import prepare

    torch.set_num_threads(1)  # for whoever did not import it before
    return prepare(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    """The embedded model's; it takes a while to load."""
    return Tokenizer(model_dir)


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> Oracle:
    """transformers' answers, which several modules ask for."""
    return Oracle(model_dir)


@pytest.fixture(scope="session")
def float32_fallback(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in ONNX, whose tokens can be held against transformers'. All workers of a run share it."""
    from rich.console import Console

    from tidewright.launch.export import export

    base = tmp_path_factory.getbasetemp()  # of this worker, below that of the run
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "float32_fallback"
    export(model_dir, folder, ("float32",), Console(quiet=True))
    return folder


@pytest.fixture(autouse=True)
def _revive(request: pytest.FixtureRequest) -> None:
    for name in {"server", "bf16_server"} & set(request.fixturenames):
        request.getfixturevalue(name).revive()


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[RunningServer]:
    """The real thing in float32, in which its tokens can be held against transformers'. A response for each token."""
    options = {"dtype": "float32", "streaming_share": 1, "max_waiting": 200, "max_model_len": 4096}
    with RunningServer(model_dir, **options) as running:
        yield running


@pytest.fixture
def pair(two: list[RunningServer]) -> list[RunningServer]:
    """The module's two servers, well and idle: what an earlier test has left of one is started again."""
    for server in two:
        if not server.is_well():
            server.triton.start_again()
        server.wait_idle()  # its metrics lag, and a test may look for the server that is busy
    return two


@pytest.fixture(scope="session")
def bf16_server(model_dir: Path) -> Iterator[RunningServer]:
    """The real thing as users run it."""
    with RunningServer(model_dir) as running:
        yield running
