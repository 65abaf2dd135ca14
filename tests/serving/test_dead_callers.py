"""A model that asked another one is killed while it is answered: Triton never takes a response of that answer again.

The other model, whose sends hang so, goes on with all other requests, and says that it must be loaded again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from helpers.processes import child, stub_of
from helpers.triton import RunningServer, Stream
from helpers.upstream import aborted
from tidewright.schema import STUCK

LONG = {"temperature": 0, "max_tokens": 6000, "ignore_eos": True}
TRIES = 3
TIMEOUT = 60.0  # seconds


class TritonAbortedError(Exception):
    """Its own fault: it aborts if a stub dies with a lock of their shared memory (boost lock_exception)."""


@contextlib.contextmanager
def alive(server: RunningServer) -> Iterator[None]:
    """An error is Triton's if Triton is gone."""
    try:
        yield
    except Exception as error:
        if not aborted(server):
            raise
        raise TritonAbortedError from error


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(stream: Stream, name: str, model: str) -> None:
    stream.send(name, model, text_input="Once upon a time", stream=True, sampling_parameters=LONG)


def begin(stream: Stream, model: str, count: int, name: str = "") -> None:
    names = [f"{name}{number}" for number in range(count)]
    for one in names:
        send(stream, one, model)
    while min(len(stream.generations[one].token_ids) for one in names) < 3:
        stream.next()


def go_on(stream: Stream, name: str, model: str) -> None:
    """It gets some more tokens."""
    tokens = 0
    while tokens < 20:
        if stream.generations[name].ended:  # the fallback's answers have a limit
            send(stream, name, model)
        generation = stream.generations[name]
        before = len(generation.token_ids)
        stream.next()
        tokens += len(generation.token_ids) - before


def health(server: RunningServer, model: str) -> str:
    """Empty if all is well."""
    return str(server.control("health", model).json().get("error", ""))


def reload(server: RunningServer, model: str) -> None:
    """As the watchdog does."""
    with contextlib.suppress(ValueError):
        stub_of(server, model).kill()
    url = f"{server.triton.http_url}/v2/repository/models/{model}"
    for action in ("unload", "load"):
        assert httpx.post(f"{url}/{action}", json={}, timeout=120, trust_env=False).status_code == 200


def check(server: RunningServer, model: str, hanging: int) -> None:
    """`hanging` streams of failsafe that `model` answers; then failsafe is killed."""
    with server.stream() as beside, server.stream() as lost:
        begin(beside, model, 1, "beside")
        begin(lost, "failsafe", hanging)
        stub_of(server, "failsafe").kill()
        go_on(beside, "beside0", model)
        got = server.generate(model, text_input="Once", sampling_parameters={"max_tokens": 3})
        assert (got.error, len(got.token_ids)) == (None, 3)
        wait_for(lambda: health(server, model).startswith(f"{STUCK}Triton has not taken {hanging} responses"))
        go_on(beside, "beside0", model)
        # What nobody reads is not generated for ever.
        active = "requests_active" if model == "decoder" else "fallback_requests_active"
        wait_for(lambda: server.metric(active) <= 1)
        go_on(beside, "beside0", model)
        for name in ("failsafe", model):
            reload(server, name)
        wait_for(lambda: health(server, model) == "")
        got = server.generate("failsafe", text_input="Once", sampling_parameters={"max_tokens": 3})
        assert (got.error, len(got.token_ids)) == (None, 3)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    """Each test leaves it as it was, or it is started again."""
    with RunningServer(model_dir) as running:
        yield running


def unless_aborted(server: RunningServer, check: Callable[[RunningServer], None]) -> None:
    for _ in range(TRIES):
        if not server.is_well():
            server.triton.start_again()
        with contextlib.suppress(TritonAbortedError), alive(server):
            check(server)
            return
    pytest.fail(f"Triton aborted {TRIES} times")


def test_a_killed_failsafe_takes_nobody_along(server: RunningServer) -> None:
    unless_aborted(server, lambda server: check(server, "decoder", 16))


def test_a_killed_failsafe_takes_no_fallback_along(model_dir: Path, float32_fallback: Path) -> None:
    def check_fallback(server: RunningServer) -> None:
        assert server.triton.pid is not None
        child(stub_of(server, "decoder").pid, "tidewright.engine").send_signal(signal.SIGSTOP)
        check(server, "fallback", 4)

    options = {"fallback": str(float32_fallback), "heartbeat_timeout": 600.0}
    with RunningServer(model_dir, **options) as server:
        unless_aborted(server, check_fallback)


def test_more_streams_than_triton_has_threads(server: RunningServer) -> None:
    """Then nothing gets through any longer: it must be seen in time that the model is to be loaded again."""

    def check_many(server: RunningServer) -> None:
        with server.stream() as lost:
            begin(lost, "failsafe", 40)
            stub_of(server, "failsafe").kill()
            url = f"{server.triton.http_url}/v2/models/decoder/generate"

            def is_told() -> bool:
                try:
                    answer = httpx.post(url, json={"control": "health"}, timeout=2, trust_env=False)
                except httpx.ReadTimeout:
                    return True  # that is told too
                return STUCK in answer.text

            wait_for(is_told)
            for name in ("failsafe", "decoder"):
                reload(server, name)
            wait_for(lambda: health(server, "decoder") == "")

    unless_aborted(server, check_many)


def test_a_caller_that_is_only_stopped_gets_all(server: RunningServer) -> None:
    """What hung comes back: nothing is lost, and there is no trouble any more."""

    def check_stopped(server: RunningServer) -> None:
        with server.stream() as stream:
            sampling = {**LONG, "max_tokens": 300}
            stream.send("1", "failsafe", text_input="Once", stream=True, sampling_parameters=sampling)
            while len(stream.generations["1"].token_ids) < 3:
                stream.next()
            stub = stub_of(server, "failsafe")
            os.kill(stub.pid, signal.SIGSTOP)
            try:
                wait_for(lambda: health(server, "decoder").startswith(STUCK))
            finally:
                os.kill(stub.pid, signal.SIGCONT)
            got = stream.finish()["1"]
        assert (got.error, len(got.token_ids), got.ended) == (None, 300, 1)
        assert health(server, "decoder") == ""

    unless_aborted(server, check_stopped)


def test_a_control_question_of_a_dead_caller_blocks_nobody(server: RunningServer) -> None:
    """Failsafe asks for the status all the time; Triton's one thread that takes requests must not send the answer."""

    def check_questions(server: RunningServer) -> None:
        server.generate("failsafe", text_input="Once", sampling_parameters={"max_tokens": 1})  # it begins to ask
        failsafe = stub_of(server, "failsafe")
        os.kill(failsafe.pid, signal.SIGSTOP)  # so that a question may be open when it is killed
        time.sleep(0.3)
        failsafe.kill()
        psutil.wait_procs([failsafe], timeout=10)
        assert server.generate(text_input="Once", sampling_parameters={"max_tokens": 1}).error is None
        reload(server, "failsafe")
        got = server.generate("failsafe", text_input="Once", sampling_parameters={"max_tokens": 1})
        assert got.error is None

    unless_aborted(server, check_questions)
