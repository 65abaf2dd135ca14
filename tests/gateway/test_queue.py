"""Who gets a place next, and that no place is lost, however requests end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.admission import queue
from tidewright_gateway.admission.queue import Queue

LATER = 1e9  # on any clock


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Requests:
    """Requests that hold their place until they are told to end."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.begun: list[str] = []
        self.jobs: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def ask(self, name: str, caller: str = "a", priority: int = 0, until: float = LATER, weight: int = 1) -> None:
        self._ends[name] = asyncio.Event()
        self.jobs[name] = asyncio.create_task(self._run(name, caller, priority, until, weight))
        await settle()

    async def _run(self, name: str, caller: str, priority: int, until: float, weight: int) -> None:
        place = await self._queue.enter(caller, priority, until, weight)
        try:
            self.begun.append(name)
            await self._ends[name].wait()
        finally:
            place.leave()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settle()


def test_lower_priority_first_then_who_has_least_then_the_oldest() -> None:
    async def work() -> None:
        requests = Requests(Queue(lambda: 2, 10))
        await requests.ask("a1")
        await requests.ask("b1", "b")
        await requests.ask("a2")
        await requests.ask("a3")
        await requests.ask("b2", "b")
        await requests.ask("c1", "c")
        await requests.ask("urgent", "a", priority=-1)
        assert requests.begun == ["a1", "b1"]
        await requests.end("b1")
        assert requests.begun[2:] == ["urgent"]
        await requests.end("urgent")  # a has one still; b and c none, and b asked earlier
        assert requests.begun[3:] == ["b2"]
        await requests.end("b2")
        assert requests.begun[4:] == ["c1"]
        await requests.end("a1")
        assert requests.begun[5:] == ["a2"]
        await requests.end("c1")
        assert requests.begun[6:] == ["a3"]

    run(work())


def test_too_many_are_refused_and_nobody_waits_for_ever() -> None:
    async def work() -> None:
        queue = Queue(lambda: 1, 1)
        requests = Requests(queue)
        await requests.ask("runs")
        await requests.ask("waits", until=asyncio.get_running_loop().time() + 0.05)
        await requests.ask("refused")
        with pytest.raises(ModelError, match=r"queue is full: 1 requests \(max_queue\)") as caught:
            await requests.jobs["refused"]
        assert caught.value.outcome is Outcome.OVERLOADED
        assert queue.share == 1.0
        assert queue.wait(asyncio.get_running_loop().time() + 5) >= 5
        with pytest.raises(ModelError, match="queue timeout: no place became free within") as caught:
            await requests.jobs["waits"]
        assert caught.value.outcome is Outcome.OVERLOADED
        assert queue.num_waiting == 0
        assert queue.wait(LATER) == 0
        await requests.end("runs")
        assert queue.num_running == 0

    run(work())


def test_one_caller_can_t_fill_the_queue() -> None:
    async def work() -> None:
        queue = Queue(lambda: 1, 5, 0.4)
        requests = Requests(queue)
        for name in ("runs", "waits 1", "waits 2", "refused"):
            await requests.ask(name, priority=len(name) % 2)
        with pytest.raises(ModelError, match=r"full for this key: 2 requests \(max_queue_share\)"):
            await requests.jobs["refused"]
        await requests.ask("other", "b")
        assert queue.num_waiting == 3
        for name in ("runs", "other", "waits 1", "waits 2"):
            await requests.end(name)
        await requests.ask("again")
        await requests.end("again")

    run(work())


def test_places_follow_the_weights() -> None:
    async def work() -> None:
        requests = Requests(Queue(lambda: 8, 100))
        for number in range(40):
            await requests.ask(f"heavy {number}", "heavy", weight=3)
        for number in range(40):
            await requests.ask(f"light {number}", "light")
        for _ in range(16):
            running = [name for name in requests.begun if not requests.jobs[name].done()]
            await requests.end(running[0])
        running = [name for name in requests.begun if not requests.jobs[name].done()]
        assert Counter(name.split()[0] for name in running) == {"heavy": 6, "light": 2}
        for name in requests.jobs:
            await requests.end(name)

    run(work())


