"""A store in another process, which can go away and come back.

Nobody waits for it while it is gone. What could not be settled meanwhile, and what was perhaps taken for a request that
did not hear so, is settled when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol, TypeVar

from tidewright_gateway.admission.limits.store import (
    Settle,
    StoreLostError,
    StoreRefusesError,
    Subject,
    Take,
    TakeResult,
)
from tidewright_gateway.trouble import STORE, Trouble

log = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT, STEPS = 0.25, 10  # seconds for an answer, and in how many steps they are waited for
TICK = 1.0  # seconds between two tries to reach it
RENEW_INTERVAL = 15.0  # seconds
# Questions. The others wait here, where no timeout runs, and see that it is lost as soon as one of them does.
AT_A_TIME = 8
PATIENCE = 5.0  # seconds that one waits so, of a store that answers each in time, but slowly
UNSETTLED = 100_000  # that are remembered while it is gone; the oldest are forgotten


class StoreBusyError(StoreLostError):
    """Too many wait for its answers; it is not gone."""


class Link(Protocol):
    """Its methods raise StoreLostError or StoreRefusesError. None of them has a timeout of its own."""

    async def connect(self) -> None:
        """Anew, and ask whether it answers."""
        ...

    async def ping(self) -> None:
        """Ask whether it answers."""
        ...

    async def take(self, take: Take) -> TakeResult: ...

    async def settle(self, settle: Settle) -> None: ...

    async def renew(self, held: Sequence[tuple[str, tuple[Subject, ...]]]) -> None:
        """Reservations, by id, that go on."""
        ...

    async def close(self) -> None: ...


class Remote:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._lost = False
        self._trouble = Trouble(log, "the store of limits works again", events=STORE, store="limits")
        self._slots = asyncio.Semaphore(AT_A_TIME)
        self._held: dict[str, tuple[Subject, ...]] = {}
        self._unsettled: deque[Settle] = deque(maxlen=UNSETTLED)
        self._job: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str:
        """Why limits are not counted as they should be; empty if they are."""
        return self._trouble.text

    async def start(self) -> None:
        try:
            await _in_time(self._link.connect())
        except (StoreLostError, StoreRefusesError) as error:
            self._note(error)
        self._job = asyncio.create_task(self._look_after_it())

    async def close(self) -> None:
        if self._job:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)
        await self._link.close()

    async def take(self, take: Take) -> TakeResult:
        async with self._turn():
            self._check()
            try:
                result = await _in_time(self._link.take(take))
            except BaseException as error:  # such as a client that leaves
                if take.id not in self._held:  # else it ends with the request
                    self._unsettled.append(Settle(take.id, take.subjects, 0))
                self._note(error)
                raise
        self._note(None)
        if not result.refusal:
            self._held[take.id] = take.subjects
        return result

    async def settle(self, settle: Settle) -> None:
        """Later, if the store is gone, or refuses: this raises nothing of it."""
        self._held.pop(settle.id, None)
        try:
            async with self._turn():
                self._check()
                await _in_time(self._link.settle(settle))
        except BaseException as error:
            self._unsettled.append(settle)
            self._note(error)
            if not isinstance(error, StoreLostError | StoreRefusesError):
                raise

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """Raises StoreBusyError: it did not come in time."""
        if self._slots.locked():
            turn = asyncio.ensure_future(self._slots.acquire())
            try:
                await asyncio.wait({turn}, timeout=PATIENCE)
                if not turn.done():
                    raise StoreBusyError(f"no turn within {PATIENCE:g} s")
            except BaseException:
                turn.add_done_callback(self._forgo)
                turn.cancel()
                raise
        else:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    def _forgo(self, turn: asyncio.Future[Literal[True]]) -> None:
        """It may have come in the same moment."""
        if not turn.cancelled():
            self._slots.release()

    def _check(self) -> None:
        if self._lost:
            raise StoreLostError("gone, as was seen before")

    def _note(self, error: BaseException | None) -> None:
        """What a question ended with."""
        trouble = ""
        if isinstance(error, StoreLostError):
            if self._lost or isinstance(error, StoreBusyError):
                return
            self._lost, trouble = True, f"the store of limits is gone: {error}"
        elif isinstance(error, StoreRefusesError):
            trouble = f"the store of limits can't do its work: {error}"
        elif error is not None:
            return
        self._trouble.note(trouble)

    async def _look_after_it(self) -> None:
        renewed_at = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            try:
                if self._lost:
                    await _in_time(self._link.connect())
                    self._lost = False
                    self._note(None)
                else:  # probes are to know before the next request with limits finds out
                    await _in_time(self._link.ping())
                for _ in range(len(self._unsettled)):
                    await self.settle(self._unsettled.popleft())
                    self._check()
                if time.monotonic() - renewed_at >= RENEW_INTERVAL:
                    await _in_time(self._link.renew(list(self._held.items())))
                    renewed_at = time.monotonic()
            except (StoreLostError, StoreRefusesError) as error:
                self._note(error)
            except Exception:
                log.exception("the store of limits could not be looked after")


async def _in_time(answer: Coroutine[Any, Any, T]) -> T:
    # Not wait_for: before Python 3.12, it loses the cancelling of who waits if the answer comes at the same time.
    asking = asyncio.create_task(answer)
    try:
        # In steps, each of which reads what has come: an event loop that is late, not the store, makes them longer.
        for _ in range(STEPS):
            done, _pending = await asyncio.wait({asking}, timeout=TIMEOUT / STEPS)
            if done:
                return asking.result()
    finally:
        asking.cancel()
    raise StoreLostError(f"no answer within {TIMEOUT:g} s")
