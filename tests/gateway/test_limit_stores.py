"""limits/: the stores outside of this process, each as it is: a Redis, a parent and its workers, that are killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.test_limits import LIMITS, START, STEPS, Clock
from helpers.redis import RunningRedis
from tidewright_gateway.callers import Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.errors import ApiError
from tidewright_gateway.limits import Limiter, LimitServer, Reservation, Subject, make_limiter, remote
from tidewright_gateway.limits.memory import MemoryStore
from tidewright_gateway.limits.redis_store import PREFIX, RedisLink
from tidewright_gateway.limits.remote import Remote
from tidewright_gateway.limits.store import Settle, Take

ONE = [Subject("key a", Limits(concurrent=1))]
"""One at a time."""
WITHOUT_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]  # it takes minutes


@pytest.fixture(scope="module")
def redis() -> Iterator[RunningRedis]:
    with RunningRedis() as running:
        yield running


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is not a store that is gone; where that is meant, connections break, or the test says so."""
    monkeypatch.setattr(remote, "TIMEOUT", 3600)


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TICK", 0.05)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def passes(limiter: Limiter, subjects: list[Subject] = ONE, cost: int = 1) -> Reservation | None:
    """None if it is over a limit."""
    try:
        return await limiter.reserve(subjects, cost)
    except ApiError as error:
        if error.status == 429:
            return None
        raise


def test_redis_and_memory_agree(redis: RunningRedis) -> None:
    loop, clock = asyncio.new_event_loop(), Clock()
    link = RedisLink(redis.url, clock, lease=1e6)

    @settings(max_examples=25, phases=WITHOUT_SHRINKING, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.tuples(LIMITS, LIMITS), STEPS)
    def compare(limits: tuple[Limits, Limits], steps: list) -> None:
        redis.client.flushall()
        clock.now = START
        memory = MemoryStore(clock)
        running: list[Take] = []
        for step, (pause, (which, number)) in enumerate(steps):
            clock.now += pause
            if which:
                # From the tenth step on, each has the limits of the other.
                subjects = tuple(Subject(f"s{bit}", limits[bit ^ (step > 9)]) for bit in (0, 1) if which >> bit & 1)
                take = Take(f"r{step}", subjects, number)
                ours, theirs = (loop.run_until_complete(store.take(take)) for store in (memory, link))
                assert (theirs.refusal is None) == (ours.refusal is None)
                if ours.refusal and theirs.refusal:
                    assert (theirs.refusal.subject, theirs.refusal.limit) == (ours.refusal.subject, ours.refusal.limit)
                    assert theirs.refusal.wait == pytest.approx(ours.refusal.wait)
                else:
                    running.append(take)
                for one, other in zip(ours.usages, theirs.usages, strict=True):
                    assert (other.concurrent, other.day) == (one.concurrent, one.day)
                    assert (other.requests, other.tokens) == pytest.approx((one.requests, one.tokens), abs=1e-6)
            elif running:
                # Every third one stays, and is settled once more, or with more than it reserved.
                take = running[number % len(running)] if number % 3 == 0 else running.pop(number % len(running))
                for store in (memory, link):
                    loop.run_until_complete(store.settle(Settle(take.id, take.subjects, number)))

    compare()
    loop.run_until_complete(link.close())
    loop.close()


def test_several_gateways_share_what_redis_counts(redis: RunningRedis) -> None:
    async def scenario() -> None:
        gateways = [make_limiter(GatewaySettings(limits_store=redis.url)) for _ in range(3)]
        for gateway in gateways:
            await gateway.start()
        subjects = [Subject("key shared", Limits(concurrent=5, tokens_per_day=10**6))]
        got = await asyncio.gather(*(passes(gateway, subjects, 10) for gateway in gateways for _ in range(40)))
        assert sum(reservation is not None for reservation in got) == 5
        # Whose reservation it is is known to itself; any gateway can settle it, once.
        for reservation in got:
            if reservation:
                await gateways[0].settle(reservation, 3)
        reservation = await gateways[2].reserve(subjects, 10**6 - 15)
        assert reservation.headers["X-RateLimit-Remaining-Tokens"] == "0"
        # Every key goes by itself.
        keys = redis.client.keys(f"{PREFIX}*")
        assert keys
        assert all(redis.client.ttl(key) > 0 for key in keys)
        for gateway in gateways:
            assert gateway.without_store == 0
            await gateway.close()

    asyncio.run(scenario())


def test_the_places_of_a_gateway_that_was_killed_come_back(redis: RunningRedis) -> None:
    async def scenario() -> None:
        clock = Clock()
        dead, alive = (RedisLink(redis.url, clock, lease=60) for _ in range(2))
        subjects = (Subject("key of the dead", Limits(concurrent=2, tokens_per_day=100)),)
        assert (await dead.take(Take("dead", subjects, 30))).refusal is None
        assert (await alive.take(Take("alive", subjects, 30))).refusal is None
        for _ in range(3):
            clock.now += 45
            await alive.renew([("alive", subjects), ("settled before", subjects)])
        outcome = await alive.take(Take("next", subjects, 40))
        # Nobody can tell what the dead one used, so all of it.
        assert outcome.refusal is None
        assert (outcome.usages[0].concurrent, outcome.usages[0].day) == (2, 100)
        await dead.close()
        await alive.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick_ticks")
