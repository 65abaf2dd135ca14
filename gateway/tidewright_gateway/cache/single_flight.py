"""One run for all who ask for the same at the same time. Knows nothing of what is asked for, and keeps nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")


class Flight(Generic[T]):
    """A run in a task of its own, and all that came of it so far. Belongs to the event loop that it was made in."""

    def __init__(self, run: Callable[[], AsyncGenerator[T, None]], ended: Callable[[Flight[T]], None]) -> None:
        """`ended`: called once, when the run has ended, was given up, or has failed."""
        self.items: list[T] = []
        self.has_landed = False
        self._news = asyncio.Event()  # set for a moment only, to wake who waits
        self._subscribers = 0
        self._job = asyncio.create_task(self._fly(run))
        self._job.add_done_callback(lambda job: self._land(ended))

    @property
    def is_open(self) -> bool:
        """It can be joined: it has not landed, and not all have left."""
        return self._subscribers > 0 and not self.has_landed

    def join(self) -> Subscription[T]:
        self._subscribers += 1
        return Subscription(self)

    async def leave(self) -> None:
        """The last one that leaves ends the run."""
        self._subscribers -= 1
        if not self._subscribers:
            self._job.cancel()
            while not self.has_landed:
                await self.change()

    async def change(self) -> None:
        """There is another item, or it has landed."""
        await self._news.wait()

    def result(self) -> None:
        """Once it has landed: raises what the run failed with."""
        self._job.result()

    async def _fly(self, run: Callable[[], AsyncGenerator[T, None]]) -> None:
        async with aclosing(run()) as items:
            async for item in items:
                self.items.append(item)
                self._wake()

    def _land(self, ended: Callable[[Flight[T]], None]) -> None:
        if not self._job.cancelled():
            self._job.exception()  # or asyncio logs it, should nobody be there to get it
        self.has_landed = True
        ended(self)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news.clear()


class Subscription(AsyncIterator[T]):
    """Every item from the first on, at its reader's pace; then the error, if the run failed.

    Close it, also if nothing was read: a flight lasts as long as one that joined has not left.
    """

    def __init__(self, flight: Flight[T]) -> None:
        self._flight, self._position, self._has_left = flight, 0, False

    async def __anext__(self) -> T:
        flight = self._flight
        if self._position < len(flight.items):
            await asyncio.sleep(0)  # who joins late has much to read, and must let others work meanwhile
        while self._position == len(flight.items):
            if flight.has_landed:
                flight.result()
                raise StopAsyncIteration
            await flight.change()
        self._position += 1
        return flight.items[self._position - 1]

    async def aclose(self) -> None:
        if not self._has_left:
            self._has_left = True
            await self._flight.leave()
