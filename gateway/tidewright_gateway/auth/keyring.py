"""The API keys in force: follows their store."""

from __future__ import annotations

import asyncio
import logging

from tidewright.logs import event
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.auth.errors import WRONG, unauthorized
from tidewright_gateway.auth.keys import KeyEntry, fits, split_key
from tidewright_gateway.auth.stores import KeyStore
from tidewright_gateway.trouble import KEYS, NO_KEYS, Trouble

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.5  # seconds


class Keyring:
    def __init__(self, store: KeyStore, is_alone: bool) -> None:
        """Reads the store. `is_alone`: nobody can call without a key of it.

        Raises:
            AuthSetupError: it can't be read.
        """
        self._store, self._is_needed = store, is_alone
        self._entries: dict[str, KeyEntry] = {}
        over, effect = f"keys are loaded from {store.name} again", "keeping the previously loaded keys: "
        self._trouble = Trouble(log, over, effect, KEYS)
        self._emptiness = Trouble(log, f"{store.name} has keys again", "", NO_KEYS)
        self._polling: asyncio.Task[None] | None = None
        if found := store.read():
            self._put(*found)

    @property
    def trouble(self) -> str:
        """Why the keys in force may not be those of the store any more; empty if they are."""
        return self._trouble.text or self._emptiness.text

    @property
    def is_empty(self) -> bool:
        """There are no keys, although there should be some."""
        return bool(self._emptiness.text)

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._polling:
            self._polling.cancel()
            await asyncio.wait((self._polling,))

    @property
    def next_expiry(self) -> float:
        """When the next key expires, in Unix time; 0 if none is to expire."""
        good = (entry.expires for entry in self._entries.values() if entry.expires and not entry.trouble)
        return min((expires.timestamp() for expires in good), default=0.0)

    async def caller(self, key: str) -> Caller:
        """Raises ApiError, 401: the key is wrong, expired or disabled."""
        key_id, secret = split_key(key) or ("", "")
        entry = self._entries.get(key_id)
        if not fits(secret, entry.hashes if entry else ()) or entry is None:
            raise unauthorized(WRONG)
        if trouble := entry.trouble:
            raise unauthorized(trouble)
        return entry.caller

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            try:
                if found := await asyncio.to_thread(self._store.read):
                    self._put(*found)
                self._trouble.note("")
            except Exception as error:  # whatever it is, a key that is revoked later must be seen
                self._trouble.note(str(error))

    def _put(self, entries: dict[str, KeyEntry], faults: list[str]) -> None:
        outdated = [entry.id for entry in entries.values() if entry.is_outdated]
        for key_id in outdated:
            if not (known := self._entries.get(key_id)) or not known.is_outdated:
                log.error(
                    "the key %s is of an older version and is refused: `tidewright keys rotate %s`",
                    key_id,
                    key_id,
                    extra=event("key_rejected", key_id=key_id),
                )
        for fault in faults:
            log.error("rejecting a key with an invalid entry: %s", fault, extra=event("key_rejected"))
        self._entries = entries
        self._is_needed |= bool(entries)  # once there were keys, somebody has them
        text = f"{self._store.name} has no keys, so every API key is refused: restore it, or create keys"
        self._emptiness.note("" if entries or not self._is_needed else text)
