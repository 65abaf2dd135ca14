"""A send that hangs: another thread takes over, the caller is given up in time, and one that comes back goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.scripted import PATIENCE, Caller, ScriptedEngine, World
from tidewright.bridge import bridge as bridge_module
from tidewright.bridge import sender as module
from tidewright.bridge.bridge import Bridge
from tidewright.bridge.response import Response
from tidewright.config import Settings
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import CancelledError, RequestError
from tidewright.schema import STUCK
from tidewright.tokenization import Tokenizer


class Blocking(Caller):
    """Its responses are not taken until `taken` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.taken = threading.Event(), threading.Event()

    def send(self, response: Response, final: bool) -> None:
        self.asked.set()
        self.taken.wait(PATIENCE)
        super().send(response, final)


class BlockingError(Blocking):
    def send(self, response: Response, final: bool) -> None:
        Caller.send(self, response, final)

    def fail(self, error: RequestError) -> None:
        self.asked.set()
        self.taken.wait(PATIENCE)
        super().fail(error)


@pytest.fixture
def world(model_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """With time for as many requests as Triton has threads."""
    monkeypatch.setattr(bridge_module, "EngineClient", ScriptedEngine)
    settings = Settings(max_running=60, max_waiting=20)
    bridge = Bridge(settings, settings.engine_config(model_dir), tokenizer)
    bridge.start()
    yield World(bridge, bridge._client, tokenizer)  # type: ignore[arg-type]
    bridge.stop()


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("hanging", [1, 16])
def test_a_send_that_hangs_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch, hanging: int) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.05)
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module, "GIVE_UP", 0.4)
    blocked = [Blocking() for _ in range(hanging)]
    for caller in blocked:
        world.submit_for(caller, stream=True)
    others = [world.submit(stream=True) for _ in range(3)]
    ids = range(1, hanging + 4)
    world.engine.says(*(SequenceOutput(number, [5]) for number in ids))
    for caller in others:
        caller.wait(lambda caller: caller.responses)
    world.engine.says(*(SequenceOutput(number, [6], "length") for number in ids))
    for caller in others:
        assert caller.end()
    wait_for(lambda: world.bridge.trouble.startswith(f"{STUCK}Triton has not taken {hanging} responses"))
    assert world.bridge.status.trouble.startswith(STUCK)
    wait_for(lambda: world.bridge.active == 0)
    assert [len(caller.responses) for caller in blocked] == [0] * hanging
    for caller in blocked:
        caller.taken.set()
    wait_for(lambda: not world.bridge.trouble)
    for caller in blocked:
        caller.wait(lambda caller: caller.ends)
        assert (caller.ends, len(caller.responses)) == (1, 1)
        assert isinstance(caller.error, CancelledError)
    finished = world.bridge.request_stats.read_finished()
    assert (finished["length"], finished["cancelled"]) == (3, hanging)
    assert world.submit()  # and all goes on


def test_what_is_given_up_leaves_the_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_UP", 0.3)
    caller = Blocking()
    world.submit_for(caller, stream=True, n=2)
    world.engine.says(SequenceOutput(1, [5]))
    wait_for(lambda: world.engine.aborted() == [1, 2])
    assert not world.bridge._in_flight.sequences
    caller.taken.set()


def test_a_send_that_comes_back_goes_on_in_order_and_by_one_thread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.05)
    caller = Blocking()
    world.submit_for(caller, stream=True)
    tokens = world.ids(" one two three four")
    world.engine.says(SequenceOutput(1, tokens[:1]))
    assert caller.asked.wait(PATIENCE)
    wait_for(lambda: world.bridge._in_flight.sender._blocked)
    for token in tokens[1:]:
        world.engine.says(SequenceOutput(1, [token]))
    other = world.submit()
    world.engine.says(SequenceOutput(2, [5], "length"))
    assert other.end()  # sent by another thread, which left the blocked one's alone
    assert caller.responses == []
    world.engine.says(SequenceOutput(1, [], "stop"))
    caller.taken.set()
    caller.end()
    assert [delta.token_ids for response in caller.responses for delta in response.deltas] == [tokens[:1], tokens[1:]]
    assert (caller.ends, world.bridge.trouble) == (1, "")
    world.wait_idle()
    assert world.bridge.request_stats.read_finished()["stop"] == 1


