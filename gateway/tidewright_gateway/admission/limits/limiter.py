"""What the gateway asks: reserve before a request, settle after it, whatever store counts and whether it is there."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal

from tidewright_gateway.admission.limits.headers import headers_of, refused
from tidewright_gateway.admission.limits.memory import MemoryStore
from tidewright_gateway.admission.limits.remote import TICK, Remote
from tidewright_gateway.admission.limits.shared import SocketLink
from tidewright_gateway.admission.limits.store import Settle, Store, StoreLostError, Subject, Take, TakeResult
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

log = logging.getLogger(__name__)

_NO_LIMITS = Limits()


class Reservation:
    """What a request may use; give it to `Limiter.settle` when the request ends, however it ends."""

    def __init__(self, take: Take | None = None, outcome: TakeResult | None = None) -> None:
        """Of nothing, if nothing limits the request."""
        self.take, self._outcome = take, outcome

    @cached_property
    def headers(self) -> dict[str, str]:
        """For the answer; empty if nothing limits the request."""
        return headers_of(self.take.subjects, self._outcome) if self.take and self._outcome else {}


class Limiter:
    def __init__(self, store: Store, when_lost: Literal["open", "closed"] = "open") -> None:
        self._store, self._when_lost = store, when_lost
        self._prefix, self._numbers = secrets.token_hex(8), count()
        self.without_store = 0
        """Requests that were served ("open") or refused ("closed") because the store was gone."""

    async def start(self) -> None:
        """In the event loop that will use it. A store that is not there yet is no error."""
        await self._store.start()

    async def close(self) -> None:
        await self._store.close()

    async def reserve(self, subjects: Sequence[Subject], cost: int) -> Reservation:
        """From all subjects, or from none. `cost`: tokens of the prompt and of the longest answers.

        Raises:
            ApiError: 429, a subject has too little; 503, the store is gone and limits_when_lost is "closed".
        """
        limited = tuple(subject for subject in subjects if subject.limits != _NO_LIMITS)
        if not limited:
            return Reservation()
        take = Take(f"{self._prefix}{next(self._numbers)}", limited, cost)
        try:
            outcome = await self._store.take(take)
        except StoreLostError:
            self.without_store += 1
            if self._when_lost == "open":
                return Reservation()
            message = "limits can't be checked at the moment; try again"
            raise ApiError(503, message, code="limits_unavailable", retry_after=TICK) from None
        if outcome.refusal:
            raise refused(limited, cost, outcome, outcome.refusal)
        return Reservation(take, outcome)

    async def settle(self, reservation: Reservation, used: int) -> None:
        """Gives back what was not used. `used`: tokens of prompt and answers. The second time it does nothing."""
        if take := reservation.take:
            await self._store.settle(Settle(take.id, take.subjects, used))


def make_limiter(settings: GatewaySettings, socket_path: Path | None = None) -> Limiter:
    """With the store that the settings name; else that of the LimitServer at `socket_path`; else in this process."""
    store: Store = MemoryStore()
    if settings.limits_store:
        from tidewright_gateway.admission.limits.redis_store import RedisLink  # slow to import

        store = Remote(RedisLink(settings.limits_store))
    elif socket_path:
        store = Remote(SocketLink(socket_path))
    return Limiter(store, settings.limits_when_lost)