def test_a_gateway_that_runs_renews_what_it_holds(redis: RunningRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RENEW_INTERVAL", 0.0)

    async def scenario() -> None:
        clock = Clock()
        store = Remote(RedisLink(redis.url, clock))
        limiter = Limiter(store)
        await limiter.start()
        reservation = await limiter.reserve([Subject("key renewed", Limits(concurrent=1))], 1)
        clock.now += 50
        places = f"{PREFIX}key renewed:places"

        async def renewed() -> bool:
            return redis.client.zrange(places, 0, -1, withscores=True)[0][1] == clock.now + 60

        await until(renewed)
        await limiter.settle(reservation, 1)
        assert redis.client.zcard(places) == 0
        assert not store._held  # would be renewed for ever
        await limiter.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick_ticks")
@pytest.mark.parametrize("when_lost", ["open", "closed"])
def test_redis_goes_and_comes_back(when_lost: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: RunningRedis) -> None:
        limiter = make_limiter(GatewaySettings(limits_store=redis.url, limits_when_lost=when_lost))
        await limiter.start()
        assert await passes(limiter)
        assert not await passes(limiter)
        redis.kill()
        for _ in range(5):
            if when_lost == "open":
                reservation = await limiter.reserve(ONE, 1)
                assert reservation.headers == {}
                await limiter.settle(reservation, 1)
            else:
                with pytest.raises(ApiError, match="can't be checked") as refused:
                    await limiter.reserve(ONE, 1)
                assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "1")
        assert limiter.without_store == 5
        await asyncio.sleep(0.2)  # some tries to reach it, of which the log has nothing
        # Who has no limits is served in any case.
        assert await limiter.reserve([Subject("key free", Limits())], 1)
        redis.start()
        await until(lambda: limits_apply(limiter))
        await limiter.close()

    with RunningRedis() as redis:
        asyncio.run(scenario(redis))
    assert [record.message.split(":")[0] for record in caplog.records if "store" in record.message] == [
        "the store of limits is gone",
        "the store of limits is back",
    ]


async def limits_apply(limiter: Limiter) -> bool:
    """Of two at once, one."""
    try:
        both = [await passes(limiter), await passes(limiter)]
    except ApiError:  # a 503
        return False
    for reservation in both:
        if reservation:
            await limiter.settle(reservation, 1)
    return None in both


