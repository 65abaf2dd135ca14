"""outgoing.py with a clock that moves only while someone waits: who is answered at once, and who waits how long."""

from __future__ import annotations

import os
import threading
from typing import cast

import pytest

from helpers.scripted import World
from tidewright.bridge import outgoing as module
from tidewright.bridge.active_request import ActiveRequest
from tidewright.bridge.outgoing import LONGEST_WAIT, Outgoing
from tidewright.engine.messages import Ready, SequenceOutput


class Clock:
    """Stands for the `time` module and for the condition that `Outgoing` waits on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.happens: list[tuple[float, object]] = []  # (time, what is called then)

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None) -> None:
        end = float("inf") if timeout is None else self.now + timeout
        if self.happens and self.happens[0][0] < end:
            self.now, action = self.happens.pop(0)
            action()  # type: ignore[operator]
        else:
            assert timeout is not None, "waits for good"
            self.now = end

    def notify_all(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def outgoing(clock: Clock) -> Outgoing:
    made = Outgoing(cast(threading.Condition, clock))
    made.share = 0.1
    return made


A, B, C = cast("list[ActiveRequest]", ["A", "B", "C"])


def test_the_first_round_does_not_wait(outgoing: Outgoing, clock: Clock) -> None:
    outgoing.add(A, urgent=False)
    outgoing.add(B, urgent=False)
    assert outgoing.take() == [A, B]
    assert clock.now == 100


def test_sending_takes_its_share_of_the_time(outgoing: Outgoing, clock: Clock) -> None:
    for _ in range(10):
        outgoing.add(A, urgent=False)
        assert outgoing.take() == [A]
        clock.now += 0.002
        outgoing.sent(0.002)
    assert clock.now == pytest.approx(100 + 10 * 0.002 + 9 * 0.018)


def test_what_comes_between_two_rounds_leaves_with_the_next(outgoing: Outgoing, clock: Clock) -> None:
    outgoing.sent(0.002)
    clock.happens = [(100.005, lambda: outgoing.add(B, urgent=False)), (100.006, lambda: outgoing.add(A, urgent=False))]
    outgoing.add(A, urgent=False)
    assert outgoing.take() == [A, B]
    assert clock.now == pytest.approx(100.018)


def test_what_is_urgent_does_not_wait_and_takes_nobody_along(outgoing: Outgoing, clock: Clock) -> None:
    outgoing.sent(0.002)
    outgoing.add(A, urgent=False)
    outgoing.add(B, urgent=True)
    assert outgoing.take() == [B]
    clock.happens = [(100.005, lambda: outgoing.add(C, urgent=True))]
    assert outgoing.take() == [C]
    assert clock.now == 100.005
    assert outgoing.take() == [A]
    assert clock.now == pytest.approx(100.018)


def test_a_call_that_becomes_urgent_is_answered_once(outgoing: Outgoing) -> None:
    outgoing.sent(0.002)
    outgoing.add(A, urgent=False)
    outgoing.add(A, urgent=True)
    outgoing.add(A, urgent=False)
    outgoing.add(B, urgent=False)
    assert outgoing.take() == [A]
    assert outgoing.take() == [B]


def test_who_has_ended_is_not_answered(outgoing: Outgoing) -> None:
    for request, urgent in ((A, False), (B, True), (C, False)):
        outgoing.add(request, urgent)
    outgoing.discard(A)
    outgoing.discard(B)
    assert outgoing.take() == [C]


def test_no_wait_is_longer_than_the_limit(outgoing: Outgoing, clock: Clock) -> None:
    outgoing.sent(5.0)
    outgoing.add(A, urgent=False)
    outgoing.take()
    assert clock.now == pytest.approx(100 + LONGEST_WAIT)


@pytest.mark.parametrize("share", [1.0, 3.2])
def test_with_cores_to_spare_nobody_waits(outgoing: Outgoing, clock: Clock, share: float) -> None:
    outgoing.share = share
    outgoing.sent(5.0)
    outgoing.add(A, urgent=False)
    assert outgoing.take() == [A]
    assert clock.now == 100


def test_at_the_end_all_is_given_out(outgoing: Outgoing, clock: Clock) -> None:
    outgoing.sent(5.0)
    outgoing.add(A, urgent=False)
    outgoing.add(B, urgent=True)
    outgoing.stop()
    assert outgoing.take() == [B, A]
    assert outgoing.take() == []
    assert clock.now == 100


def test_first_tokens_and_ends_do_not_wait_for_a_round(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", 3600.0)
    world.bridge._in_flight.outgoing.share = 1e-9  # no second round comes
    begin, middle, end = world.ids(" a"), world.ids(" b"), world.ids(" c")
    one, other = world.submit(stream=True), world.submit(stream=True, client_id="other")
    for number, caller in ((1, one), (2, other)):
        world.engine.says(SequenceOutput(number, begin))
        caller.wait(lambda caller: caller.responses)
    world.engine.says(SequenceOutput(1, middle), SequenceOutput(2, middle))
    world.engine.says(SequenceOutput(1, end, "length"))
    assert [delta.token_ids for delta in one.end()] == [middle + end]
    assert world.bridge.cancel("other") == 1
    assert other.end() == []
    assert [len(caller.responses) for caller in (one, other)] == [2, 1]


@pytest.mark.parametrize(("device", "per_core"), [("cpu", 0.1), ("cuda:0", None)])
def test_a_model_on_a_gpu_is_not_spared(world: World, device: str, per_core: float | None) -> None:
    world.engine.events.up(Ready(1, device, "float32", 16, 100, 1000, 49152, 0.1))
    wanted = 1.0 if per_core is None else per_core * len(os.sched_getaffinity(0))
    assert world.bridge._in_flight.outgoing.share == pytest.approx(wanted)
