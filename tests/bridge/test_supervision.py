"""The engine client before an engine of the test's own making: its supervision survives everything, and says it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tidewright.bridge import engine_client as module
from tidewright.bridge import engine_process
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.bridge.engine_process import EngineStartError
from tidewright.engine.messages import EngineConfig, Ready, SequenceOutput, Submit
from tidewright.errors import EngineUnavailableError
from tidewright.schema import SamplingParams

PATIENCE = 30.0  # seconds

# Speaks as the engine does, without torch. What it is asked for beside that stands in the prompt.
_ENGINE = f"""#!{sys.executable}
import os, sys, threading, time
from multiprocessing.connection import Connection
from tidewright.engine.messages import *
connection = Connection(int(sys.argv[3]))
say = lambda message: connection.send_bytes(encode(message))
for _ in range(2):
    decode_to_engine(connection.recv_bytes())
say(Ready(os.getpid(), "cpu", "float32", 16, 100, 1000, 64, 0.1))
beats = True
def beat():
    while True:
        if beats:
            say(Heartbeat(EngineStats(0, 0, 0, 0, 0, 0, 0, 0)))
        time.sleep(0.05)
threading.Thread(target=beat, daemon=True).start()
while True:
    message = decode_to_engine(connection.recv_bytes())
    if isinstance(message, Shutdown):
        sys.exit()
    word = message.prompt_token_ids[0]
    if word == 1:
        say(StepOutputs([SequenceOutput(message.request_id, [5])]))
    elif word == 2:
        connection.send_bytes(b"\\xc1")
    elif word == 3:
        beats = False
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            pass
        beats = True
    elif word >= 4:
        say(Failed("a step of 600 tokens", 300 if word == 4 else 2))
"""
ANSWER, GARBAGE, WORK, LACK, LACK_AGAIN = 1, 2, 3, 4, 5


class Heard:
    """What the client reports; and raises `error` each time, if there is one."""

    def __init__(self) -> None:
        self.ups: list[Ready] = []
        self.outputs: list[SequenceOutput] = []
        self.causes: list[str] = []
        self.out_of_memory: list[str] = []
        self.error: Exception | None = None

    def note(self, kept: list[Any]) -> Callable[[Any], None]:
        def event(what: Any) -> None:
            kept.extend(what if isinstance(what, list) else [what])
            if self.error:
                raise self.error

        return event

    @property
    def events(self) -> EngineEvents:
        kept = self.outputs, [], self.ups, self.causes, self.out_of_memory
        return EngineEvents(*map(self.note, kept))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "python3"
    script.write_text(_ENGINE)
    script.chmod(0o755)
    monkeypatch.setattr(engine_process, "_python", lambda: str(script))
    monkeypatch.setattr(engine_process, "STANDBY_DELAY", 0.1)
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.05)
    return script


@contextmanager
def started(**changes: Any) -> Iterator[tuple[EngineClient, Heard]]:
    heard = Heard()
    config = EngineConfig(model_dir="", **{"heartbeat_interval": 0.05, "standby": False, **changes})
    client = EngineClient(config, heard.events, start_timeout=PATIENCE, heartbeat_timeout=PATIENCE)
    client.start()
    try:
        yield client, heard
    finally:
        client.stop()
        assert not client.alive


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(client: EngineClient, word: int) -> None:
    client.send(Submit(1, [word], SamplingParams()))


class Popen(subprocess.Popen[bytes]):
    """Fails where the test wants it to."""

    errors: list[OSError]
    starts: int

    def __init__(self, *args: Any, **options: Any) -> None:
        Popen.starts += 1
        if Popen.errors:
            raise Popen.errors.pop()
        super().__init__(*args, **options)


@pytest.fixture
def popen(monkeypatch: pytest.MonkeyPatch) -> type[Popen]:
    Popen.errors, Popen.starts = [], 0
    monkeypatch.setattr(subprocess, "Popen", Popen)
    return Popen


NO_MORE = [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EAGAIN, errno.ENOMEM)]


@pytest.mark.parametrize("error", NO_MORE, ids=lambda error: errno.errorcode[error.errno])
def test_a_standby_that_can_not_be_started_costs_nothing(
    engine: Path, popen: type[Popen], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(engine_process, "STANDBY_RETRY", 0.3)
    with started(standby=True) as (client, heard):
        popen.errors = [error, error]
        wait_for(lambda: popen.starts > 3)  # tried again until it works
        ask(client, ANSWER)
        wait_for(lambda: heard.outputs)
        assert (client.available, client.trouble, client.restarts, heard.causes) == (True, "", 0, [])
        wait_for(lambda: client._standby.process)
        standby = client._standby.process
        assert standby
        os.kill(standby.pid, signal.SIGKILL)  # another takes its place
        wait_for(lambda: client._standby.process not in (None, standby))
        os.kill(heard.ups[0].pid, signal.SIGKILL)
        wait_for(lambda: len(heard.ups) == 2)


def test_a_first_start_without_python_fails(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise EngineStartError("no python3 found")

    monkeypatch.setattr(engine_process, "_python", nowhere)
    with pytest.raises(EngineStartError, match="no python3 found"), started():
        pass


def test_a_first_start_without_a_process_fails(engine: Path, popen: type[Popen]) -> None:
    popen.errors = [NO_MORE[0]]
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineStartError, match=r"process could not be started: .* Too many open files"), started():
        pass
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_restart_is_tried_until_there_is_a_process(engine: Path, popen: type[Popen]) -> None:
    with started() as (client, heard):
        popen.errors = [NO_MORE[1], NO_MORE[2]]
        os.kill(heard.ups[0].pid, signal.SIGKILL)
        wait_for(lambda: len(heard.ups) == 2)
        assert heard.causes[0] == "killed by SIGKILL"
        assert [cause.rpartition(": ")[0] for cause in heard.causes[1:]] == [
            "the engine's process could not be started"
        ] * 2
        assert client.restarts == 3
        ask(client, ANSWER)
        wait_for(lambda: heard.outputs)


def test_the_next_engine_waits_longer_only_if_the_one_before_had_answered_nothing(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else requests that kill engines now and then would make those of others wait longer and longer."""
    with started() as (client, heard):
        for number, word in enumerate((GARBAGE, GARBAGE, ANSWER, GARBAGE, ANSWER, GARBAGE, GARBAGE)):
            wait_for(lambda number=number: len(heard.ups) + len(heard.outputs) > number)  # type: ignore[misc]
            wait_for(lambda: client.available)
            ask(client, word)
        wait_for(lambda: len(heard.ups) == 6)
    found = [float(text) for text in re.findall(r"starting it again in ([\d.]+) s", caplog.text)]
    assert found == [0.1, 0.2, 0.1, 0.1, 0.2]


