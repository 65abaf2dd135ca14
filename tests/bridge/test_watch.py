"""What the bridge looks after by itself: deadlines without an engine, unloading, a drain, and its own threads."""

from __future__ import annotations

import time
from typing import Any

import pytest

from helpers.scripted import PATIENCE, Caller, World
from tidewright.bridge import bridge as module
from tidewright.bridge import canceller as canceller_module
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import EngineUnavailableError, TimedOutError
from tidewright.schema import DRAINING, STUCK


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lose_engine(world: World) -> None:
    world.engine.available, world.engine.cause = False, "killed by SIGKILL"
    world.engine.dies()


def test_timeouts_hold_while_no_engine_is_up(world: World) -> None:
    lose_engine(world)
    began = time.monotonic()
    plain, many = world.submit(timeout=0.3), world.submit(timeout=0.3, n=2, stream=True)
    patient = world.submit(timeout=60.0)
    for caller in (plain, many):
        assert caller.end() == []
        assert isinstance(caller.error, TimedOutError)
        assert str(caller.error) == "timed out after 0.3 s; the engine is not available (killed by SIGKILL)"
    assert time.monotonic() - began >= 0.3
    wait_for(lambda: world.bridge.active == 1)
    world.engine.available = True
    world.engine.comes_up()
    assert [message.request_id for message in world.engine.submitted()] == [4]  # what is over is not replayed
    world.engine.says(SequenceOutput(4, [5], "length"))
    assert patient.end()
    assert [caller.ends for caller in (plain, many, patient)] == [1, 1, 1]
    finished = world.bridge.request_stats.read_finished()
    assert (finished["timeout"], finished["length"]) == (2, 1)


def test_a_timeout_while_the_engine_restarts_keeps_the_tokens_that_came(world: World) -> None:
    caller = world.submit(timeout=0.5, stream=True)
    tokens = world.ids(" so far")
    world.engine.says(SequenceOutput(1, tokens))
    caller.wait(lambda caller: caller.responses)
    lose_engine(world)
    assert [delta.finish_reason for delta in caller.end()] == ["timeout"]
    assert "".join(delta.text for response in caller.responses for delta in response.deltas) == " so far"


def test_an_engine_that_does_not_end_a_request_in_time_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATE", 0.2)
    caller = world.submit(timeout=0.1)
    assert caller.end() == []
    assert str(caller.error) == "timed out after 0.1 s; the engine is busy"
    world.engine.says(SequenceOutput(1, [], "timeout"))  # late, and of one that it need not be told to abort
    world.wait_idle()
    assert (caller.ends, world.engine.aborted()) == (1, [])


def test_an_error_of_one_question_ends_no_other(world: World) -> None:
    class Broken(Caller):
        asked = 0

        def is_cancelled(self) -> bool:
            Broken.asked += 1
            raise RuntimeError("Triton says nothing")

    broken, hung_up = Broken(), Caller()
    world.submit_for(broken)
    world.submit_for(hung_up)
    wait_for(lambda: Broken.asked)
    hung_up.cancelled = True
    hung_up.end()
    world.engine.says(SequenceOutput(1, [5], "length"))
    assert broken.end()
    assert Broken.asked == 1
    assert world.bridge.trouble == ""


def test_an_unloaded_model_ends_what_it_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canceller_module, "LOADED_INTERVAL", 0.02)
    monkeypatch.setattr(module, "UNLOAD_GRACE", 0.3)
    loaded, asked = True, []

    def is_loaded() -> bool:
        asked.append(loaded)
        return loaded

    world.bridge._canceller._is_loaded = is_loaded
    world.bridge._canceller._ask_loaded_at = 0.0
    quick, slow = world.submit(), world.submit()
    wait_for(lambda: len(asked) > 2)
    loaded = False
    wait_for(lambda: world.bridge.trouble == DRAINING)
    with pytest.raises(EngineUnavailableError, match="the model is being unloaded; send the request to another"):
        world.submit()
    world.engine.says(SequenceOutput(1, [5], "length"))
    assert quick.end()
    slow.end()
    message = "the model is being unloaded, and 0.3 s (shutdown_grace) were not enough to finish"
    assert str(slow.error) == message


def test_a_triton_that_is_ending_is_not_asked_whether_the_model_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question can crash the stub then, with all its streams."""
    asked: list[bool] = []  # whether it was ending

    def ask() -> bool:
        asked.append(world.bridge._drain.has_begun)
        return True

    monkeypatch.setattr(canceller_module, "LOADED_INTERVAL", 0.0)
    world.bridge._ask_triton = ask
    request = world.submit(stream=True)
    wait_for(lambda: asked)
    world.bridge.drain()
    request.end()  # when the time for it is over
    assert sum(asked) <= 1  # one may have begun before


def test_a_triton_that_can_not_be_asked_whether_the_model_is_loaded(world: World) -> None:
    def is_loaded() -> bool:
        raise RuntimeError("no such function")

    world.bridge._canceller._is_loaded = is_loaded
    world.bridge._canceller._ask_loaded_at = 0.0
    caller = world.submit()
    wait_for(lambda: world.bridge._canceller._ask_loaded_at == float("inf"))
    caller.cancelled = True
    caller.end()
    assert world.bridge.trouble == ""


@pytest.mark.parametrize("name", ["sender", "feeder", "canceller", "watch", "engine client"])
def test_a_thread_that_has_ended_is_trouble(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bridge = world.bridge
    if name == "engine client":
        world.engine.alive = False
    elif name == "watch":
        monkeypatch.setattr(bridge._watch, "is_alive", lambda: False)
    else:
        owner = {"sender": bridge._in_flight.sender, "feeder": bridge._feeder, "canceller": bridge._canceller}[name]
        monkeypatch.setattr(owner._thread, "is_alive", lambda: False)
    assert bridge.trouble == f"{STUCK}the {name} thread has ended; see the log"


def test_an_error_while_it_looks_does_not_end_the_watch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look() -> None:
        looks.append(1)
        raise RuntimeError("no memory")

    monkeypatch.setattr(world.bridge._in_flight.sender, "watch", look)
    wait_for(lambda: len(looks) > 1)
    lose_engine(world)
    caller = world.submit(timeout=0.1)
    caller.end()
    assert isinstance(caller.error, TimedOutError)
