"""Key entries in Redis."""

from __future__ import annotations

from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tidewright.address import check_redis_url
from tidewright_gateway.auth.errors import AuthSetupError
from tidewright_gateway.auth.keys import KeyEntry
from tidewright_gateway.auth.stores import Change, Entries, KeyStore

REDIS_HASH = "tidewright:keys"
_REDIS_TIMEOUT = 2.0  # seconds


class RedisStore(KeyStore):
    """One hash, key id to JSON. Gateways share it, so a broken entry costs only its own key.

    It is read as a whole only after it has changed, which Redis itself tells of a key that is watched, whoever changes
    it: a transaction of the connection that watches it fails then. A transaction ends the watch, so the next connection
    watches before, and no change falls between two of them.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = check_redis_url(url)
            port = f":{parts.port}" if parts.port else ""
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=_REDIS_TIMEOUT,
                socket_connect_timeout=_REDIS_TIMEOUT,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise AuthSetupError(f"keys: not a Redis address, such as redis://127.0.0.1:6379/0: {error}") from None
        self.name = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
        self._watch: Any = None  # a pipeline that has watched the hash since the last read
        self._seen: dict[bytes, bytes] | None = None
        self._entries: Entries = {}

    def read(self) -> tuple[Entries, list[str]] | None:
        watch: Any = self._redis.pipeline()
        try:
            watch.watch(REDIS_HASH)
            last, self._watch = self._watch, None
            if last and _is_unchanged(last):
                self._watch = watch
                return None
            fields: dict[bytes, bytes] = watch.hgetall(REDIS_HASH)
        except redis.RedisError as error:
            _drop(watch)
            raise self._unreachable(error) from None
        self._watch = watch
        if fields == self._seen:
            return None
        entries: Entries = {}
        faults = []
        for field, value in fields.items():
            key_id = field.decode(errors="replace")
            known = self._entries.get(key_id) if self._seen and self._seen.get(field) == value else None
            try:
                entries[key_id] = known or self._decode(key_id, value)
            except AuthSetupError as error:
                faults.append(str(error))
        self._seen, self._entries = fields, entries
        return entries, faults

    def change(self, key_id: str, change: Change) -> None:
        def put(pipe: Any) -> None:
            value = pipe.hget(REDIS_HASH, key_id)
            entry = change(None if value is None else self._decode(key_id, value))
            pipe.multi()
            if entry is None:
                pipe.hdel(REDIS_HASH, key_id)
            else:
                pipe.hset(REDIS_HASH, key_id, msgspec.json.encode(entry))

        try:
            self._redis.transaction(put, REDIS_HASH)
        except redis.RedisError as error:
            raise self._unreachable(error) from None

    def _decode(self, key_id: str, value: bytes) -> KeyEntry:
        try:
            entry = msgspec.json.decode(value, type=KeyEntry)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise AuthSetupError(f"{self.name}: {REDIS_HASH}: entry {key_id!r}: {error}") from None
        if entry.id != key_id:
            raise AuthSetupError(f"{self.name}: {REDIS_HASH}: entry {key_id!r} says that its id is {entry.id!r}")
        return entry

    def _unreachable(self, error: redis.RedisError) -> AuthSetupError:
        return AuthSetupError(f"{self.name}: {error}")


def _is_unchanged(watch: Any) -> bool:
    """What it watches; ends the watch. False also if the connection broke."""
    try:
        watch.multi()
        watch.ping()
        watch.execute()
    except redis.RedisError:
        _drop(watch)
        return False
    return True


def _drop(watch: Any) -> None:
    """Ends a watch with its connection: to say it to a Redis that hangs would fail as well."""
    if watch.connection:
        watch.connection.disconnect()
    watch.watching = False
    watch.reset()
