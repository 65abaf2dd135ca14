"""A request that can't be handed to the engine ends alone: those behind it go on, and are replayed when it dies."""

from __future__ import annotations

import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.test_feeder import Simulation
from helpers.scripted import World
from tidewright.bridge.feeder import Feeder
from tidewright.engine.messages import SequenceOutput, Submit, ToEngine, encode
from tidewright.errors import EngineUnavailableError, InvalidRequestError, RequestError


class Picky(Simulation):
    """Some sequences can't be sent to its engine."""

    def __init__(self, lengths: list[int], unfit: set[int]) -> None:
        super().__init__(lengths, set())
        self.unfit = unfit

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Submit) and message.request_id in self.unfit:
            raise OverflowError("can't serialize ints >= 2**64")
        if isinstance(message, Submit) or message.request_id in self.running:  # type: ignore[union-attr]
            super().send(message)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_those_that_fit_are_all_given_to_every_engine(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    unfit = data.draw(st.sets(st.integers(0, count - 1)))
    picky = Picky([3] * count, unfit)
    submitted: set[int] = set()
    up = False
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(("submit", "up", "die", "drop")))
        if action == "submit" and len(submitted) < count:
            number = len(submitted)
            submitted.add(number)
            picky.submit(number)
        elif action == "up" and not up:
            up = True
            for sequence in picky.sequences:
                sequence.deaths = 0  # none is a suspect here
            picky.comes_up()
        elif action == "die" and up:
            up = False
            picky.dies()
        elif action == "drop":
            for number in set(picky.given_up):  # as the bridge does with what ended
                picky.feeder.drop(picky.sequences[number])
            picky.read_notes()
        if up:
            assert set(picky.running) == submitted - unfit
        assert set(picky.given_up) <= unfit
    if not up:
        picky.comes_up()
        assert set(picky.running) == submitted - unfit
    assert set(picky.given_up) == submitted & unfit


def test_one_that_can_not_be_encoded_ends_with_the_reason_and_the_others_are_replayed(world: World) -> None:
    world.engine.on_send = encode  # type: ignore[assignment]
    before, unfit, after = world.submit(), world.submit(top_k=2**64), world.submit()
    assert unfit.end() == []
    assert isinstance(unfit.error, InvalidRequestError)
    assert "can't be handed to the engine" in str(unfit.error)
    world.engine.dies()
    late = world.submit()
    world.engine.comes_up()
    assert [message.request_id for message in world.engine.submitted()] == [1, 3, 4]
    for number, caller in ((1, before), (3, after), (4, late)):
        world.engine.says(SequenceOutput(number, [5], "length"))
        assert caller.end()
    assert world.bridge.request_stats.read_finished()["invalid"] == 1


def test_one_that_can_not_be_encoded_while_no_engine_is_up(world: World) -> None:
    world.engine.on_send = encode  # type: ignore[assignment]
    world.engine.dies()
    unfit, other = world.submit(top_k=2**64), world.submit()
    world.engine.comes_up()
    unfit.end()
    assert [message.request_id for message in world.engine.submitted()] == [2]
    world.engine.says(SequenceOutput(2, [5], "length"))
    assert other.end()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OverflowError("too big"), "invalid"),
        (msgspec.ValidationError("no"), "invalid"),
        (RecursionError("deep"), "invalid"),
        (MemoryError(), "engine_failed"),
        (RuntimeError("who knows"), "engine_failed"),
    ],
)
def test_the_reason_says_whose_fault_it_is(world: World, error: Exception, reason: str) -> None:
    def fail(message: ToEngine) -> None:
        if isinstance(message, Submit):
            raise error

    world.engine.on_send = fail
    caller = world.submit()
    caller.end()
    assert caller.error is not None
    assert caller.error.reason == reason
    world.engine.on_send = lambda message: None
    assert world.submit()
    assert [message.request_id for message in world.engine.submitted()] == [2]


def test_an_error_of_any_note_stops_neither_the_thread_nor_the_next_note() -> None:
    def give_up(sequence: object, error: RequestError) -> None:
        raise RuntimeError("the bridge is confused")

    sent: list[ToEngine] = []
    feeder = Feeder(sent.append, give_up)
    feeder.start()
    feeder._notes.put(lambda: 1 / 0)  # type: ignore[arg-type,return-value]

    def gone() -> None:
        raise EngineUnavailableError("it just died")

    feeder._notes.put(gone)
    read = threading.Event()
    feeder._notes.put(read.set)
    assert read.wait(20)
    assert feeder.alive
    feeder.stop(20)
    assert not feeder.alive