@pytest.mark.parametrize("kind", [Blocking, BlockingError])
def test_an_end_that_hangs_is_one_end(world: World, monkeypatch: pytest.MonkeyPatch, kind: type[Blocking]) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.05)
    monkeypatch.setattr(module, "GIVE_UP", 0.2)
    caller = kind()
    world.submit_for(caller)
    world.engine.says(SequenceOutput(1, [5], "length" if kind is Blocking else "invalid"))
    assert caller.asked.wait(PATIENCE)
    wait_for(lambda: world.bridge.active == 0)
    caller.taken.set()
    caller.wait(lambda caller: caller.ends)
    wait_for(lambda: not world.bridge._in_flight.sender._blocked)
    assert caller.ends == 1
    assert sum(world.bridge.request_stats.read_finished().values()) == 1


def test_more_hanging_sends_than_triton_has_threads_make_no_more_of_ours(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.01)
    monkeypatch.setattr(module, "MAX_BLOCKED", 4)
    monkeypatch.setattr(module, "GIVE_UP", 0.5)
    blocked = [Blocking() for _ in range(8)]
    for caller in blocked:
        world.submit_for(caller, stream=True)
    world.engine.says(*(SequenceOutput(number + 1, [5]) for number in range(8)))
    wait_for(lambda: sum(caller.asked.is_set() for caller in blocked) == 5)
    wait_for(lambda: world.bridge.active == 4)
    assert sum(thread.name == "sender" for thread in threading.enumerate()) >= 5
    assert sum(caller.asked.is_set() for caller in blocked) == 5
    for caller in blocked:
        caller.taken.set()
    world.engine.says(*(SequenceOutput(number + 1, [], "stop") for number in range(8)))
    for caller in blocked:
        caller.wait(lambda caller: caller.ends)
        assert caller.ends == 1


def test_an_answer_that_hangs_holds_up_no_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.05)
    asked, taken, times = threading.Event(), threading.Event(), []

    def send() -> None:
        times.append(1)
        asked.set()
        taken.wait(PATIENCE)

    world.bridge.reply(send)
    assert asked.wait(PATIENCE)
    caller = world.submit()
    world.engine.says(SequenceOutput(1, [5], "length"))
    assert caller.end()
    taken.set()
    wait_for(lambda: not world.bridge._in_flight.sender._blocked)
    done = threading.Event()
    world.bridge.reply(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    world.bridge.reply(done.set)
    assert done.wait(PATIENCE)
    assert times == [1]


def test_a_process_that_was_stopped_for_long_blames_nobody(world: World) -> None:
    caller = Blocking()
    world.submit_for(caller, stream=True)
    world.engine.says(SequenceOutput(1, [5]))
    assert caller.asked.wait(PATIENCE)
    sender = world.bridge._in_flight.sender
    sender._looked_at -= 1000  # since then, no look
    sender.watch()
    assert world.bridge.trouble == ""
    caller.taken.set()
    world.engine.says(SequenceOutput(1, [], "stop"))
    caller.end()
    assert caller.error is None


def test_a_thread_that_the_system_does_not_give_is_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELIEF", 0.05)
    tries = []

    def start(self: threading.Thread) -> None:
        tries.append(self)
        if len(tries) < 3:
            raise RuntimeError("can't start new thread")
        thread_start(self)

    thread_start = threading.Thread.start
    caller = Blocking()
    world.submit_for(caller, stream=True)
    monkeypatch.setattr(threading.Thread, "start", start)
    world.engine.says(SequenceOutput(1, [5]))
    assert caller.asked.wait(PATIENCE)
    other = world.submit()
    world.engine.says(SequenceOutput(2, [5], "length"))
    assert other.end()
    assert len(tries) == 3
    caller.taken.set()
