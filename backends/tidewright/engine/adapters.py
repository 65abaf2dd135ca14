"""The LoRA adapters of an engine, on rank 0: read beside the steps, kept within a budget, gone when nobody has them.

All ranks read an adapter, and the engine takes it only if all could. Then it enters the scheduler between two steps, as
an input like any other. The least recently used adapters without requests give way when the host's budget is full; they
stay loaded for the bridge, and are read again when a request wants them, which waits meanwhile. If there is no room, as
requests have all the others, it waits until there is: only a first load is refused for that.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tidewright.distributed.rank_messages import AdapterRead
from tidewright.engine.messages import AdapterChanged, LoadAdapter, SequenceOutput, Submit, UnloadAdapter
from tidewright.kv_cache.budget import mib
from tidewright.schema import NO_ADAPTER

log = logging.getLogger(__name__)

READ_AHEAD = 2  # adapters that are read, or wait to be entered between two steps: beside the budget, on each rank


@dataclass
class _Known:
    """One that the bridge wants loaded."""

    path: str
    digest: str = ""  # of its files when they were first read, by whichever engine; empty: not yet
    rank: int = 0
    bytes: int = 0  # on all ranks
    is_told: bool = False  # the bridge knows that this engine has it
    is_resident: bool = False  # in the host's memory
    is_read: bool = False  # just now, by all ranks, or soon
    held: list[Submit] = field(default_factory=list)  # requests that wait for it


class Outcome(NamedTuple):
    """`requests` waited for the adapter, and the engine takes them now; `refused` end."""

    changed: AdapterChanged | None
    requests: list[Submit]
    refused: list[SequenceOutput]


class Host(Protocol):
    """Where adapters are read to, come into use, and go from: the engine, and all its ranks."""

    def read_adapter(self, number: int, path: str) -> None: ...
    def forget_adapter(self, number: int) -> None: ...
    def add_adapter(self, name: str, number: int) -> None: ...
    def drop_adapter(self, name: str) -> None: ...
    def adapter_requests(self, name: str) -> int: ...
    def make_room(self, size: int) -> bool: ...  # in the memory that adapters share with others


class Adapters:
    def __init__(self, host: Host, ranks: int, budget: int) -> None:
        """`budget`: bytes, for all ranks together."""
        self._host, self._ranks, self._budget = host, ranks, budget
        self._known: dict[str, _Known] = {}  # least recently used first
        self._numbers = itertools.count()
        self._to_read: list[str] = []  # once fewer than READ_AHEAD are
        self._readings: dict[int, tuple[str, list[AdapterRead]]] = {}
        self._leaving: set[str] = set()
        self._lacking: dict[str, None] = {}  # room; requests wait for these, in this order

    def used(self) -> int:
        """Bytes, on all ranks; as the other sizes here."""
        return sum(known.bytes for known in self._known.values() if known.is_resident)

    def idle(self) -> int:
        """Of adapters that no request has."""
        return sum(self._known[name].bytes for name in self._idle())

    def evict(self, size: int) -> int:
        """The least recently used of these go until so much is free; what that gave."""
        given = 0
        for name in self._idle():
            if given >= size:
                break
            given += self._known[name].bytes
            self._evict(name)
        return given

    def load(self, message: LoadAdapter) -> AdapterChanged | None:
        """The answer, if there is one at once."""
        if message.name in self._known:
            return AdapterChanged(message.name, False, "an adapter of that name is there already")
        self._known[message.name] = _Known(message.path, message.digest)
        self._begin_reading(message.name)
        return None

    def unload(self, message: UnloadAdapter) -> AdapterChanged | None:
        """Likewise."""
        known = self._known.get(message.name)
        if known is None:
            return AdapterChanged(message.name, False)
        self._leaving.add(message.name)
        return None

    def settle(self) -> list[AdapterChanged]:
        """Those that are to leave and that no request has any longer."""
        if not self._leaving:
            return []
        requests = self._host.adapter_requests
        gone = [name for name in sorted(self._leaving) if not self._known[name].is_read and not requests(name)]
        for name in gone:
            self._evict(name)
            self._forget(name)
        return [AdapterChanged(name, False) for name in gone]

    def hold(self, request: Submit) -> bool:
        """Whether the request waits here for its adapter; else the engine takes or refuses it."""
        known = self._known.get(request.adapter)
        if known is None or request.adapter in self._leaving:
            return False
        if self._lacking and not self._host.adapter_requests(request.adapter):
            self.read_again()  # its room may be what others wait for, and they came first
        self._known[request.adapter] = self._known.pop(request.adapter)
        if known.is_resident:
            return False
        known.held.append(request)
        if known.is_read or request.adapter in self._lacking:
            return True
        if self._lacking or self._lack(known.bytes) > self.idle():
            self._lacking[request.adapter] = None
        else:
            self._begin_reading(request.adapter)
        return True

    def read_again(self) -> None:
        """To be called now and then: those that found no room are read again, in order, as far as there is some."""
        for name in list(self._lacking):
            known = self._known[name]
            if known.held and not self._make_room(known.bytes):
                return
            del self._lacking[name]
            if known.held:
                self._begin_reading(name)

    def drop(self, request_id: int) -> bool:
        """The request is no longer wanted; whether it waited here."""
        for known in self._known.values():
            for request in known.held:
                if request.request_id == request_id:
                    known.held.remove(request)
                    return True
        return False

    def was_read(self, result: AdapterRead) -> Outcome | None:
        """What comes of a reading, once all ranks have told."""
        name, results = self._readings[result.number]
        results.append(result)
        if len(results) < self._ranks:
            return None
        del self._readings[result.number]
        outcome = self._outcome(name, result.number, results)
        self._read_next()
        return outcome

    def _outcome(self, name: str, number: int, results: list[AdapterRead]) -> Outcome:
        known = self._known[name]
        known.is_read = False
        was_loaded = bool(known.digest)
        error = self._check(known, results)
        if not error and self._make_room(known.bytes):
            known.is_resident = known.is_told = True
            self._host.add_adapter(name, number)
            held, known.held = known.held, []
            return Outcome(_loaded(name, known), held, [])
        self._host.forget_adapter(number)
        if not error and was_loaded:
            if known.held:
                self._lacking[name] = None
            is_news, known.is_told = not known.is_told, True
            return Outcome(_loaded(name, known) if is_news else None, [], [])
        if not error:
            budget = f"the {mib(self._budget)} for adapters (adapter_memory)"
            error = f"it takes {mib(known.bytes)} of {budget}, and there is no room beside those that requests have"
        held = known.held
        self._forget(name)
        log.warning("the adapter %r was refused: %s", name, error)
        refused = [
            SequenceOutput(request.request_id, [], "invalid", message=f"{NO_ADAPTER}{name!r} is loaded now: {error}")
            for request in held
        ]
        return Outcome(AdapterChanged(name, False, error), [], refused)

    def _begin_reading(self, name: str) -> None:
        self._known[name].is_read = True
        self._to_read.append(name)
        self._read_next()

    def _read_next(self) -> None:
        """Those that requests wait for first. After a restart there may be hundreds, and steps are long."""
        while self._to_read and len(self._readings) < READ_AHEAD:
            name = next((name for name in self._to_read if self._known[name].held), self._to_read[0])
            self._to_read.remove(name)
            number = next(self._numbers)
            self._readings[number] = name, []
            self._host.read_adapter(number, self._known[name].path)

    def _check(self, known: _Known, results: list[AdapterRead]) -> str:
        """Why the adapter can't be taken, if there is room for it; empty: it can."""
        if error := next((result.error for result in results if result.error), ""):
            return error
        digests = {result.digest for result in results}
        if len(digests) > 1:
            return "its files are not the same on all hosts"
        digest = digests.pop()
        if known.digest and digest != known.digest:
            return "its files have changed since it was loaded; load it again"
        known.digest, known.rank = digest, max(result.rank for result in results)
        known.bytes = sum(result.bytes for result in results)
        return ""

    def _lack(self, size: int) -> int:
        """Bytes that are to be freed for so many; those that are just read again have their room already."""
        coming = sum(known.bytes for known in self._known.values() if known.is_read)
        return self.used() + coming + size - self._budget

    def _make_room(self, size: int) -> bool:
        """By evicting adapters that no request has; none, if that does not suffice."""
        lack = self._lack(size)
        if lack > self.idle():
            return False
        self.evict(lack)
        return self._host.make_room(size)

    def _idle(self) -> list[str]:
        """Least recently used first."""
        requests = self._host.adapter_requests
        return [name for name, known in self._known.items() if known.is_resident and not requests(name)]

    def _forget(self, name: str) -> None:
        del self._known[name]
        self._leaving.discard(name)
        self._lacking.pop(name, None)

    def _evict(self, name: str) -> None:
        if self._known[name].is_resident:
            self._known[name].is_resident = False
            self._host.drop_adapter(name)


def _loaded(name: str, known: _Known) -> AdapterChanged:
    return AdapterChanged(name, True, "", known.rank, known.bytes, known.digest)
