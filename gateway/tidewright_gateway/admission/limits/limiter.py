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
from tidewright_gateway.admission.limits.store import (
    LimitName,
    Settle,
    Store,
    StoreLostError,
    StoreRefusesError,
    Subject,
    Take,
    TakeResult,
)
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

log = logging.getLogger(__name__)

_NO_LIMITS = Limits()


class Reservation:
    """What a request may use; give it to `Limiter.settle` when the request ends, however it ends."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.subjects: tuple[Subject, ...] = ()
        """Those that have limits."""
        self.cost = 0
        """Tokens, so far."""
        self.result: TakeResult | None = None
        """What the store said last."""

    @cached_property
    def headers(self) -> dict[str, str]:
        """For the answer, as of its beginning; empty if nothing limits the request."""
        return headers_of(self.subjects, self.result) if self.result else {}


class Limiter:
    """A request is reserved before anything is done for it, its tokens as soon as they are counted, more while it runs.

    What a request needs is a reservation from all its subjects, or from none.
    """

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

    @property
    def trouble(self) -> str:
        """Why limits are not counted as they should be; empty if they are."""
        return self._store.trouble

    async def reserve(self, subjects: Sequence[Subject], cost: int = 0) -> Reservation:
        """A request of these subjects. `cost`: tokens that it may use, as far as known.

        Raises:
            ApiError: 429, a subject has too little; 503, the store refuses, or is gone and limits_when_lost is
                "closed".
        """
        reservation = Reservation(f"{self._prefix}{next(self._numbers)}")
        await self.extend(reservation, subjects, cost)
        return reservation

    async def extend(self, reservation: Reservation, subjects: Sequence[Subject], cost: int) -> None:
        """So many tokens more, from these subjects as well; one that is there already gives tokens only.

        Raises:
            ApiError: as `reserve`; what was reserved stays so.
        """
        limited = tuple(subject for subject in subjects if subject.limits != _NO_LIMITS)
        if not limited and not reservation.subjects:
            return  # nothing limits it
        # Before it is asked: whether it was taken from a store that does not answer in time is not known.
        reservation.subjects = tuple(dict.fromkeys((*reservation.subjects, *limited)))
        result = await self._take(reservation, cost)
        if result is None:
            return
        if result.refusal:
            raise refused(reservation.subjects, reservation.cost + cost, result, result.refusal)
        reservation.result, reservation.cost = result, reservation.cost + cost

    async def grow(self, reservation: Reservation, cost: int) -> LimitName | None:
        """So many tokens more, while it runs; the limit that is in the way, if one is."""
        if not reservation.subjects:
            return None
        result = await self._take(reservation, cost)
        if result is not None and result.refusal:
            return result.refusal.limit
        reservation.cost += cost
        return None

    async def settle(self, reservation: Reservation, used: int) -> None:
        """Gives back what was not used. `used`: tokens of prompt and answers. The second time it does nothing."""
        if reservation.subjects:
            await self._store.settle(Settle(reservation.id, reservation.subjects, used))

    async def _take(self, reservation: Reservation, cost: int) -> TakeResult | None:
        """None: the store is gone, and requests are served all the same."""
        try:
            return await self._store.take(Take(reservation.id, reservation.subjects, cost))
        except StoreLostError:
            self.without_store += 1
            if self._when_lost == "open":
                return None
        except StoreRefusesError:  # whoever can fill a store must not be able to switch limits off
            self.without_store += 1
        message = "limits can't be checked right now; try again"
        raise ApiError(503, message, code="limits_unavailable", retry_after=TICK, limit="limits_unavailable")


def make_limiter(settings: GatewaySettings, socket_path: Path | None = None) -> Limiter:
    """With the store that the settings name; else that of the LimitServer at `socket_path`; else in this process."""
    store: Store = MemoryStore()
    if settings.limits_store:
        from tidewright_gateway.admission.limits.redis_store import RedisLink  # slow to import

        store = Remote(RedisLink(settings.limits_store))
    elif socket_path:
        store = Remote(SocketLink(socket_path))
    return Limiter(store, settings.limits_when_lost)
