"""Who asks, and how much they may ask for. Made by whatever checks keys; read by limits, cache, queue and log."""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Annotated

import msgspec

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class Role(Enum):
    USE = "use"
    ADMIN = "admin"
    """May use the admin endpoints as well."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """None is no limit. Tokens are those of prompt and answer together."""

    requests_per_second: _Positive | None = None
    concurrent: _Count | None = None
    """Requests that run or wait at one time."""
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None

    @property
    def of_tokens(self) -> list[int]:
        return [limit for limit in (self.tokens_per_minute, self.tokens_per_day) if limit]


LOWEST_PRIORITY = 1000
"""Bound of the priority in a request."""


class Caller(msgspec.Struct, frozen=True):
    key_id: str
    """Names the key in logs; tells nothing of its secret."""
    role: Role = Role.USE
    limits: Limits = Limits()
    """Of all requests with this key."""
    user_limits: Limits = Limits()
    """Of each `user` that its requests name."""
    priority: int = 0
    """Added to the request's own; lower goes first."""
    weight: int = 1
    """Share of service, in proportion to that of other keys."""


ANONYMOUS = Caller("anonymous", Role.ADMIN)
"""Where no keys are asked for, which is on this machine only."""


def priority_of(caller: Caller, own: int) -> int:
    """Priority of the key plus the request's own, which only admins may make negative."""
    lowest = -LOWEST_PRIORITY if caller.role is Role.ADMIN else 0
    return caller.priority + min(max(own, lowest), LOWEST_PRIORITY)


def tenant_of(caller: Caller) -> str:
    """Whose share of service a request takes: the key's, whatever the request says. Without keys, all are one."""
    return "" if caller == ANONYMOUS else caller.key_id


def salt_of(caller: Caller, user: str | None, own: str | None) -> str | None:
    """Requests share a KV cache only with those of the same salt: none with those of another key or another `user`.

    By how long a first token takes, one could else learn what others have asked. `own`: what the request asks for
    itself. None: without keys, nobody is to be told from anybody.
    """
    if caller == ANONYMOUS and not user and not own:
        return None
    return hashlib.blake2b(msgspec.json.encode((caller.key_id, user, own)), digest_size=16).hexdigest()
