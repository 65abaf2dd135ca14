"""The LoRA adapters that the engine is to have: a new one gets those that the one before had, ahead of any request.

An adapter that is being unloaded stays, in the next engine too, until the last request that has it has ended.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tidewright.engine.messages import AdapterChanged, LoadAdapter, ToEngine, UnloadAdapter
from tidewright.errors import EngineUnavailableError, InvalidRequestError, OverloadedError, RequestError
from tidewright.schema import MAX_ADAPTER_NAME, MAX_ADAPTER_PATH, MAX_ADAPTERS_KNOWN, NO_ADAPTER

log = logging.getLogger(__name__)

TRIES = 2  # engines that may die while they load the same adapter again, after which it is dropped

State = Literal["loading", "loaded", "unloading"]
AdapterChange = Literal["loaded", "unloaded", "failed"]
ADAPTER_CHANGES: tuple[AdapterChange, ...] = get_args(AdapterChange)
Done = Callable[["Adapter | RequestError"], None]
"""Called once, from the feeder's thread, with the adapter as it is then (state "unloading": it is gone now)."""


@dataclass(frozen=True)
class Adapter:
    name: str
    path: str
    state: State = "loading"
    rank: int = 0
    bytes: int = 0  # in the memory of all ranks
    digest: str = ""  # of its files; empty: not read yet


@dataclass
class _Pending:
    """What the engine that runs was asked for, and has not answered."""

    done: Done | None = None
    deaths: int = 0  # of engines that were reading it and had nothing else to do
    sent: bool = False


class Adapters:
    """All methods are for the feeder's thread; `by_name` is replaced, never changed, so that any thread may read it."""

    def __init__(self, send: Callable[[ToEngine], None], in_use: Callable[[str], bool]) -> None:
        """`in_use`: whether a request in flight has the adapter of that name."""
        self._send, self._in_use = send, in_use
        self._leaving: set[str] = set()  # that the engine was told to unload
        self._engine_up = False
        self._pending: dict[str, _Pending] = {}
        self.by_name: dict[str, Adapter] = {}
        self.counts: Counter[AdapterChange] = Counter()
        """What the engine has done, over all engines that there were."""

    def load(self, name: str, path: str, done: Done) -> None:
        if refusal := self._refusal(name, path):
            done(refusal)
            return
        self._set(Adapter(name, path))
        self._pending[name] = _Pending(done)
        self._ask(name)

    def unload(self, name: str, done: Done) -> None:
        adapter = self.by_name.get(name)
        if adapter is None:
            done(unknown_adapter(name, self.by_name))
        elif adapter.state != "loaded":
            done(OverloadedError(f"the adapter {name!r} is {adapter.state} already; try again later"))
        else:
            self._set(replace(adapter, state="unloading"))
            pending = self._pending.setdefault(name, _Pending())  # it may be about to be loaded again
            pending.done = done
            self.settle()

    def changed(self, change: AdapterChanged) -> None:
        """What the engine says."""
        adapter, pending = self.by_name.get(change.name), self._pending.pop(change.name, _Pending())
        if adapter is None:
            return
        self.counts["failed" if change.error else "loaded" if change.loaded else "unloaded"] += 1
        if change.loaded:
            adapter = replace(adapter, rank=change.rank, bytes=change.bytes, digest=change.digest)
            if adapter.state == "unloading":  # loaded again, for those that have it
                self._set(adapter)
                self._pending[change.name] = _Pending(pending.done)
                return
            adapter = replace(adapter, state="loaded")
            self._set(adapter)
        else:
            self._drop(change.name)
            self._leaving.discard(change.name)
            if change.error and not pending.done:
                log.error("the adapter %r could not be loaded again: %s", change.name, change.error)
        if pending.done:
            pending.done(InvalidRequestError(change.error) if change.error else adapter)

    def engine_up(self) -> None:
        self._engine_up = True
        for name in self.by_name:
            self._pending.setdefault(name, _Pending())
            self._ask(name)

    def settle(self) -> None:
        """To be called when a request has ended: those that are to go, and that no request has any longer, go."""
        if not self._engine_up:
            return
        for name, adapter in self.by_name.items():
            if adapter.state == "unloading" and name not in self._leaving and not self._in_use(name):
                self._leaving.add(name)
                self._send(UnloadAdapter(name))

    def engine_lost(self, to_blame: bool) -> None:
        """`to_blame`: nothing but an adapter can be the cause. Then it is the one that was being read: the first.

        One that was loaded before goes only for that. A new one goes in any case: its caller can try again.
        """
        self._engine_up = False
        self._leaving.clear()
        sent = [name for name in self.by_name if name in self._pending and self._pending[name].sent]
        for name in sent:
            pending = self._pending[name]
            pending.deaths, pending.sent = pending.deaths + (to_blame and name == sent[0]), False
            if self.by_name[name].state == "loading" or pending.deaths >= TRIES:
                log.error("the engine ended while it loaded the adapter %r, which is dropped", name)
                self._drop(name)
                del self._pending[name]
                if pending.done:
                    pending.done(EngineUnavailableError("the engine ended while it loaded the adapter; try again"))

    def fail(self, cause: str) -> None:
        """No engine will answer: nobody waits any longer."""
        for name, pending in list(self._pending.items()):
            if self.by_name[name].state == "loading":
                self._drop(name)
                del self._pending[name]
            if pending.done:
                pending.done(EngineUnavailableError(cause))
                pending.done = None

    def _ask(self, name: str) -> None:
        if self._engine_up:
            self._pending[name].sent = True
            self._send(LoadAdapter(name, self.by_name[name].path, self.by_name[name].digest))

    def _refusal(self, name: str, path: str) -> RequestError | None:
        if adapter := self.by_name.get(name):
            words = "loaded already; unload it first" if adapter.state == "loaded" else f"{adapter.state} just now"
            return InvalidRequestError(f"the adapter {name!r} is {words}")
        if not name or len(name) > MAX_ADAPTER_NAME or not name.isprintable():
            return InvalidRequestError(f"an adapter's name has 1 to {MAX_ADAPTER_NAME} printable characters")
        if not path or len(path) > MAX_ADAPTER_PATH or "\0" in path:
            return InvalidRequestError(f"an adapter's path has 1 to {MAX_ADAPTER_PATH} characters, none of them NUL")
        if len(self.by_name) >= MAX_ADAPTERS_KNOWN:
            limit = f"{MAX_ADAPTERS_KNOWN} adapters are loaded, which is the limit"
            return InvalidRequestError(f"{limit}; unload one first")
        return None

    def _set(self, adapter: Adapter) -> None:
        self.by_name = {**self.by_name, adapter.name: adapter}

    def _drop(self, name: str) -> None:
        self.by_name = {other: adapter for other, adapter in self.by_name.items() if other != name}


def unknown_adapter(name: str, known: dict[str, Adapter]) -> InvalidRequestError:
    names = ", ".join(sorted(known)[:10]) or "none"
    return InvalidRequestError(f"{NO_ADAPTER}{name!r} is loaded (loaded: {names}{', …' if len(known) > 10 else ''})")