def test_a_caller_with_less_gets_one_of_the_spare_places() -> None:
    async def work() -> None:
        queue = Queue(lambda: 4, 100)
        requests = Requests(queue)
        for number in range(8):
            await requests.ask(f"flood {number}", "flood")
        await requests.ask("quiet", "quiet")
        await requests.ask("third", "third")
        await requests.ask("never", "flood")
        assert requests.begun == ["flood 0", "flood 1", "flood 2", "flood 3", "quiet"]
        await requests.end("flood 0")  # which makes no place: there was one more than there are
        assert requests.begun[5:] == ["third"]
        await requests.end("flood 1")
        assert requests.begun[6:] == []
        for name in requests.jobs:
            await requests.end(name)
        assert queue.num_running == 0

    run(work())


def test_nor_do_two_that_flood_keep_a_third_from_it_by_filling_the_queue() -> None:
    async def work() -> None:
        queue = Queue(lambda: 4, 4, 0.5)
        requests = Requests(queue)
        for number in range(4):
            for caller in "ab":
                await requests.ask(f"{caller}{number}", caller)
        assert (queue.num_running, queue.num_waiting) == (4, 4)
        await requests.ask("third", "c")
        assert requests.begun == ["a0", "b0", "a1", "b1", "third"]
        await requests.ask("fourth", "d")  # the spare place is taken, and so are those in the queue
        with pytest.raises(ModelError, match="max_queue"):
            await requests.jobs["fourth"]
        for name in requests.jobs:
            await requests.end(name)
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(work())


def test_who_would_be_the_next() -> None:
    async def work() -> None:
        queue = Queue(lambda: 2, 10)
        requests = Requests(queue)
        assert queue.is_next("a", 5)
        for name in ("a1", "a2", "a3"):
            await requests.ask(name)
        await requests.ask("b1", "b", priority=1)
        asked = (("a", 0), ("b", 0), ("c", 1), ("a", -1))
        assert [queue.is_next(*one) for one in asked] == [False, True, False, True]
        await requests.ask("b2", "b")  # which has none running, as has c, and came before
        assert not queue.is_next("c", 0)
        assert queue.is_next("c", 0, weight=2)
        for name in ("a1", "a2", "a3", "b2", "b1"):
            await requests.end(name)
        assert queue.num_running == 0

    run(work())


def test_more_places_are_used_when_somebody_asks() -> None:
    async def work() -> None:
        places = 1
        requests = Requests(Queue(lambda: places, 10))
        await requests.ask("1")
        await requests.ask("2")
        places = 3
        await requests.ask("3")
        assert sorted(requests.begun) == ["1", "2", "3"]

    run(work())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 6))
def test_no_place_is_lost_or_given_twice(seed: int, places: int, max_waiting: int) -> None:
    chance = random.Random(seed)

    async def work() -> None:
        queue = Queue(lambda: places, max_waiting)

        async def request() -> None:
            until = asyncio.get_running_loop().time() + chance.choice([0.0, 0.001, 1e3])
            place = await queue.enter(chance.choice("abc"), chance.randrange(2), until)
            try:
                assert queue.num_running <= places + places // 4
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                place.leave()

        jobs = []
        for _ in range(40):
            jobs.append(asyncio.create_task(request()))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                chance.choice(jobs).cancel()
            assert queue.num_waiting <= max_waiting
        ended = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(end, ModelError | asyncio.CancelledError | None) for end in ended), ended
        assert (queue.num_running, queue.num_waiting) == (0, 0)

    run(work())


def test_places_that_come_while_nobody_leaves_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "LOOK_INTERVAL", 0.001)
    places = [1]

    async def work() -> None:
        requests = Requests(Queue(lambda: places[0], 10))
        for name in ("first", "second", "third"):
            await requests.ask(name)
        assert requests.begun == ["first"]
        places[0] = 2  # a replica is back
        while len(requests.begun) < 2:
            await asyncio.sleep(0.001)
        assert requests.begun == ["first", "second"]
        places[0] = 3
        while len(requests.begun) < 3:
            await asyncio.sleep(0.001)
        for name in ("first", "second", "third"):
            await requests.end(name)

    run(work())
