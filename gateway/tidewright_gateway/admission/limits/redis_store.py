"""Accounts in Redis, for several gateways. Each question is one Lua script, so nothing comes between.

Redis' clock counts. A place in `concurrent` is a lease, so that what a gateway held that was killed comes back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tidewright_gateway.admission.limits.store import (
    Settle,
    StoreLostError,
    StoreRefusesError,
    Subject,
    Take,
    TakeResult,
)

LEASE = 60.0  # seconds
# The braces keep all keys on one node of a cluster. What a key is for stands before the name, of which callers may
# choose a part.
ACCOUNTS, PLACES = "tidewright:{limits}:account:", "tidewright:{limits}:places:"

T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode
_result = msgspec.msgpack.Decoder(TakeResult).decode


class _Arguments(msgspec.Struct, frozen=True):
    lease: float
    body: Take | Settle | list[str]
    """The list: ids that are renewed, one for each pair of keys."""
    now: float | None


class RedisLink:
    def __init__(self, url: str, clock: Callable[[], float] | None = None, lease: float = LEASE) -> None:
        """`clock`: seconds since 1970 (UTC), instead of Redis' own. `lease`: seconds that a reservation is held
        without being renewed."""
        self._client = Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self._clock, self._lease = clock, lease
        account = _script("account")
        self._reserve, self._settle, self._renew = (
            self._client.register_script(account + _script(name)) for name in ("reserve", "settle", "renew")
        )

    async def connect(self) -> None:
        # A network that was gone may have left them half open: each would cost a timeout.
        await _of_redis(self._client.connection_pool.disconnect(inuse_connections=False))
        await self.ping()

    async def ping(self) -> None:
        await _of_redis(self._client.ping())

    async def take(self, take: Take) -> TakeResult:
        return _result(await _of_redis(self._reserve(_keys(take.subjects), [self._arguments(take)])))

    async def settle(self, settle: Settle) -> None:
        await _of_redis(self._settle(_keys(settle.subjects), [self._arguments(settle)]))

    async def renew(self, held: Sequence[tuple[str, tuple[Subject, ...]]]) -> None:
        keys = [key for _, subjects in held for key in _keys(subjects)]
        ids = [id for id, subjects in held for _ in subjects]
        if ids:
            await _of_redis(self._renew(keys, [self._arguments(ids)]))

    async def close(self) -> None:
        await self._client.aclose()

    def _arguments(self, body: Take | Settle | list[str]) -> bytes:
        return _encode(_Arguments(self._lease, body, self._clock() if self._clock else None))


def _script(name: str) -> str:
    return Path(__file__).with_name(f"{name}.lua").read_text(encoding="utf-8")


def _keys(subjects: Sequence[Subject]) -> list[str]:
    return [key for subject in subjects for key in (ACCOUNTS + subject.name, PLACES + subject.name)]


async def _of_redis(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise StoreLostError(f"Redis: {error}") from None
    except RedisError as error:  # it answers, but not to this: it is full, or a copy that only can be read
        raise StoreRefusesError(f"Redis: {error}") from None
