"""Queue for generations: by priority, then fair between callers by their weights, then by age."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome


@dataclass(eq=False)
class _Waiter:
    caller: str
    since: float
    weight: int
    turn: asyncio.Future[None]


class Place:
    """Held by a running generation; `leave` it once."""

    def __init__(self, leave: Callable[[str], None], caller: str) -> None:
        self._leave, self._caller = leave, caller

    def leave(self) -> None:
        self._leave(self._caller)


SPARE = 0.25  # of the places
LOOK_INTERVAL = 0.25  # seconds between two looks for places that have come, while somebody waits


class Queue:
    """Used by one event loop only, by whose clock times are (time.monotonic()).

    While all places are taken, a caller that would hold less than another does, by weight, gets one of a few spare
    ones: the engine, which can preempt, then decides between the two. Else it would wait until one of the other ends.
    """

    def __init__(self, capacity: Callable[[], int], max_waiting: int, max_share: float = 1.0) -> None:
        """`capacity`: current number of places; may change at any time. `max_share`: maximum share of the queue for one
        caller."""
        self._capacity, self._max_waiting = capacity, max_waiting
        self._max_of_caller = math.ceil(max_waiting * max_share)
        self._running: Counter[str] = Counter()
        self._weights: dict[str, int] = {}  # of the callers that run
        self._waiting: dict[int, dict[str, deque[_Waiter]]] = {}  # by priority (lower first), then caller; none empty
        self._look: asyncio.TimerHandle | None = None  # the next one

    @property
    def capacity(self) -> int:
        """Current number of places."""
        return self._capacity()

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for callers in self._waiting.values() for queue in callers.values())

    @property
    def waiting_by_class(self) -> Counter[str]:
        """Queued generations by the class of their priority."""
        found: Counter[str] = Counter()
        for priority, callers in self._waiting.items():
            found[priority_class(priority)] += sum(map(len, callers.values()))
        return found

    @property
    def share(self) -> float:
        """How full the queue is, from 0 to 1."""
        return self.num_waiting / self._max_waiting if self._max_waiting else 0.0

    def wait(self, now: float) -> float:
        """Seconds that the oldest has been queued."""
        heads = [queue[0].since for callers in self._waiting.values() for queue in callers.values()]
        return now - min(heads, default=now)

    def is_next(self, caller: str, priority: int, weight: int = 1) -> bool:
        """Whether a new request would get a place before all that wait now."""
        if any(other < priority for other in self._waiting):
            return False
        callers = self._waiting.get(priority, {})
        held = (self._running[caller] + 1) / weight
        return caller not in callers and all(
            (self._running[name] + 1) / queue[0].weight > held for name, queue in callers.items()
        )

    async def enter(self, caller: str, priority: int, until: float, weight: int = 1) -> Place:
        """Waits for a place. `until`: when to give up, on the loop's clock. `weight`: the caller's share.

        Raises:
            ModelError: OVERLOADED; too many wait already, or none became free in time.
        """
        if not self._waiting and self.num_running < self._capacity():
            self._run(caller, weight)
            return Place(self._leave, caller)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(caller, loop.time(), weight, loop.create_future())
        self._waiting.setdefault(priority, {}).setdefault(caller, deque()).append(waiter)
        self._admit()  # there may be more places than when the last one left, or a spare one for this caller
        if not waiter.turn.done() and (refusal := self._refusal(caller)):
            self._give_up(waiter, priority)
            raise refusal
        self._look_later()
        timer = loop.call_at(until, _time_out, waiter.turn)
        try:
            await waiter.turn
        except asyncio.TimeoutError:
            self._give_up(waiter, priority)
            waited = loop.time() - waiter.since
            message = f"queue timeout: no place became free within {waited:.1f} s"
            raise ModelError(message, Outcome.OVERLOADED, "queue_timeout") from None
        except asyncio.CancelledError:
            if waiter.turn.cancelled() or waiter.turn.exception():
                self._give_up(waiter, priority)
            else:  # its turn had come in the same moment
                self._leave(caller)
            raise
        finally:
            timer.cancel()
        return Place(self._leave, caller)

    def _refusal(self, caller: str) -> ModelError | None:
        """Why its last request may not wait."""
        if self.num_waiting > self._max_waiting:
            message, limit = f"the queue is full: {self._max_waiting} requests (max_queue)", "max_queue"
        elif sum(len(callers.get(caller, ())) for callers in self._waiting.values()) > self._max_of_caller:
            message = f"the queue is full for this key: {self._max_of_caller} requests (max_queue_share)"
            limit = "max_queue_share"
        else:
            return None
        return ModelError(message, Outcome.OVERLOADED, limit)

    def _give_up(self, waiter: _Waiter, priority: int) -> None:
        queue = self._waiting.get(priority, {}).get(waiter.caller)
        if queue and waiter in queue:  # else its turn came, too late
            queue.remove(waiter)
            self._drop_empty(priority, waiter.caller)

    def _run(self, caller: str, weight: int) -> None:
        self._running[caller] += 1
        self._weights[caller] = weight

    def _leave(self, caller: str) -> None:
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller], self._weights[caller]
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            priority = min(self._waiting)
            callers = self._waiting[priority]

            def held(name: str, callers: dict[str, deque[_Waiter]] = callers) -> tuple[float, float]:
                """What it would hold, by weight, with one more."""
                return (self._running[name] + 1) / callers[name][0].weight, callers[name][0].since

            caller = min(callers, key=held)
            if not self._has_place(held(caller)[0]):
                break
            waiter = callers[caller].popleft()
            self._drop_empty(priority, caller)
            if not waiter.turn.done():
                self._run(caller, waiter.weight)
                waiter.turn.set_result(None)

    def _look_later(self) -> None:
        """A replica that comes back brings places, and nobody who runs may leave for minutes."""
        if self._waiting and self._look is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_INTERVAL, self._look_for_places)

    def _look_for_places(self) -> None:
        self._look = None
        self._admit()
        self._look_later()

    def _has_place(self, held: float) -> bool:
        """For a caller that would then hold so much, by weight."""
        free = self._capacity() - self.num_running
        if free > 0:
            return True
        most = max((count / self._weights[name] for name, count in self._running.items()), default=0.0)
        return free > -int(SPARE * self._capacity()) and held < most

    def _drop_empty(self, priority: int, caller: str) -> None:
        callers = self._waiting[priority]
        if not callers[caller]:
            del callers[caller]
        if not callers:
            del self._waiting[priority]


def priority_class(priority: int) -> str:
    """For metrics."""
    return "normal" if priority == 0 else "high" if priority < 0 else "low"


def _time_out(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(asyncio.TimeoutError())
