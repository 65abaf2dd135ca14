"""Equal requests at the same time share one run: joining late, leaving early, errors and cancels."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing, nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cached import HIT, MISS, SHARED, Source, answer, ask, read
from tidewright_gateway.cache.responses import Replies, ResponseCache
from tidewright_gateway.cache.single_flight import Flight, Subscription
from tidewright_gateway.replicas.triton import Reply

PATIENCE = 20.0  # seconds


def test_one_that_joins_late_gets_what_there_is_and_then_the_rest() -> None:
    async def main() -> None:
        allowed = asyncio.Semaphore(3)
        cache, source = ResponseCache(2**20, 60), Source(answer(8), allowed.acquire)
        first = cache.open(b"k", source.run)[1]
        got = [await anext(aiter(first)) for _ in range(3)]
        state, late = cache.open(b"k", source.run)
        assert state is SHARED
        assert [await anext(aiter(late)) for _ in range(3)] == got
        for _ in range(5):
            allowed.release()
        assert got + await read(late) == got + await read(first) == source.replies
        assert source.begun == 1

    asyncio.run(main())


def test_who_has_much_to_read_lets_others_work_meanwhile() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(100))
        first, late = cache.open(b"k", source.run)[1], cache.open(b"k", source.run)[1]
        await read(first)
        for replies, number in ((late, 100), (cache.open(b"k", source.run)[1], 6)):
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.ensure_future(count())
            await read(replies)
            counting.cancel()
            assert turns >= number

    asyncio.run(main())


def test_who_leaves_twice_has_left_once() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(3))
        staying, leaving = cache.open(b"k", source.run)[1], cache.open(b"k", source.run)[1]
        for _ in range(2):
            await leaving.aclose()
        assert await read(staying) == source.replies

    asyncio.run(main())


@settings(max_examples=150, deadline=None)
@given(
    length=st.shared(st.integers(1, 12), key="length"),
    others=st.shared(st.integers(1, 12), key="length").flatmap(
        lambda length: st.lists(
            st.tuples(st.integers(0, 30), st.integers(0, 4), st.integers(1, length) | st.none(), st.booleans()),
            max_size=6,
        )
    ),
    rng=st.randoms(use_true_random=False),
    fails=st.booleans(),
)
def test_whoever_stays_gets_the_whole_whoever_else_joins_and_leaves(
    length: int, others: list[tuple[int, int, int | None, bool]], rng: random.Random, fails: bool
) -> None:
    """Each joins after so many turns, reads one in so many turns, and leaves after so many or is cancelled."""

    async def main() -> None:
        async def pause() -> None:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)

        source, ended = Source(answer(length), pause), []
        source.error = ValueError("no more") if fails else None
        flight = Flight(source.run, ended.append)

        async def take(subscription: Subscription[Reply], slowness: int, limit: int | None) -> list[Reply]:
            got: list[Reply] = []
            async with aclosing(subscription):
                with pytest.raises(ValueError, match="no more") if fails and limit is None else nullcontext():
                    async for reply in subscription:
                        got.append(reply)
                        if len(got) == limit:
                            break
                        for _ in range(slowness):
                            await asyncio.sleep(0)
            return got

        async def come(turns: int, slowness: int, limit: int | None, is_cancelled: bool) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            if not flight.is_open:
                return
            subscription = flight.join()
            taking = asyncio.ensure_future(take(subscription, slowness, limit))
            if is_cancelled:
                for _ in range(slowness):
                    await asyncio.sleep(0)
                taking.cancel()
                await asyncio.wait((taking,))
            else:
                assert await taking == source.replies[:limit]

        staying = asyncio.ensure_future(take(flight.join(), rng.randrange(3), None))
        await asyncio.gather(*(come(*other) for other in others))
        assert await staying == source.replies
        await asyncio.sleep(0)
        assert (source.begun, source.running, ended) == (1, 0, [flight])
        assert not flight.is_open

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=5))
def test_the_last_one_that_leaves_ends_the_run(leavers: list[tuple[int, bool]]) -> None:
    """Each reads so many of 10, and then leaves or is cancelled; the last never comes."""

    async def main() -> None:
        source = Source(answer(10))
        steps = iter(range(9))

        async def pause() -> None:
            await (asyncio.sleep(0) if next(steps, None) is not None else asyncio.Event().wait())

        source.pause = pause
        cache = ResponseCache(2**20, 60)

        async def come(replies: Replies, number: int, is_cancelled: bool) -> None:
            async with aclosing(replies):
                for _ in range(number):
                    await anext(aiter(replies))
                if is_cancelled:
                    waiting.add(asyncio.current_task())
                    await asyncio.Event().wait()

        waiting: set[asyncio.Task | None] = set()
        opened = [cache.open(b"k", source.run) for _ in leavers]
        assert [state for state, _ in opened] == [MISS] + [SHARED] * (len(leavers) - 1)
        jobs = [asyncio.ensure_future(come(pair[1], *leaver)) for pair, leaver in zip(opened, leavers, strict=True)]

        async def settle() -> None:
            while not all(job.done() or job in waiting for job in jobs):
                await asyncio.sleep(0)

        await asyncio.wait_for(settle(), PATIENCE)
        for job, (_, is_cancelled) in zip(jobs, leavers, strict=True):
            assert job.done() is not is_cancelled
            assert source.running == (not all(job.done() for job in jobs))
            job.cancel()
            await asyncio.wait((job,))
        assert source.running == 0
        assert source.begun <= 1  # none, if all left before it began
        await asyncio.sleep(0)
        assert not cache._flights
        assert cache.num_bytes == 0

    asyncio.run(main())


def test_one_that_comes_while_a_run_is_given_up_gets_a_new_one() -> None:
    async def main() -> None:
        cache, stuck = ResponseCache(2**20, 60), Source(answer(3), asyncio.Event().wait)
        _, replies = cache.open(b"k", stuck.run)
        await asyncio.sleep(0)
        leaving = asyncio.ensure_future(replies.aclose())
        for _ in range(3):
            if stuck.running:
                await asyncio.sleep(0)
        source = Source(answer(3))
        assert await ask(cache, source) is MISS
        await leaving
        assert await ask(cache, source) is HIT

    asyncio.run(main())


def test_an_error_reaches_all_who_are_there_and_the_next_one_tries_again() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(3)[:2])
        source.error = RuntimeError("gone")
        opened = [cache.open(b"k", source.run)[1] for _ in range(3)]
        for result in await asyncio.gather(*map(read, opened), return_exceptions=True):
            assert isinstance(result, RuntimeError)
        source.error, source.replies = None, answer(3)
        assert [await ask(cache, source), await ask(cache, source)] == [MISS, HIT]
        assert source.begun == 2

    asyncio.run(main())


def test_when_the_run_itself_is_cancelled_nobody_takes_half_an_answer_for_whole() -> None:
    async def main() -> None:
        source = Source(answer(3), asyncio.Event().wait)
        flight = Flight(source.run, lambda flight: None)
        reading = asyncio.ensure_future(read(flight.join()))
        flight._job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(main())
