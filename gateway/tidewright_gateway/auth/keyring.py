"""The API keys in force: follows their store, checks keys in a thread, and remembers what came out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.auth.errors import WRONG, unauthorized
from tidewright_gateway.auth.keys import KeyEntry, fits, split_key
from tidewright_gateway.auth.stores import KeyStore
from tidewright_gateway.openai.errors import ApiError

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.5  # seconds
THREADS = 1  # with two on two processors, a flood of wrong keys delayed the event loop by milliseconds
MOST_WAITING = 256  # keys that are being checked; they take about two seconds
WRONG_REMEMBERED = 10.0  # seconds
MOST_WRONG = 10_000


class _Known(msgspec.Struct, frozen=True):
    entry: KeyEntry
    caller: Caller


class Keyring:
    """Remembers keys by a hash that is keyed anew in each process; the keys themselves are kept nowhere."""

    def __init__(self, store: KeyStore) -> None:
        """Reads the store. AuthSetupError: it can't be read."""
        self._store = store
        self._entries: dict[str, KeyEntry] = {}
        self._known: dict[bytes, _Known] = {}
        self._wrong: dict[bytes, float] = {}  # until when; the oldest first
        self._checking: dict[bytes, asyncio.Task[_Known | None]] = {}
        self._pepper = secrets.token_bytes(32)
        self._pool = ThreadPoolExecutor(THREADS, "keys")
        self._trouble = ""
        self._polling: asyncio.Task[None] | None = None
        if found := store.read():
            self._put(*found)

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._polling:
            self._polling.cancel()
            await asyncio.wait((self._polling,))
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def caller(self, key: str) -> Caller:
        """Microseconds for a key that was seen before, else milliseconds.

        Raises:
            ApiError: 401, the key is wrong, expired or disabled; 503, too many keys are being checked.
        """
        digest = hashlib.blake2b(key.encode(), key=self._pepper, digest_size=32).digest()
        if (known := self._known.get(digest) or await self._check(key, digest)) is None:
            raise unauthorized(WRONG)
        if trouble := known.entry.trouble:
            raise unauthorized(trouble)
        return known.caller

    async def _check(self, key: str, digest: bytes) -> _Known | None:
        parts = split_key(key)
        if parts is None or self._wrong.get(digest, 0) > time.monotonic():
            return None
        task = self._checking.get(digest)
        if task is None:
            if len(self._checking) >= MOST_WAITING:
                raise ApiError(503, "too many keys are being checked; try again", code="overloaded", retry_after=1)
            task = self._checking[digest] = asyncio.create_task(self._verify(*parts, digest))
            task.add_done_callback(lambda _: self._checking.pop(digest, None))
        return await asyncio.shield(task)  # others may wait for it as well

    async def _verify(self, key_id: str, secret: str, digest: bytes) -> _Known | None:
        loop = asyncio.get_running_loop()
        while True:
            entry = self._entries.get(key_id)
            is_right = await loop.run_in_executor(self._pool, fits, secret, entry.hashes if entry else ())
            if self._entries.get(key_id) is entry:
                break  # else it was replaced meanwhile, and what came out may be wrong by now
        if entry and is_right:
            known = self._known[digest] = _Known(entry, entry.caller)
            return known
        if len(self._wrong) >= MOST_WRONG:
            del self._wrong[next(iter(self._wrong))]
        self._wrong.pop(digest, None)  # so that it goes to the end
        self._wrong[digest] = time.monotonic() + WRONG_REMEMBERED
        return None

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            try:
                if found := await asyncio.to_thread(self._store.read):
                    self._put(*found)
                self._note("")
            except Exception as error:  # whatever it is, a key that is revoked later must be seen
                self._note(str(error))

    def _put(self, entries: dict[str, KeyEntry], faults: list[str]) -> None:
        # An entry that is as it was stays the same object, and what is known of its keys stays known.
        self._entries = {
            key_id: old if (old := self._entries.get(key_id)) == entry else entry for key_id, entry in entries.items()
        }
        self._known = {
            digest: known for digest, known in self._known.items() if self._entries.get(known.entry.id) is known.entry
        }
        self._wrong.clear()
        for fault in faults:
            log.error("this key is refused until its entry is right: %s", fault)

    def _note(self, trouble: str) -> None:
        """Logs each trouble once, and that it is over."""
        if trouble and trouble != self._trouble:
            log.error("the keys known before stay in force: %s", trouble)
        elif self._trouble and not trouble:
            log.warning("keys are read from %s again", self._store.name)
        self._trouble = trouble
