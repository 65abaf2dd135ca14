"""An engine that hangs or restarts: health says so in time, and timeouts hold. A busy one is well."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.processes import child, stub_of
from helpers.triton import RunningServer

TIMEOUT = 60.0  # seconds


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(model_dir, heartbeat_timeout=600) as running:
        yield running


@contextmanager
def stopped_engine(server: RunningServer) -> Iterator[None]:
    pid = child(stub_of(server, "decoder").pid, "tidewright.engine").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def health(server: RunningServer) -> str:
    """Empty if all is well."""
    return str(server.control("health").json().get("error", ""))


def test_health_says_that_the_engine_hangs_long_before_it_is_replaced(server: RunningServer) -> None:
    restarts = server.metric("engine_restarts_total")
    with stopped_engine(server):
        deadline = time.monotonic() + TIMEOUT
        while not (trouble := health(server)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert trouble.startswith("the engine has said and computed nothing for ")
    while health(server):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.metric("engine_restarts_total") == restarts


def test_a_timeout_holds_while_the_engine_hangs(server: RunningServer) -> None:
    with stopped_engine(server):
        got = server.generate(text_input="Once", sampling_parameters={"timeout": 1.0})
    assert str(got.error).startswith("timed out after 1 s; ")
    assert str(got.error).endswith("[timeout]")
    assert server.generate(text_input="Once", sampling_parameters={"max_tokens": 2}).error is None
    server.wait_idle()


def test_a_timeout_holds_while_the_engine_restarts(server: RunningServer) -> None:
    with server.stream() as stream:
        sampling = {"max_tokens": 2000, "ignore_eos": True}
        stream.send("1", text_input="Once", stream=True, sampling_parameters=sampling)
        stream.next()
        child(stub_of(server, "decoder").pid, "tidewright.engine").kill()
        deadline = time.monotonic() + TIMEOUT
        while not health(server):  # until its end is known
            assert time.monotonic() < deadline
        # The next one takes longer than that to load its model.
        stream.send("2", text_input="Once", sampling_parameters={"timeout": 0.05})
        while not stream._errors:
            stream.next()
        assert "timed out after 0.05 s; the engine is not available (killed by SIGKILL) [timeout]" in str(
            stream._errors[0]
        )
    server.wait_idle()


def test_an_engine_in_long_steps_is_well(server: RunningServer) -> None:
    with server.stream() as stream:
        for number in range(2):
            stream.send(str(number), input_ids=[1000 + number] * 2500, sampling_parameters={"max_tokens": 1})
        troubles = set()
        deadline = time.monotonic() + 4 * TIMEOUT
        while server.metric("prompt_tokens_total") < 5000:
            assert time.monotonic() < deadline
            troubles.add(health(server))
            time.sleep(0.02)
        assert troubles == {""}
        assert not any(generation.error for generation in stream.finish().values())
