"""What is noted of a request while it runs: times, and a few words. Spans come of it only if the request is kept.

The memory of a record is bounded, however many generations, attempts or events its request has.
"""

from __future__ import annotations

import time
from typing import NamedTuple

MAX_ENTRIES = 64  # of each kind in a record
MAX_TIMINGS = 8192  # bytes of a replica's account of one attempt


class Phase(NamedTuple):
    """Times, here and below, are of time.monotonic()."""

    name: str
    began: float
    ended: float
    choice: int


class AttemptNote(NamedTuple):
    """One attempt of a generation at one replica."""

    span_id: str
    choice: int
    replica: str
    model: str
    began: float
    ended: float
    tokens_before: int
    tokens: int
    outcome: str
    timings: bytes | None
    """JSON of schema.Timings, from the replica."""


class Record:
    __slots__ = ("attempts", "events", "left_out", "open", "phases")
    is_kept = True
    """Spans may come of it."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.attempts: list[AttemptNote] = []
        self.events: list[tuple[str, float]] = []
        self.open: tuple[str, float] | None = None
        """The phase that the request is in, and since when. One that is still open at the end has failed."""
        self.left_out = 0

    def begin(self, name: str, began: float | None = None) -> None:
        self.open = (name, time.monotonic() if began is None else began)

    def end(self) -> None:
        """Of the phase that was begun."""
        if self.open:
            self.took(*self.open)
            self.open = None

    def took(self, name: str, began: float, choice: int = 0) -> None:
        """A phase of one generation, until now."""
        if len(self.phases) < MAX_ENTRIES:
            self.phases.append(Phase(name, began, time.monotonic(), choice))
        else:
            self.left_out += 1

    def event(self, name: str) -> None:
        if len(self.events) < MAX_ENTRIES:
            self.events.append((name, time.monotonic()))
        else:
            self.left_out += 1

    def tried(self, note: AttemptNote) -> None:
        if len(self.attempts) >= MAX_ENTRIES:
            self.left_out += 1
        elif note.timings and len(note.timings) > MAX_TIMINGS:
            self.attempts.append(note._replace(timings=None))
        else:
            self.attempts.append(note)


class _NoRecord(Record):
    """Notes nothing: no spans are exported, or none of such a request."""

    __slots__ = ()
    is_kept = False

    def begin(self, name: str, began: float | None = None) -> None:
        pass

    def end(self) -> None:
        pass

    def took(self, name: str, began: float, choice: int = 0) -> None:
        pass

    def event(self, name: str) -> None:
        pass

    def tried(self, note: AttemptNote) -> None:
        pass


NO_RECORD: Record = _NoRecord()
