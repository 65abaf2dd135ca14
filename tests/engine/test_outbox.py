"""The engine's way out: steps go on while nobody reads, up to a bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tidewright.engine.messages import EngineStats, Heartbeat, SequenceOutput, StepOutputs, ToBridge
from tidewright.engine.outbox import Outbox

PATIENCE = 20.0  # seconds


class Wire:
    """A bridge that reads only while `reads` is set."""

    def __init__(self) -> None:
        self.reads = threading.Event()
        self.sending = threading.Event()
        self.sent: list[ToBridge] = []
        self.changed = threading.Condition()

    def send(self, message: ToBridge) -> None:
        self.sending.set()
        self.reads.wait()  # an error here would end this process: see engine/vital_thread.py
        with self.changed:
            self.sent.append(message)
            self.changed.notify_all()

    def wait(self, what: Callable[[list[ToBridge]], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what(self.sent), PATIENCE)

    def token_ids(self) -> list[int]:
        return [
            output.token_ids[0]
            for message in self.sent
            if isinstance(message, StepOutputs)
            for output in message.outputs
        ]


def stats(steps: int) -> EngineStats:
    return EngineStats(0, 0, 0, 0, steps, 0, 0, 0)


def output(number: int) -> SequenceOutput:
    return SequenceOutput(1, [number])


def stuck(limit: int) -> tuple[Outbox, Wire]:
    """An outbox amid a send that does not return."""
    wire = Wire()
    outbox = Outbox(wire.send, limit)
    outbox.start(PATIENCE, lambda: 0, print)
    outbox.put_outputs([output(0)])
    assert wire.sending.wait(PATIENCE)
    return outbox, wire


def test_what_gathers_while_nobody_reads_leaves_as_one_message_in_order() -> None:
    outbox, wire = stuck(limit=1000)
    for number in range(1, 500):
        outbox.put_outputs([output(number)])
    wire.reads.set()
    wire.wait(lambda sent: len(sent) == 2)
    assert wire.token_ids() == list(range(500))


def test_only_the_newest_heartbeat_is_kept_and_it_comes_after_the_outputs_before_it() -> None:
    outbox, wire = stuck(limit=1000)
    outbox.put_heartbeat(stats(1))
    outbox.put_outputs([output(1)])
    outbox.put_heartbeat(stats(2))
    wire.reads.set()
    wire.wait(lambda sent: len(sent) == 3)
    heartbeat = wire.sent[2]
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.stats.steps == 2
    outbox.put_heartbeat(stats(3))
    wire.wait(lambda sent: len(sent) == 4)
    assert wire.sent[3].stats.send_seconds > 0  # type: ignore[union-attr]


def test_beyond_the_limit_the_step_waits_and_goes_on_when_there_is_room() -> None:
    outbox, wire = stuck(limit=3)
    done = threading.Event()

    def step_five_times() -> None:
        for number in range(1, 6):
            outbox.put_outputs([output(number)])
        done.set()

    stepping = threading.Thread(target=step_five_times, daemon=True)
    stepping.start()
    assert not done.wait(0.2)
    wire.reads.set()
    assert done.wait(PATIENCE)
    wire.wait(lambda sent: len(wire.token_ids()) == 6)
    assert wire.token_ids() == list(range(6))


def test_a_long_step_is_told_from_a_stuck_one_by_its_progress() -> None:
    """The bridge takes an engine without heartbeats for dead; a prompt may well take longer to compute."""
    wire, layers = Wire(), 0
    wire.reads.set()
    outbox = Outbox(wire.send)
    outbox.start(0.01, lambda: layers, print)
    outbox.put_heartbeat(stats(7))
    wire.wait(lambda sent: len(sent) == 1)
    time.sleep(0.2)  # no progress
    assert len(wire.sent) == 1
    for count in (2, 3):
        layers += 1
        wire.wait(lambda sent, count=count: len(sent) == count)  # type: ignore[misc]
    assert [message.stats.steps for message in wire.sent] == [7, 7, 7]  # type: ignore[union-attr]
