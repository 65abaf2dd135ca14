"""Circuit breaker: stops asking a model that fails, and finds out by one request at a time when it is back.

Libraries looked at: pybreaker, aiobreaker, circuitbreaker, purgatory, pyresilience (read their own clocks, or let all
callers through when half-open, or have no rate) and interlock-cb, the nearest: injected clock, rate, generations, one
probe; but it wraps functions instead of giving permits, never frees the slot of a lost probe, has no threshold of
consecutive failures, and needs Python 3.11.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from tidewright.resilience.outcome import Outcome, Verdict
from tidewright.resilience.window import FailureWindow

# Reports left to the thread that has the lock. Beyond, those who bring more wait, or it might never come to an end.
MAX_REPORTS = 1000


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


TRANSITIONS = (
    (State.CLOSED, State.OPEN),
    (State.OPEN, State.HALF_OPEN),
    (State.HALF_OPEN, State.CLOSED),
    (State.HALF_OPEN, State.OPEN),
)


@dataclass(frozen=True)
class BreakerConfig:
    """Times in seconds; what each means stands in `ResilienceSettings`."""

    consecutive_failures: int
    failure_rate: float
    window: float
    min_calls: int
    cool_down: float
    cool_down_factor: float
    cool_down_max: float
    probe_timeout: float
    probe_successes: int


class Permit:
    """Leave to make one call. It counts in the state that gave it, once."""

    __slots__ = ("generation", "is_probe", "reported")

    def __init__(self, generation: int, is_probe: bool) -> None:
        self.generation = generation
        self.is_probe = is_probe
        self.reported = False


@dataclass(frozen=True)
class Refusal:
    """Don't call. After `retry_after` seconds the answer can be another one."""

    retry_after: float


@dataclass(frozen=True)
class BreakerSnapshot:
    state: State
    generation: int  # number of transitions so far
    consecutive_failures: int
    window_calls: int
    window_failures: int
    cool_down: float  # of this opening, or of the next
    transitions: Mapping[tuple[State, State], int]


class _Gate(NamedTuple):
    """All that most decisions need, in one reference: replaced under the lock, read without it."""

    state: State
    generation: int
    # Unless it is closed, nobody passes between these two times: the cool-down, or the time of the probe in flight.
    since: float = -math.inf
    until: float = -math.inf


class CircuitBreaker:
    """`permit = acquire(now)`, make the call, `record(permit, outcome, now)`: also for a cancel or a client's error.

    Thread-safe by a lock inside, for which hardly anyone waits but who may become a probe: `acquire` reads the gate,
    and a `record` that finds the lock taken leaves its report to the thread that has it. (A thread that blocks on a
    lock among a thousand busy ones waits for all their turns at the interpreter, which is seconds.) An event loop can
    use the same object: with one thread every report counts at once.

    A probe may report SUCCESS at its first token, and should: until it reports, nobody else gets through.

    Clocks that step back do no harm: what began "in the future" begins anew now, so a wait is at most as long again.
    A cool-down that has passed shows as OPEN until the next `acquire`, for only a call can probe.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._reports: deque[tuple[Permit, Verdict, float]] = deque()
        self._gate = _Gate(State.CLOSED, 0)
        self._consecutive = 0
        self._window = FailureWindow(config.window)
        self._cool_down = config.cool_down
        self._probe: Permit | None = None
        self._probe_successes = 0
        self._transitions = dict.fromkeys(TRANSITIONS, 0)

    @property
    def state(self) -> State:
        return self._gate.state

    def acquire(self, now: float) -> Permit | Refusal:
        gate = self._gate
        if gate.state is State.CLOSED:
            return Permit(gate.generation, is_probe=False)
        if gate.since <= now < gate.until:
            return Refusal(gate.until - now)
        with self._lock:
            self._take_reports()
            decision = self._acquire_probe(now)
        self._settle()
        return decision

    def refuses(self, now: float) -> bool:
        """Whether `acquire` would refuse a call; it takes no permit."""
        gate = self._gate
        return gate.state is not State.CLOSED and gate.since <= now < gate.until

    def record(self, permit: Permit, outcome: Outcome, now: float) -> None:
        """Changes nothing if the permit is of an earlier state, has lost its slot to another probe, or is not new."""
        self._reports.append((permit, outcome.verdict, now))
        self._settle()

    def snapshot(self, now: float) -> BreakerSnapshot:
        with self._lock:
            self._take_reports()
            calls, failures = self._window.counts(now)
            snapshot = BreakerSnapshot(
                state=self._gate.state,
                generation=self._gate.generation,
                consecutive_failures=self._consecutive,
                window_calls=calls,
                window_failures=failures,
                cool_down=self._cool_down,
                transitions=MappingProxyType(self._transitions.copy()),
            )
        self._settle()
        return snapshot

    def _settle(self) -> None:
        """After each use of the lock: a report may have come too late for its holder, and too early to get the lock."""
        while self._reports and self._lock.acquire(blocking=len(self._reports) > MAX_REPORTS):
            try:
                self._take_reports()
            finally:
                self._lock.release()

    def _take_reports(self) -> None:
        while self._reports:
            permit, verdict, now = self._reports.popleft()
            if permit.reported or permit.generation != self._gate.generation:
                continue
            permit.reported = True
            if self._gate.state is State.CLOSED:
                self._record_call(verdict, now)
            elif permit is self._probe:
                self._record_probe(verdict, now)

    def _acquire_probe(self, now: float) -> Permit | Refusal:
        gate = self._gate  # another thread may have been here since
        if gate.state is State.CLOSED:
            return Permit(gate.generation, is_probe=False)
        if now < gate.since:
            gate = self._gate = gate._replace(since=now, until=now + (gate.until - gate.since))
        if now < gate.until:
            return Refusal(gate.until - now)
        if gate.state is State.OPEN:
            self._enter(State.HALF_OPEN)
            self._probe_successes = 0
        # A probe that is still in the slot is lost; should it report after all, it is not this one.
        self._gate = self._gate._replace(since=now, until=now + self._config.probe_timeout)
        self._probe = Permit(self._gate.generation, is_probe=True)
        return self._probe

    def _record_call(self, verdict: Verdict, now: float) -> None:
        if verdict is Verdict.IGNORED:
            return
        failed = verdict is Verdict.FAILURE
        self._window.add(failed, now)
        self._consecutive = self._consecutive + 1 if failed else 0
        if failed and self._too_many_failures(now):
            self._enter(State.OPEN, now, now + self._cool_down)

    def _record_probe(self, verdict: Verdict, now: float) -> None:
        self._probe = None
        if verdict is Verdict.FAILURE:
            self._cool_down = min(self._cool_down * self._config.cool_down_factor, self._config.cool_down_max)
            self._enter(State.OPEN, now, now + self._cool_down)
            return
        self._gate = self._gate._replace(since=-math.inf, until=-math.inf)
        if verdict is Verdict.SUCCESS:
            self._probe_successes += 1
            if self._probe_successes >= self._config.probe_successes:
                self._window.clear()
                self._consecutive = 0
                self._cool_down = self._config.cool_down
                self._enter(State.CLOSED)

    def _too_many_failures(self, now: float) -> bool:
        if self._consecutive >= self._config.consecutive_failures:
            return True
        calls, failures = self._window.counts(now)
        return calls >= self._config.min_calls and failures >= self._config.failure_rate * calls

    def _enter(self, state: State, since: float = -math.inf, until: float = -math.inf) -> None:
        self._transitions[self._gate.state, state] += 1
        self._gate = _Gate(state, self._gate.generation + 1, since, until)
