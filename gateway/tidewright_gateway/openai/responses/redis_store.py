"""Stored responses in Redis. While it is gone, nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tidewright_gateway.openai.responses.store import ResponseStore, StoredResponse, StoreLostError, decode, encode
from tidewright_gateway.trouble import STORE, Trouble

log = logging.getLogger(__name__)

PREFIX = "tidewright:response:"
TIMEOUT = 2.0  # seconds for an answer
TICK = 1.0  # seconds between two tries to reach it
T = TypeVar("T")


class RedisStore(ResponseStore):
    """One key for each response, which expires by itself."""

    def __init__(self, url: str, ttl: float) -> None:
        """`ttl`: seconds."""
        self._redis = Redis.from_url(
            url,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 1),  # a connection that was idle may have been closed
        )
        self._ttl = max(round(ttl * 1000), 1)
        self._is_lost = False
        self._trouble = Trouble(log, "the store of responses works again", events=STORE, store="responses")

    @property
    def trouble(self) -> str:
        return self._trouble.text

    async def put(self, key_id: str, response_id: str, stored: StoredResponse) -> None:
        await self._ask(lambda: self._redis.set(_name(key_id, response_id), encode(stored), px=self._ttl))

    async def get(self, key_id: str, response_id: str) -> StoredResponse | None:
        data = await self._ask(lambda: self._redis.get(_name(key_id, response_id)))
        try:
            return decode(data) if data else None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.error("the stored response %s can't be read: %s", response_id, error)
            return None

    async def delete(self, key_id: str, response_id: str) -> bool:
        return bool(await self._ask(lambda: self._redis.delete(_name(key_id, response_id))))

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            if self._is_lost:
                try:
                    await self._redis.ping()
                except Exception:  # whatever it is, it must be seen when the store is back
                    continue
                self._note("")

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        if self._is_lost:
            raise StoreLostError(self.trouble)
        try:
            answer = await question()
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            self._note(f"the store of responses is gone: {error}", is_lost=True)
            raise StoreLostError(self.trouble) from None
        except RedisError as error:  # it answers, but not to this: it is full, or a copy that only can be read
            self._note(f"the store of responses can't do its work: {error}")
            raise StoreLostError(self.trouble) from None
        self._note("")
        return answer

    def _note(self, trouble: str, *, is_lost: bool = False) -> None:
        self._trouble.note(trouble)
        self._is_lost = is_lost


def _name(key_id: str, response_id: str) -> str:
    """The id has no colon, so that no key can name a response of another one."""
    return f"{PREFIX}{response_id}:{key_id}"
