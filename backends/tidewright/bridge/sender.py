"""Sends answers, one after the other, and lets none that Triton does not take hold up the others.

Triton 2.51 never returns from a send to a model whose process was killed while it waited for the response. The blocked
thread holds neither Python's lock nor one of Triton's, but it keeps one of the 32 threads that Triton has for all sends
of this process. So another thread takes over after RELIEF. After PATIENCE `stuck` says that this process must be
replaced, which alone gives Triton its threads back, and after GIVE_UP the caller is given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from tidewright.bridge.outgoing import Job, Outgoing

log = logging.getLogger(__name__)

# Seconds in one send.
RELIEF = 0.25
PATIENCE = 3.0
GIVE_UP = 10.0
MAX_BLOCKED = 32  # as many as Triton has threads: one more of ours would block too
LONGEST_TICK = 0.5  # seconds between two looks that count; a process that was stopped for longer blames nobody


class _Turn:
    """What one thread has to send. `Sender._changed` guards it."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.job: Job | None = None  # being sent
        self.since = 0.0  # on the sender's clock
        self.relieved = False  # another thread has taken over
        self.given_up = False


class Sender:
    """`changed` guards `outgoing` and all of this.

    `send` must not raise. `give_up` is called once for a job that hangs, and `released`, with `changed` held, for one
    that took long and came back.
    """

    def __init__(
        self,
        changed: threading.Condition,
        outgoing: Outgoing,
        send: Callable[[Job], None],
        give_up: Callable[[Job], None],
        released: Callable[[Job], None],
    ) -> None:
        self._changed, self._outgoing = changed, outgoing
        self._send, self._give_up, self._released = send, give_up, released
        self._clock, self._looked_at = 0.0, time.monotonic()  # the clock moves with each look
        self._blocked: dict[Job, _Turn] = {}  # of relieved threads
        self._turn = _Turn()
        self._thread = self._make_thread(self._turn)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Sends what waits. Blocked threads end with the process."""
        with self._changed:
            self._outgoing.stop()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stuck(self) -> tuple[int, float]:
        """How many sends hang, and for how many seconds the longest does."""
        with self._changed:
            waits = [self._clock - turn.since for turn in self._blocked.values()]
        hanging = [wait for wait in waits if wait > PATIENCE]
        return len(hanging), max(hanging, default=0.0)

    def add(self, job: Job, urgent: bool) -> None:
        """With `changed` held. A job that a blocked thread has must wait until it is `released`."""
        if job not in self._blocked:
            self._outgoing.add(job, urgent)

    def watch(self) -> None:
        """Looks after the threads; to be called several times a second."""
        with self._changed:
            now = time.monotonic()
            self._clock += min(now - self._looked_at, LONGEST_TICK)
            self._looked_at = now
            if self._turn.job and self._waits(self._turn, RELIEF) and len(self._blocked) < MAX_BLOCKED:
                self._relieve(self._turn, self._turn.job)
            lost = [job for job, turn in self._blocked.items() if not turn.given_up and self._waits(turn, GIVE_UP)]
            for job in lost:
                self._blocked[job].given_up = True
        for job in lost:
            log.error("Triton has not taken a response for %g s; its caller is given up", GIVE_UP)
            self._give_up(job)

    def _waits(self, turn: _Turn, seconds: float) -> bool:
        return self._clock - turn.since > seconds

    def _make_thread(self, turn: _Turn) -> threading.Thread:
        return threading.Thread(target=self._loop, args=(turn,), name="sender", daemon=True)

    def _relieve(self, turn: _Turn, job: Job) -> None:
        successor = _Turn()
        thread = self._make_thread(successor)
        thread.start()  # if the system has none to give, all stays as it is
        self._turn, self._thread = successor, thread
        turn.relieved = True
        self._blocked[job] = turn
        self._outgoing.discard(job)
        for waiting in turn.jobs:
            self._outgoing.add(waiting, urgent=True)
        turn.jobs.clear()

    def _loop(self, turn: _Turn) -> None:
        while not turn.relieved:
            with self._changed:
                turn.jobs.extend(self._outgoing.take())
            if not turn.jobs:
                return
            began = time.monotonic()
            while job := self._next(turn):
                self._send(job)
            if not turn.relieved:
                self._outgoing.sent(time.monotonic() - began)

    def _next(self, turn: _Turn) -> Job | None:
        with self._changed:
            if turn.relieved and turn.job:
                del self._blocked[turn.job]
                self._released(turn.job)
            turn.job, turn.since = turn.jobs.popleft() if turn.jobs else None, self._clock
            return turn.job
