"""Requests that wait to be read: each ends once, whether it is taken, cancelled, refused, or the server ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.requests import tensors
from tidewright.bridge import intake
from tidewright.bridge.intake import QUICK_BYTES, THREADS, Arrival, Intake
from tidewright.errors import CancelledError, EngineUnavailableError, OverloadedError, RequestError
from tidewright.schema import ATTEMPT

PATIENCE = 20.0  # seconds


class World:
    """An intake whose work waits until the test lets it go on."""

    def __init__(self, limit: int = 10) -> None:
        self.taken: list[str] = []
        self.refused: dict[str, RequestError] = {}
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.changed = threading.Condition()
        self.intake = Intake(self._take, self._refuse, limit)
        self.intake.start()

    def _take(self, arrival: Arrival) -> None:
        self.begun.release()
        assert self.go_on.wait(PATIENCE)
        if arrival.client_id == "broken":
            raise ValueError("broken")
        with self.changed:
            self.taken.append(f"{arrival.client_id}{' cancelled' * arrival.cancelled}")
            self.changed.notify_all()

    def _refuse(self, arrival: Arrival, error: RequestError) -> None:
        self.refused[arrival.client_id] = error

    def put(self, *client_ids: str, **values: Any) -> None:
        for client_id in client_ids:
            self.intake.put(Arrival(tensors(**values or {"text_input": "a"}), "", client_id, None))

    def fill_threads(self) -> None:
        self.put(*(f"first {number}" for number in range(THREADS)))
        for _ in range(THREADS):
            assert self.begun.acquire(timeout=PATIENCE)

    def wait(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.taken) >= number, PATIENCE)


@pytest.fixture
def it() -> Iterator[World]:
    world = World()
    yield world
    world.go_on.set()
    world.intake.stop()


def test_several_are_read_at_once_and_a_broken_one_stops_nobody(it: World) -> None:
    it.fill_threads()
    it.put("broken", "broken", "last")
    assert it.intake.active == THREADS + 3
    it.go_on.set()
    it.wait(THREADS + 1)
    assert "last" in it.taken


def test_as_many_may_wait_as_its_limit(it: World) -> None:
    it.fill_threads()
    it.put(*map(str, range(10)))
    with pytest.raises(OverloadedError, match="10 requests with 10 bytes wait to be read"):
        it.put("one more")


def test_so_many_bytes_may_wait(it: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_QUEUED_BYTES", 100)
    it.fill_threads()
    it.put("a", text_input="x" * 60)
    it.put("b", input_ids=[1] * 10)
    with pytest.raises(OverloadedError, match="2 requests with 100 bytes"):
        it.put("c", text_input="x")
    assert it.intake.cancel("a") == 1
    it.put("c", text_input="x" * 60)
    it.go_on.set()
    it.wait(THREADS + 2)
    it.put("d", text_input="x" * 100)


def test_a_cancel_ends_those_that_wait_and_marks_those_in_work(it: World) -> None:
    it.fill_threads()
    it.put("a", f"a{ATTEMPT}1", f"a{ATTEMPT}2", "b")
    assert it.intake.cancel(f"a{ATTEMPT}2") == 1
    assert it.intake.cancel("a") == 2
    assert it.intake.cancel("a") == 0
    assert it.intake.cancel("first 0") == 1
    assert {type(error) for error in it.refused.values()} == {CancelledError}
    it.go_on.set()
    it.wait(THREADS + 1)
    assert sorted(it.taken) == ["b", "first 0 cancelled", *(f"first {number}" for number in range(1, THREADS))]


def test_when_it_stops_what_waits_is_refused_and_what_is_in_work_ends() -> None:
    world = World()
    world.fill_threads()
    world.put("waits")
    threading.Timer(0.05, world.go_on.set).start()
    world.intake.stop()
    assert len(world.taken) == THREADS
    assert isinstance(world.refused["waits"], EngineUnavailableError)
    with pytest.raises(EngineUnavailableError):
        world.put("late")
    assert world.intake.active == 0


@pytest.mark.parametrize(
    ("values", "parameters", "quick"),
    [
        ({"text_input": "x" * QUICK_BYTES}, "", True),
        ({"text_input": "x" * (QUICK_BYTES + 1)}, "", False),
        ({"text_input": "x" * (QUICK_BYTES - 2)}, "{}", True),
        ({"text_input": "x" * (QUICK_BYTES - 1)}, "{}", False),
        ({"input_ids": [1] * (QUICK_BYTES // 4)}, "", True),
        ({"input_ids": [1] * (QUICK_BYTES // 4 + 1)}, "", False),
        ({"text_input": "guided_regex"}, "", True),
        ({"text_input": "a", "sampling_parameters": {"guided_regex": "a"}}, "", False),
        ({"text_input": "a", "sampling_parameters": {"structured_outputs": {}}}, "", False),
        ({"text_input": "a"}, '{"guided_regex": "a"}', False),
        ({"text_input": "a", "sampling_parameters": {"top_k": 1}}, "", True),
    ],
)
def test_what_is_quick(values: dict[str, Any], parameters: str, quick: bool) -> None:
    assert Arrival(tensors(**values), parameters, "", None).is_quick == quick
