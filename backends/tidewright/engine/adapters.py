"""The LoRA adapters of an engine, on rank 0: read beside the steps, kept within a budget, gone when nobody has them.

All ranks read an adapter, and the engine takes it only if all could. Then it enters the scheduler between two steps, as
an input like any other. The least recently used adapters without requests give way when the host's budget is full; they
stay loaded for the bridge, and are read again when a request wants them, which waits meanwhile. If there is no room, as
requests have all the others, it waits for its turn: only a first load is refused for that.

Memory is shared between tenants as places are (fairness.py), by the number of adapters and the tenants' weights: what a
tenant with less than its share waits for comes first, and the adapters of those that have most make room for it, as
soon as the requests have ended that were taken before. New requests for these wait themselves meanwhile.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
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
    tenant: str = ""  # that asked for it last, and its weight
    weight: int = 1


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
    # In the memory that adapters share with others:
    def lack(self, size: int) -> int: ...  # bytes that even all idle adapters, and what others can spare, don't give
    def make_room(self, size: int) -> bool: ...


class Adapters:
    def __init__(self, host: Host, ranks: int, budget: int) -> None:
        """`budget`: bytes, for all ranks together."""
        self._host, self._ranks, self._budget = host, ranks, budget
        self._known: dict[str, _Known] = {}  # least recently used first
        self._numbers = itertools.count()
        self._to_read: list[str] = []  # once fewer than READ_AHEAD are
        self._readings: dict[int, tuple[str, list[AdapterRead]]] = {}
        self._leaving: set[str] = set()
        self._lacking: dict[str, None] = {}  # requests wait for these: for room, or for their turn to use it again
        self._yielding: set[str] = set()  # get no new requests, so that others have their room
        self._ready: list[Submit] = []  # for adapters that are in memory, and stay there until these are taken

    def used(self) -> int:
        """Bytes, on all ranks; as the other sizes here."""
        return sum(known.bytes for known in self._known.values() if known.is_resident)

    def idle(self) -> int:
        """Of adapters that no request has."""
        return sum(self._known[name].bytes for name in self._idle())

    def evict(self, size: int) -> int:
        """Of the tenants that have most, the least recently used of these go until so much is free; what that gave."""
        given = 0
        while given < size and (idle := self._idle()):
            shares = self._shares()
            name = max(idle, key=lambda name: shares[self._known[name].tenant])
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
        name = request.adapter
        known = self._known.get(name)
        if known is None or name in self._leaving:
            return False
        if self._lacking and not self._host.adapter_requests(name):
            self.read_again()  # its room may be what others wait for, and they came first
        self._known[name] = self._known.pop(name)
        known.tenant, known.weight = request.sampling.tenant, request.sampling.tenant_weight
        if known.is_resident and name not in self._yielding:
            return False
        known.held.append(request)
        if not known.is_read and name not in self._lacking:
            self._lacking[name] = None
            self.read_again()  # at once, if there is room, which nobody else has from then on
        return True

    def read_again(self) -> None:
        """To be called now and then: those that found no room are read again, in turn, as far as there is some."""
        self._lacking = {name: None for name in self._lacking if self._known[name].held}
        too_large: set[str] = set()
        while names := self._lacking.keys() - too_large:
            name = self._next_lacking(names)
            known = self._known[name]
            if not known.is_resident and not self._make_room(known.bytes):
                if not self._may_fit(known.bytes):
                    too_large.add(name)  # until the others of the memory give some of it back
                    continue
                self._yielding = self._makes_room_for(name)
                return
            del self._lacking[name]
            if known.is_resident:  # it was to make room, and its turn has come before that
                self._yielding.discard(name)
                self._ready += known.held
                known.held = []
            else:
                self._begin_reading(name)
        self._yielding = set()

    def take_ready(self) -> list[Submit]:
        """Requests that waited, and that the engine takes now."""
        ready, self._ready = self._ready, []
        return ready

    @property
    def tenants(self) -> list[str]:
        """Of the requests that wait here."""
        return [request.sampling.tenant for waiting in self._waiting() for request in waiting]

    def _waiting(self) -> Iterator[list[Submit]]:
        yield self._ready
        yield from (known.held for known in self._known.values())

    def drop(self, request_id: int) -> bool:
        """The request is no longer wanted; whether it waited here."""
        for waiting in self._waiting():
            for request in waiting:
                if request.request_id == request_id:
                    waiting.remove(request)
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

    @property
    def _coming(self) -> int:
        """Bytes of those that are just read again: their room is not for others."""
        return sum(known.bytes for known in self._known.values() if known.is_read)

    def _lack(self, size: int) -> int:
        """Bytes that are to be freed for so many; those that are just read again have their room already."""
        return self.used() + self._coming + size - self._budget

    def _make_room(self, size: int) -> bool:
        """By evicting adapters that no request has; none, if that does not suffice."""
        lack = self._lack(size)
        if lack > self.idle() or self._host.lack(self._coming + size):
            return False
        self.evict(lack)
        return self._host.make_room(self._coming + size)

    def _shares(self, but: Collection[str] = ()) -> defaultdict[str, float]:
        """Adapters in memory by tenant, `but` some, divided by its weight."""
        shares: defaultdict[str, float] = defaultdict(float)
        for name, known in self._known.items():
            if (known.is_resident or known.is_read) and name not in but:
                shares[known.tenant] += 1 / known.weight
        return shares

    def _may_fit(self, size: int) -> bool:
        """If all adapters make room."""
        return size <= self._budget and self._host.lack(size) <= self.used() - self.idle()

    def _next_lacking(self, names: Collection[str]) -> str:
        """The most urgent, then of the tenant that uses least, then of one with none in memory, then the first."""
        in_use, shares = self._shares(but=self._idle()), self._shares()

        def turn(name: str) -> tuple[int, float, bool]:
            known = self._known[name]
            priority = min(request.sampling.priority for request in known.held)
            return priority, in_use[known.tenant], shares[known.tenant] > 0

        return min((name for name in self._lacking if name in names), key=turn)

    def _makes_room_for(self, name: str) -> set[str]:
        """The idle ones, its tenant's own that requests have, and those of tenants that use more than it would then.

        One that has none takes turns with all others, and so does one that will have given all that it has, and lacks
        more: adapters are counted, but differ in size. Once chosen, an adapter stays so.
        """
        # Those that are idle now stay so, or they would be in use again when others have made room.
        found = set(self._idle())
        wanted, shares = self._known[name], self._shares(but=found)
        own = shares[wanted.tenant]
        lack = max(self._lack(wanted.bytes) - self.idle(), self._host.lack(self._coming + wanted.bytes))
        used = [name for name, known in self._known.items() if known.is_resident and name not in found]
        used.sort(key=lambda name: (name not in self._yielding, -shares[self._known[name].tenant]))
        for has_some in (own > 0, False):
            for other in used:
                known = self._known[other]
                has_more = known.tenant == wanted.tenant or shares[known.tenant] > own + 1 / wanted.weight
                if lack > 0 and other not in found and (has_more or not has_some):
                    found.add(other)
                    lack -= known.bytes
        return found

    def _idle(self) -> list[str]:
        """Least recently used first."""
        requests, ready = self._host.adapter_requests, {request.adapter for request in self._ready}
        return [
            name
            for name, known in self._known.items()
            if known.is_resident and not requests(name) and name not in ready
        ]

    def _forget(self, name: str) -> None:
        del self._known[name]
        self._leaving.discard(name)
        self._lacking.pop(name, None)
        self._yielding.discard(name)

    def _evict(self, name: str) -> None:
        if self._known[name].is_resident:
            self._known[name].is_resident = False
            self._host.drop_adapter(name)


def _loaded(name: str, known: _Known) -> AdapterChanged:
    return AdapterChanged(name, True, "", known.rank, known.bytes, known.digest)