@pytest.mark.usefixtures("quick_ticks")
def test_a_redis_that_hangs_is_waited_for_once(redis: RunningRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was settled meanwhile, or was taken without an answer, is settled when it goes on."""
    subjects = [Subject("key that waits", Limits(concurrent=2, tokens_per_day=1000))]

    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_store=redis.url))
        await limiter.start()
        running = await limiter.reserve(subjects, 500)
        redis.freeze()
        monkeypatch.setattr(remote, "TIMEOUT", 0.25)
        try:
            began = time.monotonic()
            await asyncio.gather(*(limiter.reserve(subjects, 100) for _ in range(300)))
            for _ in range(20):
                await limiter.reserve(subjects, 100)
            # 320 timeouts would be 80 s, and 10 s if eight at a time paid them.
            assert time.monotonic() - began < 5
            assert limiter.without_store == 320
            await limiter.settle(running, 200)
        finally:
            redis.thaw()
            monkeypatch.setattr(remote, "TIMEOUT", 3600)
        await until(lambda: all_is_back(limiter, 800))
        await limiter.close()

    async def all_is_back(limiter: Limiter, rest: int) -> bool:
        reservation = await passes(limiter, subjects, rest)
        if not reservation or not reservation.headers:
            return False
        assert redis.client.zcard(f"{PREFIX}key that waits:places") == 1
        await limiter.settle(reservation, rest)
        return True

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick_ticks")
def test_a_client_that_leaves_while_it_is_asked_for_leaves_nothing(redis: RunningRedis) -> None:
    subjects = [Subject("key that leaves", Limits(concurrent=1))]

    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_store=redis.url))
        await limiter.start()
        await limiter.settle(await limiter.reserve(subjects, 1), 1)
        for steps in range(1, 12):
            asking = asyncio.create_task(limiter.reserve(subjects, 1))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            try:
                await limiter.settle(await asking, 1)
            except asyncio.CancelledError:
                pass
            except ApiError:  # one before is not undone yet
                continue

        async def is_free() -> bool:
            return redis.client.zcard(f"{PREFIX}key that leaves:places") == 0

        await until(is_free)
        await limiter.close()

    asyncio.run(scenario())


PARENT = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from tidewright_gateway.limits import LimitServer

    async def main():
        async with LimitServer(Path(sys.argv[1])):
            print("up", flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
    """
)
# Takes as often as it can, says how often that was, and holds all of it until its input ends.
WORKER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from tidewright_gateway.callers import Limits
    from tidewright_gateway.config import GatewaySettings
    from tidewright_gateway.errors import ApiError
    from tidewright_gateway.limits import Subject, make_limiter, remote

    remote.TIMEOUT = 3600

    async def main():
        limiter = make_limiter(GatewaySettings(), Path(sys.argv[1]))
        await limiter.start()
        subjects = [Subject("key a", Limits(concurrent=30, tokens_per_day=3000))]

        async def one():
            try:
                return await limiter.reserve(subjects, 100)
            except ApiError:
                return None

        got = await asyncio.gather(*(one() for _ in range(200)))
        print(sum(each is not None for each in got), flush=True)
        await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
    """
)


class Process(subprocess.Popen):
    """A Python process that prints a line when it is ready, and is killed at the end."""

    def __init__(self, code: str, path: Path) -> None:
        super().__init__([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def line(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().decode().strip()

    def __exit__(self, *exception: object) -> None:
        self.kill()
        super().__exit__(*exception)  # type: ignore[arg-type]


def test_workers_share_what_their_parent_counts(tmp_path: Path) -> None:
    path = tmp_path / "limits"

    async def what_is_free(places: int) -> None:
        """Exactly so many places, and a hundred tokens for each: nobody knows what the dead used of them."""
        limiter = make_limiter(GatewaySettings(), path)
        await limiter.start()
        subjects = [Subject("key a", Limits(concurrent=30, tokens_per_day=3000))]
        got = [await passes(limiter, subjects, 100) for _ in range(40)]
        assert sum(reservation is not None for reservation in got) == places
        assert limiter.without_store == 0
        await limiter.close()  # and with it all of these

    with Process(PARENT, path) as parent:
        assert parent.line() == "up"
        assert path.stat().st_mode & 0o777 == 0o600
        with Process(WORKER, path) as one, Process(WORKER, path) as other:
            got = [int(one.line()), int(other.line())]
            assert sum(got) == 30
            killed, kept = (one, other) if got[0] > got[1] else (other, one)
            killed.kill()
            killed.wait()
            asyncio.run(what_is_free(max(got)))
            kept.kill()
            kept.wait()
            asyncio.run(what_is_free(30))


@pytest.mark.usefixtures("quick_ticks")
@pytest.mark.parametrize("when_lost", ["open", "closed"])
def test_the_parent_dies_and_comes_back(tmp_path: Path, when_lost: str) -> None:
    path = tmp_path / "limits"

    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_when_lost=when_lost), path)
        await limiter.start()  # it is not there yet
        assert await is_lost(limiter)
        with Process(PARENT, path) as parent:
            assert parent.line() == "up"
            await until(lambda: limits_apply(limiter))
            held = await limiter.reserve(ONE, 1)
        assert await is_lost(limiter)
        with Process(PARENT, path) as parent:
            assert parent.line() == "up"
            await until(lambda: limits_apply(limiter))
            # The new one knows nothing of it, and lets nobody end another's place with it.
            assert await passes(limiter)
            await limiter.settle(held, 1)
            assert not await passes(limiter)
            await limiter.close()

    async def is_lost(limiter: Limiter) -> bool:
        before = limiter.without_store
        if when_lost == "open":
            assert (await limiter.reserve(ONE, 1)).headers == {}
        else:
            with pytest.raises(ApiError, match="can't be checked"):
                await limiter.reserve(ONE, 1)
        return limiter.without_store == before + 1

    asyncio.run(scenario())


def test_the_parent_keeps_nothing_of_what_was_settled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with LimitServer(tmp_path / "limits") as server:
            limiter = make_limiter(GatewaySettings(), tmp_path / "limits")
            await limiter.start()
            reservation = await limiter.reserve(ONE, 1)
            assert [len(held) for held in server._held.values()] == [1]
            await limiter.settle(reservation, 1)
            assert [len(held) for held in server._held.values()] == [0]
            await limiter.close()

    asyncio.run(scenario())


def test_connecting_to_redis_again_uses_no_old_connection(redis: RunningRedis) -> None:
    def connections() -> set[str]:
        return {client["id"] for client in redis.client.client_list() if client["name"] == "again"}

    async def scenario() -> None:
        link = RedisLink(f"{redis.url}?client_name=again")
        await link.connect()
        old = connections()
        await link.connect()
        assert old
        assert not old & connections()
        await link.close()

    asyncio.run(scenario())


def test_who_speaks_something_else_is_cut_off_and_nobody_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with LimitServer(tmp_path / "limits"):
            limiter = make_limiter(GatewaySettings(), tmp_path / "limits")
            await limiter.start()
            assert await passes(limiter)
            for garbage in (b"\0\0\0\3abc", b"\0\0\0\0", b"\0\0\1\0short"):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "limits")
                writer.write(garbage)
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert not await passes(limiter)
            await limiter.close()

    asyncio.run(scenario())
