"""An engine and its other ranks as adapters see them (adapters.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

from tidewright.distributed.rank_messages import AdapterRead, ForgetAdapter, ReadAdapter
from tidewright.distributed.ranks import Ranks
from tidewright.engine.adapters import Adapters
from tidewright.engine.engine import Engine
from tidewright.lora.reader import AdapterReader


class AdapterHost:
    def __init__(
        self,
        engine: Engine,
        ranks: Ranks | None,
        was_read: Callable[[AdapterRead], None],
        tell: Callable[[str], None],
    ) -> None:
        """`was_read` gets what came of a reading on each rank, from other threads; `tell`: why one of these ended."""
        self._engine, self._ranks = engine, ranks
        self._reader = AdapterReader(engine.runner.read_adapter, was_read, tell)
        if ranks:
            ranks.on_adapter = was_read

    def read_adapter(self, number: int, path: str) -> None:
        if self._ranks:
            self._ranks.ask(ReadAdapter(number, path))
        self._reader.put(number, path)

    def forget_adapter(self, number: int) -> None:
        if self._ranks:
            self._ranks.ask(ForgetAdapter(number))
        self._reader.forget(number)

    def add_adapter(self, name: str, number: int) -> None:
        self._engine.add_adapter(name, self._reader.take(number), number)

    def drop_adapter(self, name: str) -> None:
        self._engine.drop_adapter(name)

    def adapter_requests(self, name: str) -> int:
        return self._engine.scheduler.adapters.requests(name)

    def lack(self, size: int) -> int:
        ranks = self._engine.config.tensor_parallel_size
        return self._engine.memory.lack(math.ceil(size / ranks)) * ranks if self._engine.has_adapters_beside else 0

    def make_room(self, size: int) -> bool:
        if not self._engine.has_adapters_beside:
            return True
        return self._engine.memory.make_room(math.ceil(size / self._engine.config.tensor_parallel_size))


class RankAdapters:
    """Adapters as one rank's account has them."""

    def __init__(self, adapters: Adapters, ranks: int) -> None:
        self._adapters, self._ranks = adapters, ranks

    def used(self) -> int:
        return math.ceil(self._adapters.used() / self._ranks)

    def idle(self) -> int:
        return self._adapters.idle() // self._ranks

    def evict(self, size: int) -> int:
        return self._adapters.evict(size * self._ranks) // self._ranks
