"""API keys and their entries: what a key looks like, what is kept of it, and whether one fits."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated

import msgspec

from tidewright.schema import MAX_WEIGHT
from tidewright_gateway.auth.callers import ANONYMOUS, Caller, Limits, Role

KEY_PREFIX = "tw-"
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_SECRET_BYTES = 32
# Each secret has the same length, so that its own hyphens and those of the id can't be mistaken for the one between.
_KEY = re.compile(rf"{KEY_PREFIX}({_ID})-([A-Za-z0-9_-]{{43}})")
MOST_HASHES = 2

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_OLD_HASH = "$argon2"  # what older versions kept


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that is kept of a key. ValueError, if made with what can't be right."""

    id: str
    hashes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MOST_HASHES)]
    """Of the newest secret, and during a rotation of the one before."""
    role: Role = Role.USE
    limits: Limits = Limits()
    user_limits: Limits = Limits()
    priority: Annotated[int, msgspec.Meta(ge=-1_000_000, le=1_000_000)] = 0
    weight: Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)] = 1
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    disabled: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(_ID, self.id):
            raise ValueError(
                f"{self.id!r} can't be an id: it is 1 to 64 letters, digits, dots, hyphens and underscores, "
                "and begins with a letter or digit"
            )
        if self.id == ANONYMOUS.key_id:
            raise ValueError(f"the id {self.id} is taken: it names callers without a key; choose another")
        for text in self.hashes:
            if not _HASH.fullmatch(text) and not text.startswith(_OLD_HASH):
                raise ValueError("one of the hashes is no sha256:...; `tidewright keys rotate` makes a new one")

    @property
    def is_outdated(self) -> bool:
        """Its newest secret is of a version that hashed otherwise: no key fits until it is rotated."""
        return self.hashes[0].startswith(_OLD_HASH)

    @property
    def caller(self) -> Caller:
        return Caller(self.id, self.role, self.limits, self.user_limits, self.priority, self.weight)

    @property
    def state(self) -> str:
        """In a word or three."""
        if self.is_outdated:
            return "to be rotated"
        return "disabled" if self.disabled else "expired" if self.trouble else "good"

    @property
    def trouble(self) -> str:
        """Why a key that fits is refused all the same; empty if it is not."""
        if self.disabled:
            return "this key is disabled; ask whoever gave it to you"
        if self.expires and self.expires <= datetime.now(timezone.utc):
            return f"this key expired at {self.expires.isoformat()}; ask for a new one"
        return ""


def make_key(key_id: str) -> tuple[str, str]:
    """A new key, which is to be shown once, and the hash of its secret, which is to be kept."""
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    return f"{KEY_PREFIX}{key_id}-{secret}", _hash(secret)


def split_key(key: str) -> tuple[str, str] | None:
    """Its id and secret, if it looks like a key at all."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2]) if match else None


def fits(secret: str, hashes: Sequence[str]) -> bool:
    """Compares in constant time. 256 random bits can't be guessed, so their hash need not be slow, as a password's."""
    own = _hash(secret)
    return any(hmac.compare_digest(own, text) for text in hashes)


def _hash(secret: str) -> str:
    return f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
