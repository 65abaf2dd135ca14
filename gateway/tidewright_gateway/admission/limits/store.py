"""What a store of accounts is asked, and what it answers. A store holds one account a subject."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from tidewright_gateway.auth.callers import Limits

LimitName = Literal["requests_per_second", "concurrent", "tokens_per_minute", "tokens_per_day"]
"""As the fields of `Limits`."""


class StoreLostError(Exception):
    """The store can't be reached, or does not answer in time."""


class StoreRefusesError(Exception):
    """The store is there, and can't do its work: it is full, say, or only to be read."""


class Subject(msgspec.Struct, frozen=True):
    """Whose use is counted: a key, or a user within a key."""

    name: str
    """Names the account, and the subject in messages to it."""
    limits: Limits


class Take(msgspec.Struct, frozen=True, tag=True):
    """Takes from all subjects, or from none if one of them has too little.

    A subject that holds something under this id gives more tokens to the same request; for others the request is new.
    """

    id: str
    """Of the reservation; no other has it."""
    subjects: tuple[Subject, ...]
    cost: int
    """Tokens."""


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Ends a reservation. The second time, or for one that was never made, it changes nothing."""

    id: str
    subjects: tuple[Subject, ...]
    used: int
    """Tokens."""


class Usage(msgspec.Struct, frozen=True):
    """What one subject uses, with this reservation if it was made."""

    requests: float
    """Of its bucket of requests."""
    concurrent: int
    tokens: float
    """Of its bucket of tokens a minute."""
    day: int
    """Tokens of this day."""


class Refusal(msgspec.Struct, frozen=True):
    subject: int
    """Index of the subject that has too little."""
    limit: LimitName
    wait: float | None = None
    """Seconds until it has enough if nobody takes more; None if the cost is more than it can ever have."""


class TakeResult(msgspec.Struct, frozen=True):
    now: float
    """The store's clock, in seconds since 1970 (UTC)."""
    usages: list[Usage]
    """In the order of the subjects."""
    refusal: Refusal | None = None
    """The one to wait longest for; None if the reservation was made."""


class Store(Protocol):
    """`take` raises StoreLostError or StoreRefusesError; `settle` is made good later, if it must be."""

    @property
    def trouble(self) -> str:
        """Why it does not count as it should; empty if it does."""

    async def start(self) -> None: ...

    async def take(self, take: Take) -> TakeResult: ...

    async def settle(self, settle: Settle) -> None: ...

    async def close(self) -> None: ...