def test_an_error_of_the_listener_ends_nothing(engine: Path) -> None:
    with started() as (client, heard):
        heard.error = RuntimeError("the listener is confused")
        for count in (1, 2):
            ask(client, ANSWER)
            wait_for(lambda: len(heard.outputs) == count)  # noqa: B023
        os.kill(heard.ups[0].pid, signal.SIGKILL)
        wait_for(lambda: len(heard.ups) == 2)
        ask(client, ANSWER)
        wait_for(lambda: len(heard.outputs) == 3)
        assert heard.causes == ["killed by SIGKILL"]


def test_an_engine_that_says_what_nobody_can_read_is_replaced(engine: Path) -> None:
    with started() as (client, heard):
        ask(client, GARBAGE)
        wait_for(lambda: len(heard.ups) == 2)
        assert heard.causes[0].startswith("DecodeError: ")
        assert not psutil.pid_exists(heard.ups[0].pid)


def test_one_that_is_silent_and_idle_is_in_trouble_until_it_goes_on(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET", 0.5)
    with started() as (client, heard):
        assert client.trouble == ""
        os.kill(heard.ups[0].pid, signal.SIGSTOP)
        wait_for(lambda: client.trouble)
        assert client.trouble.startswith("the engine has said and computed nothing for ")
        assert client.available  # its requests wait: it may go on
        os.kill(heard.ups[0].pid, signal.SIGCONT)
        wait_for(lambda: not client.trouble)
        assert (client.restarts, heard.causes) == (0, [])


def test_one_that_is_silent_and_computes_is_well(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET", 0.5)
    with started() as (client, heard):
        ask(client, WORK)
        ask(client, ANSWER)  # taken up behind it
        troubles = set()
        longest = 0.0
        while not heard.outputs:
            longest = max(longest, time.monotonic() - client._heard_at)
            troubles.add(client.trouble)
            time.sleep(0.01)
        assert troubles == {""}
        assert longest > 1.0  # it was silent indeed


def test_one_that_hangs_is_ended_at_the_end(engine: Path) -> None:
    """Also while another thread waits in a send to it, with the lock held."""
    with started() as (client, heard):
        os.kill(heard.ups[0].pid, signal.SIGSTOP)

        def send() -> None:
            with contextlib.suppress(EngineUnavailableError):
                while True:
                    client.send(Submit(1, [ANSWER] * 100_000, SamplingParams()))

        sending = threading.Thread(target=send)
        sending.start()
        wait_for(client._send_lock.locked)
    sending.join(PATIENCE)
    assert not sending.is_alive()
    assert not psutil.pid_exists(heard.ups[0].pid)


def configured(client: EngineClient) -> EngineConfig:
    """What the next process is told."""
    return client._config


def test_later_engines_get_the_blocks_that_the_first_counted(engine: Path) -> None:
    with started() as (client, heard):
        assert client._kept.num_blocks == 100
        engine.write_text(_ENGINE.replace("16, 100,", "16, 60,"))  # one that has less
        os.kill(heard.ups[0].pid, signal.SIGKILL)
        wait_for(lambda: len(heard.ups) == 2)
        assert heard.ups[1].num_blocks == 60
        assert client._kept.num_blocks == 100  # so that the next tries again


def test_an_engine_that_lacks_memory_is_followed_by_one_with_smaller_steps(engine: Path) -> None:
    with started(standby=True, max_batched_tokens=2048) as (client, heard):
        wait_for(lambda: client._standby.process)
        assert client._standby.process
        told_otherwise = client._standby.process.pid
        ask(client, LACK)
        wait_for(lambda: len(heard.ups) == 2)
        assert (heard.out_of_memory, heard.causes) == (["a step of 600 tokens"], [])
        assert configured(client).max_batched_tokens == 300
        assert heard.ups[1].pid != told_otherwise
        ask(client, LACK_AGAIN)
        wait_for(lambda: len(heard.ups) == 3)
        assert configured(client).max_batched_tokens == module.LEAST_STEP
        assert (len(heard.out_of_memory), heard.causes) == (2, [])
        ask(client, LACK_AGAIN)  # there are no smaller steps: now it may be a request
        wait_for(lambda: len(heard.ups) == 4)
        assert configured(client).max_batched_tokens == module.LEAST_STEP
        assert (len(heard.out_of_memory), heard.causes) == (2, ["a step of 600 tokens"])
