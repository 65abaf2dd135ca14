"""Where responses are stored, each for one key: in memory, or in Redis for several workers and gateways."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec
from cachetools import TTLCache

from tidewright_gateway.config.api import ApiSettings

log = logging.getLogger(__name__)

_ENTRY_BYTES = 500  # of a stored response beside its own bytes


class StoredResponse(msgspec.Struct, frozen=True):
    response: dict[str, Any]
    """The Response object."""
    input: list[dict[str, Any]]
    """All items before its output, those of earlier responses included."""

    @property
    def items(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        output: list[dict[str, Any]] = self.response["output"]
        return [*self.input, *output]


class StoreLostError(Exception):
    """The store can't be used right now; the message says why."""


class ResponseStore(ABC):
    """An id of another key is as unknown as any. Methods raise StoreLostError."""

    why_not = ""
    """Why nothing is stored; empty if responses are."""

    @property
    def trouble(self) -> str:
        """Why it can't be used right now; empty if it can."""
        return ""

    @abstractmethod
    async def put(self, key_id: str, response_id: str, stored: StoredResponse) -> None: ...

    @abstractmethod
    async def get(self, key_id: str, response_id: str) -> StoredResponse | None: ...

    @abstractmethod
    async def delete(self, key_id: str, response_id: str) -> bool:
        """False: there was none."""

    async def watch(self) -> None:
        """Runs for ever, if there is something to watch: notices that a lost store is back."""
        return

    async def close(self) -> None:
        """Ends its connections."""
        return


class MemoryStore(ResponseStore):
    """Least recently used first out, and none older than `ttl` seconds. Belongs to one process."""

    def __init__(self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries: TTLCache[tuple[str, str], bytes] = TTLCache(max_bytes, ttl, clock, _size)

    async def put(self, key_id: str, response_id: str, stored: StoredResponse) -> None:
        data = encode(stored)
        if _size(data) > self._entries.maxsize:
            log.warning("a response of %d bytes is not stored: it is longer than response_store_bytes", len(data))
            return
        self._entries[key_id, response_id] = data

    async def get(self, key_id: str, response_id: str) -> StoredResponse | None:
        data = self._entries.get((key_id, response_id))
        return decode(data) if data else None

    async def delete(self, key_id: str, response_id: str) -> bool:
        return self._entries.pop((key_id, response_id), None) is not None


class NoStore(ResponseStore):
    """Stores nothing."""

    def __init__(self, why_not: str) -> None:
        self.why_not = why_not

    async def put(self, key_id: str, response_id: str, stored: StoredResponse) -> None:
        pass

    async def get(self, key_id: str, response_id: str) -> StoredResponse | None:
        return None

    async def delete(self, key_id: str, response_id: str) -> bool:
        return False


def make_store(settings: ApiSettings, workers: int) -> ResponseStore:
    """As the settings name it. In memory, a worker would not find what another one has stored."""
    if settings.response_store:
        from tidewright_gateway.openai.responses.redis_store import RedisStore  # slow to import

        return RedisStore(settings.response_store, settings.response_ttl)
    if workers > 1:
        return NoStore("several workers store responses only in Redis (response_store)")
    if not settings.response_store_bytes:
        return NoStore("this server stores no responses (response_store_bytes)")
    return MemoryStore(settings.response_store_bytes, settings.response_ttl)


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(StoredResponse).decode


def _size(data: bytes) -> int:
    return _ENTRY_BYTES + len(data)
