"""limits/: a Redis that several gateways share, and that is killed and frozen."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.test_limits import GROWS, LIMITS, START, STEPS, Clock
from helpers.limiting import ONE, limits_apply, passes, until
from helpers.redis import RunningRedis
from tidewright_gateway.admission.limits import Limiter, Subject, make_limiter, remote
from tidewright_gateway.admission.limits.memory import MemoryStore
from tidewright_gateway.admission.limits.redis_store import ACCOUNTS, PLACES, RedisLink
from tidewright_gateway.admission.limits.remote import Remote, StoreBusyError
from tidewright_gateway.admission.limits.store import Settle, Take, TakeResult
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

WITHOUT_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]  # it takes minutes

pytestmark = pytest.mark.usefixtures("patient_limits")


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
            if which == GROWS and not running:
                continue
            if which:
                # From the tenth step on, each has the limits of the other.
                subjects = tuple(Subject(f"s{bit}", limits[bit ^ (step > 9)]) for bit in (0, 1) if which >> bit & 1)
                take = Take(f"r{step}", subjects, number)
                if which == GROWS:
                    take = msgspec.structs.replace(running[number % len(running)], cost=number)
                ours, theirs = (loop.run_until_complete(store.take(take)) for store in (memory, link))
                assert (theirs.refusal is None) == (ours.refusal is None)
                if ours.refusal and theirs.refusal:
                    assert (theirs.refusal.subject, theirs.refusal.limit) == (ours.refusal.subject, ours.refusal.limit)
                    assert theirs.refusal.wait == pytest.approx(ours.refusal.wait)
                elif which != GROWS:
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
        keys = [*redis.client.keys(f"{ACCOUNTS}*"), *redis.client.keys(f"{PLACES}*")]
        assert keys
        assert all(redis.client.ttl(key) > 0 for key in keys)
        for gateway in gateways:
            assert gateway.without_store == 0
            await gateway.close()

    asyncio.run(scenario())


def test_no_name_of_a_caller_is_the_places_of_another(redis: RunningRedis) -> None:
    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_store=redis.url))
        await limiter.start()
        limits = Limits(concurrent=1, tokens_per_day=10)
        for name in ("key jwt:me", "key jwt:me:places"):
            assert await passes(limiter, [Subject(name, limits)])
        assert not limiter.trouble
        await limiter.close()

    asyncio.run(scenario())


def test_a_store_that_is_full_switches_no_limits_off(redis: RunningRedis) -> None:
    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_store=redis.url))
        await limiter.start()
        reservation = await passes(limiter, [Subject("key there before", Limits(concurrent=2))])
        assert reservation
        redis.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(ApiError, match="can't be checked") as refused:
                await limiter.reserve(ONE)
            assert (refused.value.status, refused.value.code) == (503, "limits_unavailable")
            assert "can't do its work: Redis: command not allowed when used memory" in limiter.trouble
        finally:
            redis.client.config_set("maxmemory", 0)
        assert await limits_apply(limiter)
        assert not limiter.trouble
        await limiter.settle(reservation, 0)
        await limiter.close()

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
        places = PLACES + "key renewed"

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
        "the store of limits works again",
    ]


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
        taken = [0]
        take = RedisLink.take

        async def counted(link: RedisLink, what: Take) -> TakeResult:
            taken[0] += 1
            return await take(link, what)

        monkeypatch.setattr(RedisLink, "take", counted)
        try:
            await asyncio.gather(*(limiter.reserve(subjects, 100) for _ in range(300)))
            for _ in range(20):
                await limiter.reserve(subjects, 100)
            assert 0 < taken[0] <= remote.AT_A_TIME  # those that were asked before the first timeout
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
        assert redis.client.zcard(PLACES + "key that waits") == 1
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
            return redis.client.zcard(PLACES + "key that leaves") == 0

        await until(is_free)
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


class SlowLink:
    """Answers once it may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.asked = 0

    async def take(self, take: Take) -> TakeResult:
        self.asked += 1
        await self.may_answer.wait()
        return TakeResult(0.0, [])


def test_who_waits_too_long_for_a_slow_store_is_told_and_no_turn_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 3600.0)

    async def scenario() -> None:
        link = SlowLink()
        store = Remote(link)  # type: ignore[arg-type]
        numbers = iter(range(1000))

        def take() -> asyncio.Task[TakeResult]:
            return asyncio.create_task(store.take(Take(str(next(numbers)), (), 0)))

        first = [take() for _ in range(remote.AT_A_TIME)]
        left = take()
        while link.asked < len(first):
            await asyncio.sleep(0)
        left.cancel()  # its client has left
        monkeypatch.setattr(remote, "PATIENCE", 0.01)
        with pytest.raises(StoreBusyError):
            await take()
        monkeypatch.setattr(remote, "PATIENCE", 3600.0)
        late = take()
        await asyncio.sleep(0)
        assert link.asked == len(first)
        link.may_answer.set()
        await asyncio.gather(*first, late, *(take() for _ in range(3 * remote.AT_A_TIME)))
        assert left.cancelled()
        assert not store.trouble
        link.may_answer.clear()
        asked, again = link.asked, [take() for _ in range(remote.AT_A_TIME + 1)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert link.asked == asked + remote.AT_A_TIME  # as many as at first
        link.may_answer.set()
        await asyncio.gather(*again)

    asyncio.run(scenario())
